import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.run_files import all_records, is_equal, losses, records
from helpers.tiny_run import (
    CLASSES,
    SIZE,
    STEPS,
    TinyModel,
    load_last,
    make_batch,
    make_config,
    make_loaders,
    run,
)
from torch import nn

from vil.checkpoints import checkpoint_files
from vil.checkpoints import writer as checkpoint_writer
from vil.checkpoints.training_state import read_training_state, write_training_state
from vil.config import DataConfig, ModelConfig
from vil.errors import UserError
from vil.evaluation.accuracy import EvaluationDataset, EvaluationOptions, EvaluationResult, evaluate
from vil.training import trainer
from vil.training.metrics_log import MetricsLog
from vil.training.trainer import Batch, TrainingError


def test_it_learns_and_logs(tmp_path: Path):
    summary = run(make_config(tmp_path, epochs=6))
    train = records(tmp_path, "train")
    assert [record["step"] for record in train] == list(range(1, 6 * STEPS + 1))
    assert [record["epoch"] for record in train] == [1 + step // STEPS for step in range(6 * STEPS)]
    assert sum(losses(tmp_path)[-5:]) < 0.8 * sum(losses(tmp_path)[:5])
    assert train[-1]["lr"] == pytest.approx(1e-6)
    assert all(record["grad_norm"] > 0 for record in train)
    validation = records(tmp_path, "validation")
    assert [(r["step"], r["epoch"], r["images"]) for r in validation] == [
        (STEPS * epoch, epoch, 30) for epoch in range(1, 7)
    ]
    assert summary.best["top1"] == max(r["top1"] for r in validation) > 60
    assert summary.step == 30
    assert {"step_time", "data_wait", "images_per_second", "time"} <= all_records(tmp_path)[0].keys()


def test_the_first_the_last_and_every_nth_step_are_logged(tmp_path: Path):
    run(make_config(tmp_path, log_every=4, epochs=2, eval_every=5))
    assert [r["step"] for r in records(tmp_path, "train")] == [1, 4, 8, 10]
    assert [r["epoch"] for r in records(tmp_path, "validation")] == [2]


def test_logged_loss_is_that_of_the_global_batch(tmp_path: Path):
    run(make_config(tmp_path, epochs=1, accumulation=2, label_smoothing=0.0))
    images, targets = make_batch(1, 16)
    expected = nn.functional.cross_entropy(TinyModel()(images), targets).item()
    assert losses(tmp_path)[0] == pytest.approx(expected, abs=1e-6)


def test_class_weights_are_normalized_over_the_global_batch(tmp_path: Path):
    """Loss and gradient are those of PyTorch's weighted cross-entropy of the whole batch."""
    weights = [1.0, 20.0, 0.1, 5.0]
    run(
        make_config(
            tmp_path, max_steps=2, accumulation=2, label_smoothing=0.0, class_weights=weights, lr=1e-9
        )
    )
    model = TinyModel()
    for step, record in enumerate(records(tmp_path, "train"), start=1):
        images, targets = make_batch(step, 16)
        model.zero_grad()
        expected = nn.functional.cross_entropy(model(images), targets, torch.tensor(weights))
        expected.backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        assert record["loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


def test_accumulation_changes_nothing(tmp_path: Path):
    for parts in (1, 4):
        run(make_config(tmp_path / str(parts), accumulation=parts))
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "4"), abs=1e-4)
    assert losses(tmp_path / "1") != losses(tmp_path / "4")  # they are summed in another order


RESUMED: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {
        "precision": "float16",
        "ema_decay": 0.9,
        "ema_warmup": True,
        "accumulation": 2,
        "clip_grad": 0.5,
        "model": ModelConfig(image_size=SIZE, num_classes=CLASSES, neighbors="random"),
    },
    "optimizer with counters in its groups": {"optimizer": "lookahead_radam"},
}


