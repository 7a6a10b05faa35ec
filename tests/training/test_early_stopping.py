"""The best evaluation, by any metric, and early stopping: exact when a run is continued."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.run_files import is_equal, records
from helpers.tiny_run import SIZE, STEPS, TinyModel, load_last, make_config, run

from vil.checkpoints import checkpoint_files, run_folder
from vil.checkpoints.training_state import evaluations_since_best, read_training_state
from vil.config import ModelConfig
from vil.errors import UserError
from vil.evaluation.accuracy import EvaluationResult
from vil.training import trainer

EIGHT_CLASSES = ModelConfig(image_size=SIZE, num_classes=8)
"""For top5, which is always 100 % with the four classes of the tiny run."""


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that sets the results of the evaluations to come."""

    def set_figures(**values: list[float]) -> None:
        results: Iterator[EvaluationResult] = iter(
            [EvaluationResult(dict(zip(values, row)), images=30) for row in zip(*values.values())]
        )
        monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: next(results))

    return set_figures


def test_the_smallest_loss_is_the_best(tmp_path: Path, figures):
    figures(top1=[50.0, 70.0, 60.0], top5=[90.0, 80.0, 85.0], loss=[1.0, 0.9, 0.8])
    summary = run(make_config(tmp_path, best_metric="loss"))
    assert summary.best == {"top1": 60.0, "weights": "raw", "epoch": 3, "value": 0.8}
    best = read_training_state(tmp_path / checkpoint_files.BEST)
    assert (best["step"], best["best"]) == (3 * STEPS, summary.best)


def test_the_first_of_equal_evaluations_is_the_best(tmp_path: Path, figures):
    figures(top1=[50.0, 60.0] * 2, top5=[70.0] * 4, loss=[1.0] * 4)  # raw and average of two epochs
    summary = run(make_config(tmp_path, best_metric="top5", epochs=2, ema_decay=0.5, model=EIGHT_CLASSES))
    assert summary.best == {"top1": 50.0, "weights": "raw", "epoch": 1, "value": 70.0}


def test_a_metric_that_chooses_the_best_is_logged(tmp_path: Path):
    model = TinyModel()
    model.head = torch.nn.Linear(8, 8)
    run(make_config(tmp_path, best_metric="top5", epochs=1, model=EIGHT_CLASSES), model)
    assert "top5" in records(tmp_path)[-1]


