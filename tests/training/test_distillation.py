"""Distillation: the loss against formulas, the teacher's view of an image, exact runs, and refusals."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from helpers.run_files import is_equal, losses
from helpers.tiny_run import (
    CLASSES,
    CPU,
    SIZE,
    STEPS,
    TinyModel,
    TwoHeads,
    load_last,
    make_batch,
    make_config,
    make_teacher,
    run,
)
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import train as program
from data.to_device import NormalizeAndErase
from data.transforms import channel_statistics
from tools.programs.find_lr import range_test
from vil.checkpoints.checkpoint_files import step_files
from vil.checkpoints.teacher import load_teacher
from vil.checkpoints.training_state import read_training_state, write_training_state
from vil.command_line import resolve_train_command
from vil.config import DataConfig, ScheduleConfig
from vil.errors import UserError
from vil.runtime.epoch_steps import EpochSteps
from vil.training import distillation
from vil.training.distillation import DistillationLoss, Teacher, build_teacher, describe_teacher
from vil.training.loss import build_loss
from vil.training.model_updater import ModelUpdater
from vil.training.trainable import classifiers

FIXTURES = Path(__file__).parents[1] / "fixtures"
RUN = FIXTURES / "version_0_1_0" / "run"
PUBLISHED = FIXTURES / "parity" / "vil_rpe_chunk"
PUBLISHED_TEACHER = ScheduleConfig(
    distillation="hard",
    teacher=str(PUBLISHED / "model_best.pth"),
    teacher_released_config=str(PUBLISHED / "config.yaml"),
)


def probabilities(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def expected_loss(
    heads: tuple[np.ndarray, np.ndarray],
    labels: np.ndarray,
    teacher: np.ndarray,
    schedule: ScheduleConfig,
    weights: np.ndarray,
) -> tuple[float, np.ndarray, np.ndarray]:
    """Return the loss (DeiT, section 4) and its gradients with respect to both heads, in NumPy."""
    count = weights.sum()
    alpha, tau = schedule.distillation_alpha, schedule.distillation_temperature
    found = probabilities(heads[0])
    loss = -(1 - alpha) * (weights[:, None] * labels * np.log(found)).sum() / count
    grad = (1 - alpha) * weights[:, None] * (found - labels) / count
    if schedule.distillation == "hard":
        target, found = np.eye(teacher.shape[1])[teacher.argmax(axis=1)], probabilities(heads[1])
        loss -= alpha * (weights[:, None] * target * np.log(found)).sum() / count
        grad_dist = alpha * weights[:, None] * (found - target) / count
    else:
        target, found = probabilities(teacher / tau), probabilities(heads[1] / tau)
        loss += alpha * tau**2 * (weights[:, None] * target * np.log(target / found)).sum() / count
        grad_dist = alpha * tau * weights[:, None] * (found - target) / count
    return loss, grad, grad_dist


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("targets", ["indices", "mixed"])
@pytest.mark.parametrize("has_token", [False, True])
def test_loss_and_gradients_are_those_of_the_formula(kind, targets, has_token, is_weighted):
    schedule = ScheduleConfig(
        distillation=kind, distillation_alpha=0.3, distillation_temperature=2.5, label_smoothing=0.0
    )
    generator = torch.Generator().manual_seed(0)
    logits, dist, teacher = (
        3 * torch.randn(6, 5, dtype=torch.float64, generator=generator) for _ in range(3)
    )
    labels = F.one_hot(torch.tensor([0, 1, 2, 3, 4, 4]), 5).double()
    mixed = 0.7 * labels + 0.3 * labels.flip(0)
    class_weights = torch.tensor([1.0, 2.0, 0.5, 3.0, 0.2]) if is_weighted else None
    label_loss = build_loss(schedule, class_weights)
    heads = [logits.requires_grad_(), dist.requires_grad_()] if has_token else [logits.requires_grad_()]
    loss = DistillationLoss(label_loss, schedule, class_weights)(
        tuple(heads) if has_token else logits, mixed if targets == "mixed" else labels.argmax(1), teacher
    )
    given = (mixed if targets == "mixed" else labels).numpy()
    weights = np.ones(6) if class_weights is None else given @ class_weights.double().numpy()
    if is_weighted and targets == "mixed":  # cross-entropy weights the terms of the sum over classes
        given = given * class_weights.double().numpy() / weights[:, None]
    arrays = tuple(head.detach().numpy() for head in (heads if has_token else heads * 2))
    value, grad, grad_dist = expected_loss(arrays, given, teacher.numpy(), schedule, weights)
    scale = weights.sum() / 6  # by which `ModelUpdater` divides, once the global batch is known
    assert loss.item() == pytest.approx(value * scale, rel=1e-6 if is_weighted else 1e-12)
    loss.backward()
    expected = [grad, grad_dist] if has_token else [grad + grad_dist]
    for head, gradient in zip(heads, expected):
        np.testing.assert_allclose(head.grad.numpy(), gradient * scale, atol=1e-7 if is_weighted else 1e-14)


def test_labels_of_the_teacher_are_not_smoothed():
    schedule = ScheduleConfig(distillation="hard", distillation_alpha=0.25, label_smoothing=0.1)
    logits, teacher, labels = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    loss = DistillationLoss(build_loss(schedule), schedule)(logits, labels, teacher)
    smooth = F.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(loss, 0.75 * smooth + 0.25 * F.cross_entropy(logits, teacher.argmax(1)))


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_classes_that_the_data_does_not_have_are_improbable_for_the_teacher(kind):
    schedule = ScheduleConfig(distillation=kind, distillation_alpha=1.0)
    logits, teacher = torch.randn(4, 7), torch.randn(4, 5)
    labels = torch.tensor([0, 1, 2, 3])
    padded = F.pad(teacher, (0, 2), value=-1e4)
    loss = DistillationLoss(build_loss(schedule), schedule)
    torch.testing.assert_close(loss(logits, labels, teacher), loss(logits, labels, padded))


def test_the_teacher_sees_the_same_pixels_normalized_for_it():
    teacher = make_teacher()
    pixels = torch.randint(256, (3, 3, 2 * SIZE, 2 * SIZE), dtype=torch.uint8)
    images = NormalizeAndErase(DataConfig.mean, DataConfig.std)(pixels)
    expected = NormalizeAndErase(teacher.trained.mean, teacher.trained.std)(pixels)
    torch.testing.assert_close(teacher.preprocess(images), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(teacher(images), teacher.trained.model(expected), atol=1e-4, rtol=1e-4)
    assert not teacher(images).requires_grad


@pytest.mark.parametrize("size", [(SIZE, SIZE), (24, 40)], ids=["smaller", "larger"])
def test_the_teacher_sees_images_of_its_own_size(size):
    teacher = make_teacher()
    pixels = torch.randint(256, (3, 3, *size), dtype=torch.uint8)
    resized = F.interpolate(pixels.float() / 255, (2 * SIZE, 2 * SIZE), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(v)[:, None, None] for v in (teacher.trained.mean, teacher.trained.std))
    images = NormalizeAndErase(DataConfig.mean, DataConfig.std)(pixels)
    torch.testing.assert_close(teacher.preprocess(images), (resized - mean) / std, atol=1e-4, rtol=1e-4)


def test_images_of_the_same_normalization_and_size_are_not_changed():
    trained = dataclasses.replace(make_teacher().trained, mean=DataConfig.mean, std=DataConfig.std)
    names = ("red", "green", "blue", "none")
    teacher = Teacher(trained, DataConfig.mean, DataConfig.std, names, CPU.device)
    images = torch.randn(2, 3, 2 * SIZE, 2 * SIZE)
    assert teacher.preprocess(images) is images


def test_the_teacher_of_a_student_of_gray_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its pixels are normalized with the means over the channels, as the data's are."""
    gray = {"in_chans": 1, "mean": (0.5,), "std": (0.25,), "model": nn.Flatten()}
    trained = dataclasses.replace(make_teacher().trained, **gray)
    monkeypatch.setattr(distillation, "load_teacher", lambda _: trained)
    config = make_config(tmp_path, distillation="soft", distillation_temperature=3.0)
    config.model.in_chans = 1
    teacher = build_teacher(config, ("red", "green", "blue", "none"), CPU)
    pixels = torch.randint(256, (3, 1, 2 * SIZE, 2 * SIZE), dtype=torch.uint8)
    images = NormalizeAndErase(*channel_statistics(config.data, in_chans=1))(pixels)
    torch.testing.assert_close(teacher.preprocess(images), (pixels / 255 - 0.5) / 0.25)