@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED)
@pytest.mark.parametrize("stop", [STEPS, STEPS + 2], ids=["after an epoch", "within an epoch"])
def test_a_continued_run_is_bit_identical(tmp_path: Path, options: dict[str, Any], stop: int):
    full, parts = tmp_path / "full", tmp_path / "parts"
    run(make_config(full, **options), TinyModel(dropout=0.2))
    run(make_config(parts, **options, max_steps=stop), TinyModel(dropout=0.2))
    state = load_last(parts)
    assert (state["step"], state["epoch"]) == (stop, 1)
    torch.rand(7)  # no generator's state matters
    run(make_config(parts, **options), TinyModel(dropout=0.2), state=state)

    def after(folder: Path) -> list[dict[str, Any]]:
        return [record for record in records(folder) if record["step"] > stop]

    assert after(parts) == after(full)
    assert len(after(full)) > STEPS
    one, other = (load_last(folder) for folder in (full, parts))
    for key in ("model", "ema", "optimizer", "scaler", "step"):
        assert is_equal(one[key], other[key]), key


@pytest.mark.parametrize("value", [torch.zeros(1), torch.zeros(1).expand(10**9)], ids=["small", "expanded"])
def test_an_optimizer_state_of_another_shape_is_refused(tmp_path: Path, value: torch.Tensor):
    """The kernels of fused optimizers would read and write past its end."""
    run(make_config(tmp_path, max_steps=STEPS + 2))
    state = load_last(tmp_path)
    state["optimizer"]["state"][0]["exp_avg"] = value
    with pytest.raises(UserError, match=r"the checkpoint in .* does not fit: exp_avg of parameter 0 is"):
        run(make_config(tmp_path), state=state)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])  # fused, which checks shapes, and not
def test_options_that_reorder_the_optimizers_parameters_are_refused(tmp_path: Path, optimizer: str):
    def resume(**schedule: object) -> None:
        config = make_config(tmp_path, max_steps=STEPS + 3, optimizer=optimizer, **schedule)
        run(config, state=load_last(tmp_path))

    run(make_config(tmp_path, max_steps=STEPS + 2, optimizer=optimizer, layer_decay=0.9))
    for key, value in (("layer_decay", None), ("layer_decay_min", 0.99), ("decay_biases", True)):
        with pytest.raises(UserError, match="another order of parameters") as refusal:
            resume(**{"layer_decay": 0.9, key: value})
        assert refusal.value.location == f"schedule.{key}"
    resume(layer_decay=0.8)  # in the same order