def test_a_run_ends_after_evaluations_without_improvement(tmp_path: Path, figures, capsys):
    figures(top1=[50.0, 60.0, 60.0, 59.0, 99.0], loss=[1.0] * 5)
    config = make_config(tmp_path, epochs=9, patience=2)
    summary = run(config)
    assert (summary.step, summary.best["epoch"]) == (4 * STEPS, 2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("epoch   4/9 ")
    assert lines[-1] == "early stopping: no better top1 in 2 evaluations"
    again = run(config, state=load_last(tmp_path))  # no evaluation is left
    assert again.step == 4 * STEPS
    state = load_last(tmp_path)
    assert run_folder.finished_top1(tmp_path, state, config) is None  # no summary yet
    (tmp_path / run_folder.SUMMARY).write_text('[{"top1": 60.0}]')
    assert run_folder.finished_top1(tmp_path, state, config) == 60.0
    longer = make_config(tmp_path, epochs=9, patience=3)
    assert run_folder.finished_top1(tmp_path, state, longer) is None


def test_a_longer_patience_continues_a_run_that_stopped(tmp_path: Path, figures):
    figures(top1=[50.0, 40.0, 40.0], loss=[1.0] * 3)
    assert run(make_config(tmp_path, epochs=9, patience=1)).step == 2 * STEPS
    longer = make_config(tmp_path, epochs=9, patience=2)
    assert run(longer, state=load_last(tmp_path)).step == 3 * STEPS


def test_more_frequent_evaluations_do_not_count_epochs_without_one(tmp_path: Path, figures):
    figures(top1=[50.0, 40.0, 40.0, 40.0], loss=[1.0] * 4)
    run(make_config(tmp_path, epochs=9, patience=3, eval_every=3, max_steps=6 * STEPS))
    state = load_last(tmp_path)
    assert state["evaluations_since_best"] == 1
    often = make_config(tmp_path, epochs=9, patience=3, eval_every=1)
    (tmp_path / run_folder.SUMMARY).write_text('[{"top1": 50.0}]')
    assert run_folder.finished_top1(tmp_path, state, often) is None
    assert run(often, state=state).step == 8 * STEPS


def test_a_checkpoint_of_an_older_version_counts_by_epochs(tmp_path: Path, figures):
    figures(top1=[50.0, 40.0], loss=[1.0] * 2)
    config = make_config(tmp_path, epochs=9, patience=2, eval_every=2, max_steps=4 * STEPS)
    run(config)
    state = load_last(tmp_path)
    del state["evaluations_since_best"]
    assert evaluations_since_best(state, 2) == 1
    assert evaluations_since_best({**state, "best": None}, 2) == 0
    del state["train_images"], state["steps_per_epoch"]  # version 0.1.0
    assert evaluations_since_best(state, 2) == 0


@pytest.mark.parametrize("max_steps", [7, 15])
def test_an_interrupted_run_stops_at_the_same_step(tmp_path: Path, max_steps: int):
    """A tiny learning rate: the accuracy never changes."""
    options = {"epochs": 9, "patience": 2, "lr": 1e-9, "eval_every": 2}
    whole = run(make_config(tmp_path / "whole", **options))
    assert whole.step == 6 * STEPS
    run(make_config(tmp_path / "part", **options, max_steps=11))
    for limit in (11 + max_steps, 9 * STEPS):
        part = run(
            make_config(tmp_path / "part", **options, max_steps=limit), state=load_last(tmp_path / "part")
        )
    assert part.step == whole.step
    weights = [load_last(tmp_path / name)["model"] for name in ("whole", "part")]
    assert is_equal(*weights)


def test_the_attention_is_drawn_at_the_end_of_a_run_that_stops(tmp_path: Path):
    drawn = []

    def draw() -> torch.Tensor:
        drawn.append(1)
        return torch.zeros(3, 4, 4, dtype=torch.uint8)

    options = {"epochs": 9, "patience": 1, "lr": 1e-9, "loggers": ["tensorboard"], "attention_every": 5}
    assert run(make_config(tmp_path, **options), monitoring=trainer.Monitoring(draw)).step == 2 * STEPS
    assert len(drawn) == 1


@pytest.mark.parametrize("classes", [4, 5])
def test_top5_of_five_classes_or_fewer_is_refused(tmp_path: Path, classes: int):
    model = ModelConfig(image_size=SIZE, num_classes=classes)
    with pytest.raises(UserError) as refused:
        run(make_config(tmp_path, best_metric="top5", model=model))
    reason = f"top5 is always 100 % with {classes} classes; use top1"
    assert str(refused.value) == f"schedule.best_metric: {reason}"
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize(
    ("options", "epoch", "advice"),
    [
        ({"eval_every": 4}, 3, "evaluate more often by eval_every"),
        ({"eval_every": 3}, 3, "evaluate more often by eval_every"),
        ({"eval_every": 2, "max_steps": 9}, 2, "evaluate more often by eval_every"),
        ({"eval_every": 1, "max_steps": 5}, 1, "train longer"),
        ({"eval_every": 2, "epochs": 1}, 1, "train longer"),
    ],
)
def test_patience_without_evaluations_is_refused(
    tmp_path: Path, options: dict[str, int], epoch: int, advice: str
):
    with pytest.raises(UserError) as refused:
        run(make_config(tmp_path, patience=1, **options))
    reason = f"the first evaluation, after epoch {epoch}, would be the last one"
    assert str(refused.value) == f"schedule.patience: {reason}; {advice}"
    assert not (tmp_path / "config.yaml").exists()


def test_a_continued_run_keeps_its_metric(tmp_path: Path):
    run(make_config(tmp_path, max_steps=2))
    with pytest.raises(UserError) as refused:
        run_folder.open_run(tmp_path, make_config(tmp_path, max_steps=2, best_metric="loss"))
    reason = f"the run in {tmp_path} has top1, not loss; name another output or keep its value"
    assert str(refused.value) == f"schedule.best_metric: {reason}"


@pytest.mark.parametrize(("name", "key"), [("balanced_accuracy", "balanced_accuracy"), ("f1", "macro_f1")])
def test_metrics_by_class_choose_the_best(tmp_path: Path, name: str, key: str):
    summary = run(make_config(tmp_path, best_metric=name))
    values = [record[key] for record in records(tmp_path, "validation")]
    assert summary.best["value"] == max(values)
    assert summary.best["epoch"] == values.index(max(values)) + 1


def test_a_lost_best_checkpoint_is_restored_from_the_same_evaluation(tmp_path: Path, figures, caplog):
    """Not from one that follows it, in the same epoch or the next, at which `max_steps` ended a run."""
    options = {"epochs": 3, "keep_checkpoints": 9}
    figures(top1=[60.0, 50.0, 70.0, 65.0], loss=[1.0] * 4)  # after steps 5 and 7, then 9 and 10
    config = make_config(tmp_path, **options, max_steps=STEPS + 2)
    run(config)
    best = tmp_path / checkpoint_files.BEST
    for max_steps, best_step, top1 in (
        (STEPS + 2, STEPS, 60.0),
        (2 * STEPS - 1, 2 * STEPS - 1, 70.0),
        (2 * STEPS, 2 * STEPS - 1, 70.0),
    ):
        state = run_folder.open_run(tmp_path, config)
        config = make_config(tmp_path, **options, max_steps=max_steps)
        run(config, state=state)
        content = best.read_bytes()
        best.unlink()
        state = run_folder.open_run(tmp_path, config)
        restored = checkpoint_files.step_file(tmp_path, best_step)
        assert caplog.records[-1].getMessage().endswith(f"; restored from {restored}")
        assert best.read_bytes() == content
        assert state["best"]["top1"] == top1


@pytest.mark.parametrize(
    ("state", "is_best"),
    [
        ({"epoch": 2, "epoch_step": 0, "evaluations_since_best": 0}, True),
        ({"epoch": 2, "epoch_step": 3, "evaluations_since_best": 0}, False),  # ended in the next epoch
        ({"epoch": 1, "epoch_step": 3, "evaluations_since_best": 0}, True),
        ({"epoch": 1, "epoch_step": 0, "evaluations_since_best": 0}, False),
        ({"epoch": 2, "epoch_step": 0, "evaluations_since_best": 1}, False),
        ({"epoch": 2}, True),  # of version 0.1.0
        ({"epoch": 3}, False),
    ],
)
def test_the_best_checkpoint_without_a_log(tmp_path: Path, state: dict, is_best: bool):
    best = {"top1": 60.0, "weights": "raw", "epoch": 2}
    assert run_folder._is_best_evaluation(tmp_path, {"step": 10, "best": best, **state}) == is_best


@pytest.mark.parametrize("text", ["NaN", "1e999", "-1", "101", '"nan"'])
def test_a_damaged_summary_is_not_a_result(tmp_path: Path, text: str):
    config = make_config(tmp_path)
    run(config)
    state = run_folder.open_run(tmp_path, config)
    (tmp_path / "summary.json").write_text('[{"top1": 50.0}]')
    assert run_folder.finished_top1(tmp_path, state, config) == 50
    (tmp_path / "summary.json").write_text(f'[{{"top1": {text}}}]')
    assert run_folder.finished_top1(tmp_path, state, config) is None