def test_logits_of_the_teacher_are_found_by_the_names_of_the_classes():
    teacher = make_teacher()
    names = ("blue", "red", "violet", "green", "none")
    wide = TinyModel().eval()
    wide.position.data = torch.randn(8, 4, 4)
    wide.head = nn.Linear(8, 5)
    trained = dataclasses.replace(teacher.trained, model=wide, class_names=names, num_classes=5)
    matched = Teacher(trained, DataConfig.mean, DataConfig.std, ("red", "green", "blue", "none"), CPU.device)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(matched(images), wide(matched.preprocess(images))[:, [1, 3, 0, 4]])


def test_a_step_learns_from_both_losses_and_leaves_the_teacher_alone(tmp_path: Path):
    teacher = make_teacher()
    before = {name: value.clone() for name, value in teacher.trained.model.state_dict().items()}
    options: dict[str, Any] = {"distillation": "soft", "distillation_alpha": 0.4, "label_smoothing": 0.0}
    config = make_config(tmp_path, epochs=1, distillation_temperature=2.0, **options)
    model = TwoHeads()
    run(config, model, teacher=teacher)
    images, targets = make_batch(1, 16)
    start = TwoHeads()
    start.set_distilled_training()
    heads = tuple(output.detach().double().numpy() for output in start(images))
    labels = np.eye(CLASSES)[targets]
    value, _, _ = expected_loss(heads, labels, teacher(images).double().numpy(), config.schedule, np.ones(16))
    assert losses(tmp_path)[0] == pytest.approx(value, abs=1e-5)
    state = load_last(tmp_path)
    assert state["teacher_digest"] == "seed 1"
    assert state["model"].keys() == TwoHeads().state_dict().keys()
    assert not teacher.trained.model.training
    assert is_equal(before, teacher.trained.model.state_dict())
    # After the run the model returns the mean of its heads, also in train mode.
    assert model.train()(images).shape == (16, CLASSES)