def test_a_training_set_of_another_size_is_refused(tmp_path: Path):
    config = make_config(tmp_path, max_steps=STEPS + 2)
    run(config)
    state = load_last(tmp_path)
    assert (state["train_images"], state["steps_per_epoch"]) == (80, STEPS)
    for images, steps in ((160, 2 * STEPS), (40, STEPS // 2), (81, STEPS)):
        loaders = dataclasses.replace(make_loaders(16, 1), train_images=images)
        loaders.train.steps_per_epoch = steps
        with pytest.raises(UserError) as refusal:
            run(make_config(tmp_path), loaders=loaders, state=state)
        message = (
            f"trained on 80 images, 5 steps per epoch; the data now has {images} images, {steps} steps per"
        )
        assert message in refusal.value.reason
        assert refusal.value.location == "data.root"
    del state["train_images"], state["steps_per_epoch"]  # a checkpoint of version 0.1.0
    loaders = make_loaders(16, 1)
    loaders.train.steps_per_epoch = 2 * STEPS
    with pytest.raises(
        UserError, match="trained on 7 steps in 1 epochs; the data now has 80 images, 10 steps"
    ):
        run(make_config(tmp_path), loaders=loaders, state=state)
    run(make_config(tmp_path), state=state)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_trains(tmp_path: Path, precision: str):
    run(make_config(tmp_path, precision=precision, epochs=6))
    assert sum(losses(tmp_path)[-5:]) < 0.8 * sum(losses(tmp_path)[:5])
    scaler = load_last(tmp_path)["scaler"]
    assert bool(scaler) == (precision == "float16")
    state = load_last(tmp_path)
    assert {value.dtype for value in state["model"].values()} == {torch.float32}


def test_float16_overflow_skips_a_step(tmp_path: Path):
    class Exploding(TinyModel):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = super().forward(x)
            if self.training:  # finite values whose gradient float16 cannot hold
                logits.register_hook(lambda gradient: gradient * 1e5)
            return logits

    model = Exploding()
    before = model.head.weight.detach().clone()
    run(make_config(tmp_path, precision="float16", max_steps=1), model)
    assert torch.equal(model.head.weight, before)
    assert records(tmp_path, "train")[0]["grad_norm"] is None
    assert load_last(tmp_path)["scaler"]["scale"] == 2**15


def test_ema_is_the_running_mean_and_is_evaluated(tmp_path: Path):
    folders = {decay: tmp_path / str(decay) for decay in (0.0, 0.5)}
    for decay, folder in folders.items():
        run(make_config(folder, epochs=1, ema_decay=decay))
    state = load_last(folders[0.0])
    assert is_equal(state["ema"], state["model"])

    weights = []
    for steps in range(1, 4):
        folder = tmp_path / f"steps{steps}"
        run(make_config(folder, ema_decay=0.5, max_steps=steps))
        weights.append(load_last(folder)["model"]["head.weight"])
    mean = load_last(tmp_path / "steps3")["ema"]["head.weight"]
    assert torch.allclose(mean, weights[0] / 4 + weights[1] / 4 + weights[2] / 2)

    record = records(folders[0.5], "validation")[0]
    assert record["ema_loss"] != record["loss"]
    averaged = TinyModel()
    averaged.load_state_dict(load_last(folders[0.5])["ema"])
    dataset = EvaluationDataset("validation", make_loaders().validation)
    again = evaluate(averaged, dataset, EvaluationOptions(torch.device("cpu"), "float32"))
    assert record["ema_top1"] == again.values["top1"]


def test_ema_averages_running_statistics_and_copies_other_buffers(tmp_path: Path):
    class RedrawnModel(TinyModel):
        """Adds 1 to a buffer in every step, as Performer redraws its projection."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("projection", torch.zeros(2))

        def set_training_progress(self, step: int, epoch: int) -> None:
            self.projection += 1

    run(make_config(tmp_path / "copied", ema_decay=0.5, max_steps=3), RedrawnModel())
    assert load_last(tmp_path / "copied")["ema"]["projection"].tolist() == [3.0, 3.0]

    means = []
    for steps in range(1, 4):
        folder = tmp_path / f"averaged{steps}"
        run(make_config(folder, ema_decay=0.5, max_steps=steps), TinyModel(norm=nn.BatchNorm2d))
        state = load_last(folder)
        means.append(state["model"]["norm.running_mean"])
    expected = means[0] / 4 + means[1] / 4 + means[2] / 2
    torch.testing.assert_close(state["ema"]["norm.running_mean"], expected)


def test_best_is_the_better_of_raw_and_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    figures = iter([50.0, 60.0, 70.0, 65.0, 70.0, 70.0])  # raw and average of three epochs

    def evaluate_as_given(*_: Any, **__: Any) -> EvaluationResult:
        return EvaluationResult({"top1": next(figures), "loss": 1.0}, images=30)

    monkeypatch.setattr(trainer, "evaluate", evaluate_as_given)
    summary = run(make_config(tmp_path, ema_decay=0.9))
    assert summary.best == {"top1": 70.0, "weights": "raw", "epoch": 2}
    assert read_training_state(tmp_path / checkpoint_files.BEST)["step"] == 2 * STEPS
    assert load_last(tmp_path)["best"] == summary.best


@pytest.mark.parametrize(("mode", "largest"), [("norm", 0.01), ("value", 0.01 * 1000**0.5), ("agc", None)])
def test_clipping(tmp_path: Path, mode: str, largest: float | None):
    """With plain SGD, a step is the clipped gradient."""
    model = TinyModel()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    options = {"optimizer": "momentum", "momentum": 0.0, "lr": 1.0, "weight_decay": 0.0, "warmup_epochs": 0}
    run(make_config(tmp_path, max_steps=1, clip_grad=0.01, clip_mode=mode, **options), model)
    steps = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    norm = torch.cat([step.flatten() for step in steps.values()]).norm()
    unclipped = records(tmp_path, "train")[0]["grad_norm"]
    if mode == "norm":
        assert norm == pytest.approx(0.01, rel=1e-3)
    elif mode == "value":
        assert max(step.abs().max() for step in steps.values()) == pytest.approx(0.01, rel=1e-3)
    else:
        own = before["stem.weight"].flatten(1).norm(dim=1)
        assert (steps["stem.weight"].flatten(1).norm(dim=1) <= 0.01 * own + 1e-6).all()
        assert steps["head.weight"].norm() > 0.01
    assert unclipped > 0.1


def test_random_shift_switches_after_its_share_of_the_epochs(tmp_path: Path):
    model = TinyModel()
    shift = ModelConfig(image_size=SIZE, num_classes=CLASSES, neighbors="random")
    run(make_config(tmp_path, epochs=10, random_shift_until=0.7, model=shift), model)
    assert model.neighbors == ["random"] * 7 + ["all"] * 3
    unshifted = TinyModel()
    run(make_config(tmp_path / "all"), unshifted)
    assert unshifted.neighbors == []


def test_a_model_is_notified_of_the_training_progress(tmp_path: Path):
    class Notified(TinyModel):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[tuple[int, int, float]] = []

        def set_training_progress(self, step: int, epoch: int) -> None:
            self.calls.append((step, epoch, torch.rand(()).item()))

    model, again = Notified(), Notified()
    run(make_config(tmp_path / "a"), model)
    run(make_config(tmp_path / "b", accumulation=2), again)
    assert [(step, epoch) for step, epoch, _ in model.calls] == [(s, s // STEPS) for s in range(3 * STEPS)]
    assert model.calls == again.calls
    assert len({draw for _, _, draw in model.calls}) == 3 * STEPS


def test_gradient_checkpointing(tmp_path: Path):
    class Switched(TinyModel):
        checkpointing = False

        def set_grad_checkpointing(self, enable: bool = True) -> None:
            self.checkpointing = enable

    model = Switched()
    run(make_config(tmp_path, max_steps=1, gradient_checkpointing=True), model)
    assert model.checkpointing
    with pytest.raises(UserError, match="gradient_checkpointing: TinyModel does not support it"):
        run(make_config(tmp_path, gradient_checkpointing=True))


def test_channels_last(tmp_path: Path):
    seen = []

    class Watching(TinyModel):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.is_contiguous(memory_format=torch.channels_last))
            return super().forward(x)

    model = Watching()
    run(make_config(tmp_path, max_steps=2, channels_last=True), model)
    assert seen[:2] == [True, True]
    assert model.stem.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_compiled_model_is_trained_and_the_bare_model_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compiled = []

    def fake_compile(model: nn.Module, **options: Any) -> nn.Module:
        compiled.append((model, options))
        return nn.Sequential(model)

    monkeypatch.setattr(torch, "compile", fake_compile)
    monkeypatch.setattr("vil.training.model_updater.check_compiler", lambda *_: None)
    model = TinyModel()
    run(make_config(tmp_path / "compiled", epochs=1, compile=True), model)
    run(make_config(tmp_path / "eager", epochs=1))
    assert compiled == [(model, {"dynamic": False})]
    assert losses(tmp_path / "compiled") == losses(tmp_path / "eager")
    assert "stem.weight" in load_last(tmp_path / "compiled")["model"]


def test_every_progressive_size_may_be_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Beyond its limit of recompilations PyTorch runs without the compiler."""
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    config = make_config(tmp_path, epochs=1, compile=True)
    config.schedule.progressive_resizing = [(number / 10, SIZE) for number in range(10)]
    with torch._dynamo.config.patch(recompile_limit=8):
        run(config)
        assert torch._dynamo.config.recompile_limit == 22


def test_compiled_gradients_are_those_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Forward and backward passes are traced as by the default backend, without generating code."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    for compiled in (True, False):
        run(make_config(tmp_path / str(compiled), max_steps=2, accumulation=2, compile=compiled))
    assert len(losses(tmp_path / "True")) == 2
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), abs=1e-5)