@pytest.mark.parametrize("weights", ["none", [1.0, 20.0, 0.1, 5.0]])
def test_accumulation_changes_nothing(tmp_path: Path, weights: Any):
    options = {"distillation": "hard", "class_weights": weights}
    for parts in (1, 4):
        run(make_config(tmp_path / str(parts), accumulation=parts, **options), teacher=make_teacher())
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "4"), abs=1e-4)
    assert losses(tmp_path / "1") != losses(tmp_path / "4")


RESUMED: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "hard": (TinyModel, {"distillation": "hard"}),
    "token, everything": (
        TwoHeads,
        {
            "distillation": "soft",
            "distillation_temperature": 3.0,
            "precision": "float16",
            "ema_decay": 0.9,
            "accumulation": 2,
            "class_weights": "balanced",
        },
    ),
}


@pytest.mark.parametrize(("model", "options"), RESUMED.values(), ids=RESUMED)
def test_a_continued_run_is_bit_identical(tmp_path: Path, model: type[nn.Module], options: dict[str, Any]):
    full, parts = tmp_path / "full", tmp_path / "parts"
    run(make_config(full, **options), model(0.2), teacher=make_teacher())
    run(make_config(parts, **options, max_steps=STEPS + 2), model(0.2), teacher=make_teacher())
    state = load_last(parts)
    torch.rand(7)
    run(make_config(parts, **options), model(0.2), state=state, teacher=make_teacher())
    one, other = (load_last(folder) for folder in (full, parts))
    for key in ("model", "ema"):
        assert is_equal(one[key], other[key])


def test_a_run_continues_with_the_same_teacher_only(tmp_path: Path):
    config = make_config(tmp_path, distillation="hard", max_steps=7)
    run(config, teacher=make_teacher(seed=1))
    config = make_config(tmp_path, distillation="hard")
    with pytest.raises(UserError) as refusal:
        run(config, state=load_last(tmp_path), teacher=make_teacher(seed=2))
    assert str(refusal.value) == (
        f"schedule.teacher: has other weights than the teacher of the run in {tmp_path}; restore them, or "
        "name another output"
    )
    # Of a checkpoint without a teacher, as of an older version, nothing is compared.
    path = step_files(tmp_path)[0][1]
    state = read_training_state(path)
    del state["teacher_digest"]
    write_training_state(path, state)
    run(config, state=load_last(tmp_path), teacher=make_teacher(seed=2))


def test_fit_refuses_distillation_without_a_teacher(tmp_path: Path):
    with pytest.raises(UserError, match=r"^schedule\.distillation: hard needs a teacher$"):
        run(make_config(tmp_path, distillation="hard"))


def test_the_teacher_is_compiled_with_the_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compiled: list[nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda network, **_: compiled.append(network) or network)
    monkeypatch.setattr("vil.training.model_updater.check_compiler", lambda *_: None)
    teacher, model = make_teacher(), TinyModel()
    run(make_config(tmp_path, max_steps=1, distillation="hard", compile=True), model, teacher=teacher)
    assert set(compiled) == {teacher.trained.model, model}


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "resnet10t"])
def test_models_of_timm_learn_with_the_heads_that_they_have(tmp_path: Path, name: str):
    options = {"depth": 1, "img_size": 16} if name.startswith("deit") else {}
    model = timm.create_model(name, num_classes=CLASSES, **options)
    before = [head.weight.detach().clone() for head in classifiers(model)]
    config = make_config(tmp_path, max_steps=1, warmup_epochs=0, distillation="hard", distillation_alpha=1.0)
    updater = ModelUpdater(model, config, CPU, EpochSteps.constant(STEPS), teacher=make_teacher())
    images, targets = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    updater.begin_step(0)
    updater.update(0, updater.accumulate(images, targets, 0))
    # With alpha 1 the first of two heads, which learns the labels, has no gradient but its weight decay.
    decay = 1 - config.schedule.lr * config.schedule.weight_decay
    expected = [True, False] if len(before) == 2 else [False]
    found = [torch.allclose(h.weight, b * decay, atol=1e-7) for h, b in zip(classifiers(model), before)]
    assert found == expected


# --- Loading ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def timm_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a model of timm, as another program writes them."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("timm") / "resnet.pth"
    torch.save({"state_dict": timm.create_model("resnet10t", num_classes=1000).state_dict()}, path)
    return path


def test_a_run_and_a_published_checkpoint_teach():
    trained = load_teacher(ScheduleConfig(distillation="hard", teacher=str(RUN)))
    assert (trained.name, trained.image_size, trained.in_chans) == (f"{RUN} (vil)", (32, 32), 3)
    assert trained.class_names == tuple(map(str, range(10)))
    state = load_last(RUN)
    assert trained.mean == tuple(state["config"]["data"]["mean"])
    assert not any(p.requires_grad for p in trained.model.parameters())
    assert not trained.model.training
    trained = load_teacher(PUBLISHED_TEACHER)
    assert (trained.class_names, trained.num_classes, trained.image_size) == (None, 10, (64, 64))


def test_a_model_of_timm_teaches_with_weights_of_a_file(timm_file: Path):
    options = {"distillation": "soft", "teacher": "timm/resnet10t", "distillation_temperature": 3.0}
    schedule = ScheduleConfig(teacher_weights=str(timm_file), **options)
    trained = load_teacher(schedule)
    cfg = timm.models.get_pretrained_cfg("resnet10t")
    assert (trained.image_size, trained.mean, trained.std) == (cfg.input_size[1:], cfg.mean, cfg.std)
    expected = torch.load(timm_file, weights_only=True)["state_dict"]
    assert torch.equal(trained.model.state_dict()["fc.weight"], expected["fc.weight"])
    names = ("n01440764", "n01443537")  # the first two of ImageNet's 1,000
    teacher = Teacher(trained, trained.mean, trained.std, names, CPU.device)
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(teacher(images), trained.model(teacher.preprocess(images))[:, :2])
    line = "teacher: timm/resnet10t, 176×176 pixels, 5.44 M parameters, soft, alpha 0.5, temperature 3"
    assert describe_teacher(teacher, schedule) == line


def test_the_digest_is_that_of_the_weights_and_not_of_the_file(timm_file: Path, tmp_path: Path):
    weights = torch.load(timm_file, weights_only=True)["state_dict"]
    save_file({name: value.contiguous() for name, value in weights.items()}, tmp_path / "x.safetensors")
    weights["fc.bias"][0] += 1e-3
    torch.save(weights, tmp_path / "other.pth")
    digests = [
        load_teacher(
            ScheduleConfig(distillation="hard", teacher="timm/resnet10t", teacher_weights=str(file))
        ).digest
        for file in (timm_file, tmp_path / "x.safetensors", tmp_path / "other.pth")
    ]
    assert digests[0] == digests[1] != digests[2]