def test_the_best_checkpoint_is_a_separate_file(tmp_path: Path):
    """Damage to one of the two must not reach the other."""
    run(make_config(tmp_path, max_steps=1))
    best, (_, last) = tmp_path / checkpoint_files.BEST, checkpoint_files.step_files(tmp_path)[0]
    assert is_equal(read_training_state(best), read_training_state(last))
    assert not best.samefile(last)


def test_mixing_gets_the_position_and_its_targets_are_used(tmp_path: Path):
    positions = []

    def mix(images: torch.Tensor, targets: torch.Tensor, **position: int) -> Batch:
        positions.append(position)
        return images, torch.full((len(targets), CLASSES), 1 / CLASSES)

    run(make_config(tmp_path, accumulation=2, max_steps=6, lr=1e-9), mix=mix)
    assert positions[:2] == [{"step": 0, "rank": 0, "part": part, "epoch": 0} for part in (0, 1)]
    assert positions[-1] == {"step": 5, "rank": 0, "part": 1, "epoch": 1}
    expected = -TinyModel()(make_batch(1, 16)[0]).log_softmax(1).mean().item()
    assert losses(tmp_path)[0] == pytest.approx(expected, abs=1e-6)


class Faulty(TinyModel):
    """A model whose loss, or only its gradient, is NaN in some steps, counted from 1."""

    def __init__(self, steps: set[int], has_finite_loss: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.steps, self.has_finite_loss, self.calls = steps, has_finite_loss, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().forward(x)
        self.calls += self.training
        if not self.training or self.calls not in self.steps:
            return logits
        if not self.has_finite_loss:
            return logits * torch.nan
        logits.register_hook(lambda gradient: gradient * torch.nan)
        return logits


OPTIMIZERS = ["adamw", "sgd", "lamb"]  # only lamb does not skip on the device


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("has_finite_loss", [False, True], ids=["loss", "gradient"])
@pytest.mark.parametrize("bad_step", [1, STEPS + 2])
def test_a_step_that_is_not_finite_is_skipped(
    tmp_path: Path, optimizer: str, has_finite_loss: bool, bad_step: int
):
    """Weights, optimizer state and running statistics do not change."""
    states, options = {}, {"optimizer": optimizer, "momentum": 0.9, "clip_grad": 1.0, "lr": 0.01}
    for steps in (bad_step - 1, bad_step):
        folder = tmp_path / str(steps)
        if steps:
            model = Faulty({bad_step}, has_finite_loss, norm=nn.BatchNorm2d)
            run(make_config(folder, max_steps=steps, **options), model)
            states[steps] = load_last(folder)
    after = states[bad_step]
    assert records(tmp_path / str(bad_step), "train")[-1]["skipped_steps"] == 1
    assert after["watched"]["skipped"] == after["watched"]["skipped_in_a_row"] == 1
    if bad_step == 1:
        assert is_equal(after["model"], dict(Faulty(set(), norm=nn.BatchNorm2d).state_dict()))
        assert after["optimizer"]["state"] == {}
    else:
        assert is_equal(after["model"], states[bad_step - 1]["model"])
        assert is_equal(after["optimizer"]["state"], states[bad_step - 1]["optimizer"]["state"])
    assert all(value.isfinite().all() for value in after["model"].values())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_continues_after_skipped_steps(tmp_path: Path, optimizer: str):
    run(make_config(tmp_path, epochs=6, optimizer=optimizer, lr=0.01), Faulty({1, 3, 4, 12}))
    found = records(tmp_path, "train")
    assert [r["step"] for r in found if r["loss"] is None] == [1, 3, 4, 12]
    assert found[-1]["skipped_steps"] == 4
    assert found[-1]["loss"] < found[1]["loss"]


def test_an_infinite_loss_with_finite_gradients_is_skipped(tmp_path: Path):
    class Unbounded(TinyModel):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = super().forward(x)
            if not self.training:
                return logits
            return torch.where(torch.arange(CLASSES) == 0, logits, logits.detach() - torch.inf)

    before = TinyModel().head.weight.detach().clone()
    model = Unbounded()
    run(make_config(tmp_path, max_steps=1, label_smoothing=0.0), model)
    assert torch.equal(model.head.weight, before)
    assert load_last(tmp_path)["watched"]["skipped"] == 1


@pytest.mark.parametrize("log_every", [1, 100])
@pytest.mark.parametrize("most", [0, 2])
def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path: Path, log_every: int, most: int):
    model = Faulty({2} if most else set(), has_finite_loss=True)
    model.steps |= set(range(STEPS + 2, 99))
    config = make_config(tmp_path, log_every=log_every, max_skipped_steps=most)
    with pytest.raises(TrainingError) as caught:
        run(config, model)
    kind = f"more than {most} steps in a row, at learning rate "
    assert str(caught.value).startswith(f"step {STEPS + 2 + most}: loss or gradient not finite in {kind}")
    assert str(caught.value).endswith(f"the last checkpoint is {tmp_path}/checkpoints/step_00000005.pt")
    assert all(value.isfinite().all() for value in load_last(tmp_path)["model"].values())