def test_weights_of_timm_are_downloaded_if_the_command_line_asks(monkeypatch: pytest.MonkeyPatch):
    created = []
    original = timm.create_model

    def create_model(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        created.append(pretrained)
        return original(name, **options)

    monkeypatch.setattr(timm, "create_model", create_model)
    schedule = ScheduleConfig(distillation="hard", teacher="timm/resnet10t", teacher_weights="pretrained")
    trained = load_teacher(schedule)
    assert True in created
    assert (trained.name, trained.num_classes, trained.class_names) == ("timm/resnet10t", 1000, None)


def test_a_file_cannot_ask_for_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text("schedule: {teacher: timm/resnet10t, teacher_weights: pretrained}")
    with pytest.raises(UserError) as refusal:
        resolve_train_command(["--config", "x.yaml"])
    assert str(refusal.value) == (
        "x.yaml: schedule.teacher_weights: a file cannot set this option; use --schedule.teacher_weights on "
        "the command line, or delete it there"
    )
    # Nor can the stored configuration of a run, which may be a stranger's.
    Path("run").mkdir()
    Path("run/config.yaml").write_text(
        "schedule: {distillation: hard, teacher: timm/resnet10t, teacher_weights: pretrained}"
    )
    schedule = resolve_train_command(["--output", "run"]).config.schedule
    assert (schedule.teacher, schedule.teacher_weights) == ("timm/resnet10t", None)
    given = ["--schedule.teacher", "timm/resnet10t", "--schedule.teacher_weights", "pretrained"]
    assert resolve_train_command(given).config.schedule.teacher_weights == "pretrained"


TIMM = {"distillation": "hard", "teacher": "timm/resnet10t"}
REFUSALS: dict[str, tuple[dict[str, str], str]] = {
    "no teacher": ({"distillation": "soft"}, "schedule.teacher: is needed for schedule.distillation soft"),
    "no distillation": (
        {"teacher": "runs/x"},
        "schedule.teacher: requires schedule.distillation soft or hard",
    ),
    "weights without distillation": (
        {"teacher_weights": "x.pth"},
        "schedule.teacher_weights: requires schedule.distillation soft or hard",
    ),
    "weight without distillation": (
        {"distillation_alpha": 0.9},
        "schedule.distillation_alpha: requires schedule.distillation soft or hard",
    ),
    "temperature of hard labels": (
        {"distillation": "hard", "teacher": "runs/x", "distillation_temperature": 3.0},
        "schedule.distillation_temperature: requires schedule.distillation soft",
    ),
    "missing": (
        {"distillation": "hard", "teacher": "no/run"},
        "schedule.teacher: no/run: no such file or folder",
    ),
    "timm without weights": (
        TIMM,
        "schedule.teacher_weights: is needed for timm/resnet10t: a file, or pretrained on the command line",
    ),
    "timm with a published configuration": (
        {**TIMM, "teacher_weights": "x.pth", "teacher_released_config": "x.yaml"},
        "schedule.teacher_released_config: is not for a teacher timm/<name>",
    ),
    "missing weights": (
        {**TIMM, "teacher_weights": "x.pth"},
        "schedule.teacher_weights: x.pth: no such file or folder",
    ),
    "weights of another model": (
        {**TIMM, "teacher_weights": str(RUN)},
        f"schedule.teacher_weights: {RUN}/checkpoints/best.pt: holds a model vil, not timm/resnet10t",
    ),
    "weights for a run": (
        {"distillation": "hard", "teacher": str(RUN), "teacher_weights": "x.pth"},
        f"schedule.teacher_weights: is for a teacher timm/<name>, not for {RUN}",
    ),
    "missing configuration": (
        {"distillation": "hard", "teacher": str(RUN), "teacher_released_config": "x.yaml"},
        "schedule.teacher_released_config: x.yaml: no such file",
    ),
    "unknown model of timm": (
        {**TIMM, "teacher": "timm/resnet10", "teacher_weights": "pretrained"},
        "schedule.teacher: name: timm has no model 'resnet10'; did you mean timm/resnet10t?",
    ),
    "no model": (
        {"distillation": "hard", "teacher": str(PUBLISHED / "model_best.pth")},
        f"schedule.teacher: {PUBLISHED}/model_best.pth: does not describe its model; add the configuration "
        "published with it, or name the model: schedule.teacher_released_config, or timm/<name>",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(options: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    config = make_config(tmp_path, **options)
    with pytest.raises(UserError) as refusal:
        build_teacher(config, ("a", "b"), CPU)
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("class_names", "in_chans", "message"),
    [
        (
            ("0", "eleven"),
            3,
            "schedule.teacher: class 'eleven' is not among the 10 that the checkpoint was trained on, "
            "1 of 2 are",
        ),
        (
            ("cat", "dog"),
            3,
            "schedule.teacher: the checkpoint was trained on none of its classes ('cat', ...) but on "
            "'0', ...",
        ),
        (tuple("0123456789"), 1, "schedule.teacher: is for images of 3 channels, the data has 1"),
    ],
)
def test_classes_and_channels_that_the_teacher_lacks(
    class_names: tuple[str, ...], in_chans: int, message: str, tmp_path: Path
):
    config = make_config(tmp_path, distillation="hard", teacher=str(RUN))
    config.model.in_chans = in_chans
    with pytest.raises(UserError) as refusal:
        build_teacher(config, class_names, CPU)
    assert str(refusal.value) == message


def test_classes_without_names_cannot_be_matched():
    trained = load_teacher(PUBLISHED_TEACHER)
    with pytest.raises(UserError) as refusal:
        Teacher(trained, trained.mean, trained.std, ("cat", "dog"), CPU.device)
    assert str(refusal.value) == "schedule.teacher: no class names to find the row of the head for 'cat'"


def test_classes_that_are_numbers_are_not_matched_with_more_classes():
    trained = dataclasses.replace(make_teacher().trained, class_names=None, num_classes=1000)
    with pytest.raises(UserError) as refusal:
        Teacher(trained, trained.mean, trained.std, tuple("0123"), CPU.device)
    reason = "has 1000 classes without names, which cannot be matched with numbers"
    assert str(refusal.value) == f"schedule.teacher: {reason}"


def test_logits_of_the_teacher_beyond_its_classes_are_left_out():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * SIZE * SIZE, CLASSES + 6))
    trained = dataclasses.replace(make_teacher().trained, model=model, num_classes=CLASSES + 6)
    teacher = Teacher(trained, trained.mean, trained.std, trained.class_names, CPU.device)
    images = torch.randn(2, 3, 2 * SIZE, 2 * SIZE)
    assert torch.equal(teacher(images), model(images)[:, :CLASSES])


@pytest.mark.parametrize("option", ["distillation_alpha=1.5", "distillation_temperature=0"])
def test_ranges(option: str):
    with pytest.raises(UserError, match=rf"schedule\.{option.partition('=')[0]}: expected a number from 0"):
        resolve_train_command([f"--schedule.{option}"])


# --- Programs -----------------------------------------------------------------------------------------------

OPTIONS = (
    *("--data.source", "digits", "--data.images_per_class", "8", "--data.workers", "0", "--device", "cpu"),
    *("--schedule.batch_size", "16", "--schedule.epochs", "2", "--model.blocks", "[1,1,1]"),
    *(
        "--progress",
        "false",
        "--loggers",
        "[]",
        "--schedule.distillation",
        "hard",
        "--schedule.teacher",
        "old",
    ),
)


def test_a_distilled_run_by_train_py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Train a model with a distillation token, continue from another folder, compare learning rates."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(RUN, "old")
    token = ("--model.distillation_token", "true", "--output", "run")
    program.main([*OPTIONS, *token, "--schedule.max_steps", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert "teacher: old (vil), 32×32 pixels, 0.01 M parameters, hard, alpha 0.5" in lines
    assert yaml.safe_load(Path("run/config.yaml").read_text())["schedule"]["teacher"] == str(tmp_path / "old")
    digest = read_training_state(step_files(Path("run"))[0][1])["teacher_digest"]
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    program.main(["--output", "../run", "--schedule.max_steps", "8"])
    state = read_training_state(step_files(Path("../run"))[0][1])
    assert (state["step"], state["teacher_digest"]) == (8, digest)
    (result,) = json.loads(Path("../run/summary.json").read_text())
    assert result["train_memory_mb"] > 0  # measured in train mode, after the run
    monkeypatch.chdir(tmp_path)
    with_teacher = range_test(resolve_train_command(OPTIONS).config, CPU, [1e-3, 1e-2])
    without = range_test(resolve_train_command(OPTIONS[:-4]).config, CPU, [1e-3, 1e-2])
    assert with_teacher[0].loss != without[0].loss