def test_a_loss_spike_is_logged_with_the_samples(tmp_path: Path):
    """Also when the losses before it are those of a checkpoint."""

    class Spiking(TinyModel):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += self.training
            return super().forward(x) * (1 + 1e3 * (self.training and self.calls == 5 * STEPS + 2))

    run(make_config(tmp_path / "full", epochs=7, log_every=4), Spiking())
    spiking = Spiking()
    spiking.calls = 5 * STEPS
    run(make_config(tmp_path / "parts", epochs=7, log_every=4, max_steps=5 * STEPS))
    run(make_config(tmp_path / "parts", epochs=7, log_every=4), spiking, state=load_last(tmp_path / "parts"))
    for folder in (tmp_path / "full", tmp_path / "parts"):
        (spike,) = records(folder, "spike")
        assert spike["step"] == 5 * STEPS + 2
        assert spike["epoch"] == 6
        assert spike["samples"] == [f"epoch 5 step 1 image {number}" for number in range(16)]
        assert spike["loss"] > 10 > spike["mean"]
    assert records(tmp_path / "full", "spike") == records(tmp_path / "parts", "spike")


@pytest.mark.parametrize(
    "options", [{"lr": 1e30, "max_steps": 1}, {"lr": 1e30, "max_steps": 1, "eval_every": 9}]
)
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, options: dict[str, Any]):
    with pytest.raises(TrainingError, match=r"step 1: the weights are not finite, at .*; nothing was saved"):
        run(make_config(tmp_path, warmup_epochs=0, **options))
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_validation_loss_that_is_not_finite_stops_the_run(tmp_path: Path):
    class NaNInEvaluation(TinyModel):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (1 if self.training else torch.nan)

    with pytest.raises(TrainingError, match="step 5: the validation loss is nan"):
        run(make_config(tmp_path), NaNInEvaluation())
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_checkpoint_that_can_never_be_written_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(path: Path, state: dict[str, Any]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_writer, "RETRY_DELAYS_S", ())
    monkeypatch.setattr(checkpoint_writer, "write_training_state", fail)
    with pytest.raises(TrainingError, match=r"step 15: .*No space left on device; nothing was saved yet"):
        run(make_config(tmp_path))
    assert len([r for r in caplog.records if "training continues" in r.getMessage()]) >= 3
    assert [r["step"] for r in records(tmp_path, "train")] == list(range(1, 16))


def test_a_failed_checkpoint_is_written_with_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The best evaluation, whose save failed, is saved with the next one."""
    save, calls = write_training_state, 0

    def fail_at_first(path: Path, state: dict[str, Any]) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError(28, "No space left on device")
        save(path, state)

    monkeypatch.setattr(checkpoint_writer, "RETRY_DELAYS_S", ())
    monkeypatch.setattr(checkpoint_writer, "write_training_state", fail_at_first)
    run(make_config(tmp_path / "a", lr=1e-9))  # no later evaluation is better
    monkeypatch.setattr(checkpoint_writer, "write_training_state", save)
    run(make_config(tmp_path / "b", lr=1e-9))
    for path in (
        checkpoint_files.BEST,
        *(path.relative_to(tmp_path / "b") for _, path in checkpoint_files.step_files(tmp_path / "b")),
    ):
        one, other = (read_training_state(tmp_path / name / path) for name in "ab")
        assert is_equal({**one, "config": 0}, {**other, "config": 0}), path


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_log_that_can_never_be_written_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def open_on_full_disk(log: MetricsLog, *arguments: Any) -> None:
        original(log, *arguments)
        log._file = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115

    original = MetricsLog.__init__
    monkeypatch.setattr(MetricsLog, "__init__", open_on_full_disk)
    monkeypatch.setattr(checkpoint_writer, "RETRY_DELAYS_S", ())
    with pytest.raises(TrainingError, match=r"step 15: .*: No space left on device; nothing was saved yet"):
        run(make_config(tmp_path))
    warned = [record.getMessage() for record in caplog.records if "metrics.jsonl" in record.getMessage()]
    assert len(warned) == 1
    assert checkpoint_files.step_files(tmp_path) == []  # none is ahead of the log


def test_a_continued_run_uses_the_new_options(tmp_path: Path):
    run(make_config(tmp_path, max_steps=STEPS, weight_decay=0.1))
    state = load_last(tmp_path)
    run(make_config(tmp_path, weight_decay=0.3, betas=(0.8, 0.9), ema_decay=0.9), state=state)
    groups = load_last(tmp_path)["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    assert {tuple(group["betas"]) for group in groups} == {(0.8, 0.9)}


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path):
    run(make_config(tmp_path, max_steps=1))
    state = load_last(tmp_path)
    with pytest.raises(UserError, match=r"does not fit: .*norm\.running_mean"):
        run(make_config(tmp_path), TinyModel(norm=nn.BatchNorm2d), state=state)


@pytest.mark.parametrize(
    "optimizer",
    [
        {},
        {"state": {}, "param_groups": 3},
        {"state": None, "param_groups": []},
        {"state": {}, "param_groups": [None, None]},
        {"state": {}, "param_groups": [{}, {}]},
    ],
)
def test_a_malformed_state_of_the_optimizer_is_refused(tmp_path: Path, optimizer: dict[str, Any]):
    run(make_config(tmp_path, max_steps=1))
    state = load_last(tmp_path) | {"optimizer": optimizer}
    with pytest.raises(UserError, match=r"output: the checkpoint in .* does not fit: "):
        run(make_config(tmp_path), state=state)


@pytest.mark.parametrize(("root", "key"), [("/datasets/imagenet", "data.root"), (None, "data.source")])
def test_other_classes_than_those_of_the_run_are_refused(tmp_path: Path, root: str | None, key: str):
    run(make_config(tmp_path, max_steps=1))
    state = load_last(tmp_path)
    names = state["class_names"]
    for others, message in ((names[:1] + names[:0:-1], "'none' as class 1"), (names[:3], "has 3 classes")):
        config = make_config(tmp_path, data=DataConfig(root=root))
        with pytest.raises(UserError, match=f"other classes than the run in .*{message}") as caught:
            run(config, state=state | {"class_names": others})
        assert caught.value.location == key


def test_a_finished_run_returns_at_once(tmp_path: Path):
    first = run(make_config(tmp_path))
    before = records(tmp_path)
    again = run(make_config(tmp_path), state=load_last(tmp_path))
    assert again.best == first.best
    assert records(tmp_path) == before


def test_a_run_cut_short_at_an_epoch_without_evaluation_is_evaluated(tmp_path: Path):
    run(make_config(tmp_path, max_steps=STEPS, eval_every=3))
    state = load_last(tmp_path) | {"best": None}
    summary = run(make_config(tmp_path, max_steps=STEPS, eval_every=3), state=state)
    assert summary.best["epoch"] == 1


def test_steps_that_are_not_logged_do_not_wait_for_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Reading a number from the device would stall a GPU."""
    reads: list[int] = []
    step = 0

    class Counting(TinyModel):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            nonlocal step
            step += self.training
            return super().forward(x)

    for name in ("item", "__float__", "__bool__", "tolist", "cpu"):
        original = getattr(torch.Tensor, name)

        def reading(self, *arguments, original=original, **options):
            if self.dtype in (torch.float32, torch.bool):
                reads.append(step)
            return original(self, *arguments, **options)

        monkeypatch.setattr(torch.Tensor, name, reading)
    options = {"clip_grad": 1.0, "ema_decay": 0.9, "optimizer": "momentum"}
    run(make_config(tmp_path, epochs=1, log_every=4, **options), Counting())
    # In the first step, the optimizer has no state yet, and reads whether the gradient is finite.
    assert {1, 4, 5} >= set(reads)
    assert {1, 4} <= set(reads)


def test_a_killed_data_worker_is_one_line(tmp_path: Path):
    """PyTorch raises the error from a signal handler, anywhere in the program."""

    class Killed(TinyModel):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    with pytest.raises(TrainingError) as caught:
        run(make_config(tmp_path), Killed())
    assert str(caught.value) == (
        "step 1: a data worker is killed by signal: Killed. Fewer data.workers need less memory; "
        "nothing was saved yet"
    )
