"""eval.py with a small model on the digits: command lines, several checkpoints and data sets, errors."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import multiprocessing
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import forked
from PIL import Image
from torch import nn
from torchvision import transforms
from torchvision.transforms.functional import to_tensor

import eval as program
from data import build_validation
from data.sources.digits import Digits
from tools.programs import probe
from vil.checkpoints.checkpoint_files import BEST, step_file
from vil.checkpoints.training_state import library_versions, write_training_state
from vil.config import DataConfig, EvalConfig, ModelConfig, StageConfig, TrainConfig
from vil.errors import UserError
from vil.evaluation import cost
from vil.evaluation.accuracy import EvaluationDataset, EvaluationOptions, EvaluationResult, evaluate
from vil.evaluation.report import Result
from vil.models.multiscale_vit import MultiScaleViT
from vil.models.zoo import model_from_config
from vil.runtime import consistency
from vil.runtime.distributed import Process

ROOT = Path(program.__file__).parent
CPU = torch.device("cpu")
STAGE = StageConfig(dim=16, heads=2, patch=8, attention="full")
MODEL = ModelConfig(name="vil", image_size=32, num_classes=10, stages=[STAGE])
QUIET = ["--progress", "false", "--device", "cpu"]
DATA = DataConfig(workers=0, mean=(0.3, 0.3, 0.3), std=(0.4, 0.4, 0.4))


@cache
def weights(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model = model_from_config(MODEL)
    return {name: value + 0.2 * torch.randn(value.shape) for name, value in model.state_dict().items()}


def make_run(folder: Path, **changes: Any) -> Path:
    """Write the folder of a run: best.pt with raw (seed 1) and ema (2), the last checkpoint with raw (3)."""
    (folder / "checkpoints").mkdir(parents=True)
    state = {
        "model": weights(1),
        "ema": weights(2),
        "optimizer": {},
        "scaler": {},
        "step": 5,
        "finished_step": 5,
        "watched": {"skipped": 0, "skipped_in_a_row": 0, "losses": []},
        "epoch": 1,
        "best": {"top1": 1.0, "weights": "ema", "epoch": 1},
        "config": dataclasses.asdict(TrainConfig(model=copy.deepcopy(MODEL), data=DATA)),
        "class_names": list("0123456789"),
        "versions": library_versions(),
    }
    write_training_state(folder / BEST, {**state, **changes})
    write_training_state(step_file(folder, 5), {**state, "model": weights(3), "ema": None, "best": None})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture(autouse=True)
def measure_speed_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "SPEED_SECONDS", 0.0)


def results(argv: list[str], folder: Path) -> list[Result]:
    program.main([*argv, "--json", str(folder / "out.json"), *QUIET])
    return json.loads((folder / "out.json").read_text())


def error_of(argv: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        program.main([*argv, *QUIET])
    return str(caught.value).removeprefix("command line: ")


def evaluate_data(model: nn.Module, data: DataConfig) -> EvaluationResult:
    config = EvalConfig(model=ModelConfig(image_size=32), data=data)
    images = build_validation(config, Process(0, 0, 1, CPU))
    dataset = EvaluationDataset(images.name, images.loader, images.class_names)
    return evaluate(model, dataset, EvaluationOptions(CPU, "float32"))


@cache
def expected(seed: int) -> Result:
    """Return the metrics of the weights of a seed, computed without eval.py."""
    model = model_from_config(MODEL)
    model.load_state_dict(weights(seed))
    found = evaluate_data(model, DATA)
    return {**found.values, "images": found.images, "unreadable": found.unreadable}


def test_a_run_folder_gives_its_best_weights_on_its_data(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (result,) = results(["--checkpoint", str(run)], tmp_path)
    assert {key: result[key] for key in expected(2)} == expected(2)
    assert result["images"] == sum(row["images"] for row in result["per_class"]) == 360
    assert (result["weights"], result["data"], result["model"]) == ("ema", "digits", "vil")
    assert result["checkpoint"] == str(run / "checkpoints/best.pt")
    assert (result["precision"], result["image_size"], result["device"]) == ("float32", 32, "cpu")
    screen = capsys.readouterr().out
    assert f"{result['top1']:.2f}" in screen
    assert "counted bytes" in screen


def test_csv_files_and_a_narrow_terminal(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    paths = {key: tmp_path / f"{key}.csv" for key in ("csv", "per_class_csv", "confusion_csv")}
    files = [word for key, path in paths.items() for word in (f"--{key}", str(path))]
    (result,) = results(["--checkpoint", str(run), *files], tmp_path)
    rows = {}
    for key, path in paths.items():
        with path.open(newline="") as file:
            rows[key] = list(csv.DictReader(file))
    assert [row["top1"] for row in rows["csv"]] == [str(result["top1"])]
    assert [row["class"] for row in rows["per_class_csv"]] == list("0123456789")
    assert [float(row["f1"]) for row in rows["per_class_csv"]] == [row["f1"] for row in result["per_class"]]
    assert sum(int(row[row["class"]]) for row in rows["confusion_csv"]) == round(3.6 * result["top1"])
    assert f"Top-1 %              {result['top1']:.2f}" in capsys.readouterr().out.splitlines()


def test_outputs_that_cannot_be_written(run: Path, tmp_path: Path) -> None:
    best, file = ["--checkpoint", str(run)], str(tmp_path / "x.csv")
    source = tmp_path / "data.yaml"
    source.write_text("source: digits\n")
    for argv, message in (
        (
            [*best, str(run), "--datasets", str(tmp_path), str(source), "--confusion_csv", file],
            "confusion_csv: requires a single checkpoint and data set, got 4 combinations",
        ),
        (
            [*RESNET, "--complexity", "--per_class_csv", file],
            "per_class_csv: requires images; complexity evaluates none",
        ),
        (
            [*RESNET, "--complexity", "--confusion_csv", file],
            "confusion_csv: requires images; complexity evaluates none",
        ),
        (
            [*best, "--json", file, "--csv", f"{tmp_path}/./x.csv"],
            f"csv: {tmp_path}/./x.csv is the output of json too; name another file",
        ),
        ([*best, "--csv", str(tmp_path)], f"csv: {tmp_path} cannot be written: Is a directory"),
        (
            [*best, "--data", str(source), "--per_class_csv", str(source)],
            f"per_class_csv: {source} is an input of this command; name another file",
        ),
    ):
        assert error_of(argv) == message
    assert not Path(file).exists()
    for key in ("csv", "per_class_csv", "confusion_csv"):
        config = tmp_path / "config.yaml"
        config.write_text(f"{key}: {file}\n")
        reason = f"a file cannot set this option; use --{key} on the command line, or delete it there"
        assert error_of([*best, "--config", str(config)]) == f"{config}: {key}: {reason}"


def test_several_checkpoints_and_a_choice_of_weights(run: Path, tmp_path: Path) -> None:
    best, last = str(run), str(run / "checkpoints/step_00000005.pt")
    raw = results(["--checkpoint", best, last, "--weights", "raw"], tmp_path)
    assert [result["loss"] for result in raw] == [expected(1)["loss"], expected(3)["loss"]]
    (newest,) = results(["--checkpoint", best, "--run_checkpoint", "last"], tmp_path)
    assert (newest["loss"], newest["weights"]) == (expected(3)["loss"], "raw")
    assert len({expected(seed)["loss"] for seed in (1, 2, 3)}) == 3
    file = str(run / "checkpoints/best.pt")  # of which `last` chooses nothing
    both = results(["--checkpoint", best, file, "--run_checkpoint", "last", "--weights", "raw"], tmp_path)
    assert [result["loss"] for result in both] == [expected(3)["loss"], expected(1)["loss"]]


def test_the_transform_of_a_checkpoint_overrides_files_but_not_options(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = ["--data", str(ROOT / "configs/data/digits.yaml")]  # has another mean
    with caplog.at_level("INFO", logger="vil.eval"):
        (same,) = results(["--checkpoint", str(run), *file], tmp_path)
    message = f"data.mean: (0.3, 0.3, 0.3), required by the weights, overrides {file[1]}"
    assert message in [text.replace("[", "(").replace("]", ")") for text in caplog.messages]
    (other,) = results(["--checkpoint", str(run), *file, "--data.mean", "[0.9, 0.9, 0.9]"], tmp_path)
    assert same["loss"] == expected(2)["loss"] != other["loss"]
    (changed,) = results(["--checkpoint", str(run), "--complexity", "--model.pool", "cls"], tmp_path)
    assert (changed["top1"], changed["weights"]) == (None, "ema")


RESNET = ["--model.name", "timm/test_resnet", "--model.image_size", "32"]


@pytest.mark.parametrize(
    ("argv", "params"),
    [
        (
            ["--model", "configs/models/deit_tiny_patch16.yaml", "--model.image_size", "32"],
            5_717_416 - 192 * 192,
        ),
        (RESNET, 469_688),
        ([*RESNET, "--model.num_classes", "10"], 373_658),
    ],
)
def test_complexity_without_data(
    argv: list[str], params: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    (result,) = results([*argv, "--complexity"], tmp_path)
    assert result["params"] == params
    assert (result["images"], result["weights"], result["data"]) == (None, "untrained", None)
    assert min(result[key] for key in ("flops", "train_memory_mb", "eval_memory_mb", "images_per_second")) > 0


def test_an_untrained_model_has_the_classes_of_the_data_and_is_reproducible(tmp_path: Path) -> None:
    first, second = (results([*RESNET, "--data.workers", "0"], tmp_path)[0] for _ in range(2))
    assert (first["images"], first["loss"]) == (360, second["loss"])
    assert first["params"] == 373_658  # of ten classes


def test_errors_of_the_command_line(run: Path, tmp_path: Path) -> None:
    best, file = ["--checkpoint", str(run)], run / "checkpoints/step_00000005.pt"
    text = tmp_path / "text.pt"
    text.write_text("not a checkpoint")
    nothing = "nothing to evaluate: give --checkpoint RUN, --model FILE or --model.name"
    no_ema = "weights: the checkpoint has no ema weights: its run had no schedule.ema_decay; use raw"
    for argv, message in (
        ([], f"checkpoint: {nothing}"),
        (["--checkpoint", "nowhere"], "checkpoint: nowhere: no such file or folder"),
        ([*best, "nowhere"], "checkpoint: nowhere: no such file or folder"),
        (["--checkpoint", str(tmp_path)], f"checkpoint: {tmp_path}: the folder holds no checkpoints/best.pt"),
        (
            ["--checkpoint", str(text)],
            f"checkpoint: {text}: not a checkpoint: neither a zip, a pickle nor safetensors",
        ),
        ([*best, "--run_checkpoint", "last", "--weights", "ema"], f"checkpoint: {no_ema}"),
        (
            ["--checkpoint", str(file), "--run_checkpoint", "last"],
            f"checkpoint: {file}: is a file; run_checkpoint chooses among the checkpoints of a run's folder",
        ),
        (["--model.name", "vil_tny"], "model.name: there is no model 'vil_tny'; did you mean vil_tiny?"),
        (["--checkpoints", str(run)], "--checkpoints: unknown option; did you mean --checkpoint?"),
        ([*best, "--batch_size", "0"], "batch_size: expected an integer of at least 1, got 0"),
        ([*best, "--json", str(tmp_path)], f"json: {tmp_path} cannot be written: Is a directory"),
        ([*best, "--datasets", "[]"], "datasets: expected at least one folder or YAML file"),
        (
            [*best, "--datasets", str(tmp_path / "none")],
            f"datasets: {tmp_path / 'none'}: No such file or directory",
        ),
        ([*best, "--datasets", "none.yaml"], "--data: none.yaml: no such file"),
    ):
        assert error_of(argv) == message
    other = ["--model", str(ROOT / "configs/models/vil_32.yaml")]
    assert "does not fit the model, it is of another architecture; " in error_of([*best, *other])
    tokens = ["--model.global_tokens", "3"]
    assert "does not fit the model, it is of another size; " in error_of([*best, *tokens])
    assert "no class folders in it" in error_of([*best, "--datasets", str(run / "checkpoints")])


def test_data_with_other_classes(run: Path, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "val" / name / "1.png")
    folder = ["--data.source", "folder", "--data.root", str(tmp_path), "--data.workers", "0"]
    reason = "the checkpoint was trained on none of its classes ('cat', ...) but on '0', ...; "
    reason += "--match_classes position takes class k for row k"
    message = error_of(["--checkpoint", str(run), *folder])
    assert message == f"data.source: {tmp_path / 'val'}: {reason}"
    (found,) = results(["--checkpoint", str(run), *folder, "--match_classes", "position"], tmp_path)
    assert (found["images"], found["classes"]) == (2, 2)
    reordered = make_run(tmp_path / "reordered", class_names=list("1023456789"))
    reason = "the classes are in another order: class 0 is '0' in the data, '1' in the checkpoint"
    assert error_of(["--checkpoint", str(reordered)]).endswith(f"data.source: digits: {reason}")


def test_test_time_augmentation(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--checkpoint", str(run), "--data.crop_pct", "0.8"]
    (plain,) = results(argv, tmp_path)
    views = ["--tta", "ten_crop", "--tta_scales", "1.0", "1.1"]
    (found,) = results([*argv, *views, "--csv", str(tmp_path / "x.csv")], tmp_path)
    assert (found["images"], found["views"], found["tta"]) == (360, 20, "ten_crop, scales 1 1.1")
    assert found["flops"] == 20 * plain["flops"]
    assert found["loss"] != plain["loss"]
    assert next(csv.DictReader((tmp_path / "x.csv").open()))["views"] == "20"
    # Computed from the images, view by view.
    model = model_from_config(MODEL)
    model.load_state_dict(weights(2))
    model.eval()
    source, logits = Digits("val", "RGB"), torch.zeros(360, 10, dtype=torch.float64)
    for scale in (1.0, 1.1):
        side = int(32 / (0.8 / scale))
        digits = [
            source.load(index)[0].resize((side, side), Image.Resampling.BICUBIC) for index in range(360)
        ]
        crops = [transforms.TenCrop(32)(digit) for digit in digits]
        for view in range(10):
            pixels = torch.stack([to_tensor(views_of_one[view]) for views_of_one in crops])
            with torch.no_grad():
                logits += model((pixels - 0.3) / 0.4).double() / 20
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(source.targets))
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-4)
    message = "tta_scales: 0.7 is less than data.crop_pct, 0.8: the crop would be larger than the image"
    assert error_of([*argv, "--tta_scales", "0.7"]) == message
    assert error_of([*argv, "--tta_scales", "[]"]).startswith(
        "tta_scales: expected a list of numbers from 0.1"
    )


def save_digits(root: Path, classes: str) -> Path:
    """Save the validation digits of some classes as images, in one folder per class."""
    source = Digits("val", "RGB")
    for index in range(len(source)):
        image, target = source.load(index)
        if str(target) in classes:
            (root / str(target)).mkdir(parents=True, exist_ok=True)
            image.save(root / str(target) / f"{index}.png")
    return root


class Columns(nn.Module):
    def __init__(self, columns: list[int]) -> None:
        super().__init__()
        self.columns = columns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, self.columns]


def test_several_data_sets_in_one_table(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everything, part = save_digits(tmp_path / "all", "0123456789"), save_digits(tmp_path / "part", "247")
    file = tmp_path / "other.yaml"
    file.write_text(f"source: folder\nroot: {tmp_path}\nval_split: part\nmean: [0.9, 0.9, 0.9]\n")
    argv = ["--checkpoint", str(run), str(run / "checkpoints/step_00000005.pt"), "--data.workers", "0"]
    found = results([*argv, "--datasets", str(everything), str(part), str(file)], tmp_path)
    assert [result["data"] for result in found] == [str(everything), str(part), str(part)] * 2
    files = ["best.pt"] * 3 + ["step_00000005.pt"] * 3
    assert [result["checkpoint"] for result in found] == [str(run / "checkpoints" / name) for name in files]
    assert {key: found[0][key] for key in expected(2)} == pytest.approx(expected(2))
    assert found[1]["loss"] == found[2]["loss"]  # the mean is that of the checkpoint
    assert len({result["images_per_second"] for result in found}) == 2  # measured once per checkpoint
    screen = capsys.readouterr().out.splitlines()
    assert sum("part" in line for line in screen) == 4
    assert "ECE %" in screen[0]

    # On the data set with three classes, three logits are compared.
    model = model_from_config(MODEL)
    model.load_state_dict(weights(2))
    data = dataclasses.replace(DATA, source="folder", root=str(part), val_split=".")
    alone = evaluate_data(nn.Sequential(model, Columns([2, 4, 7])), data)
    assert (found[1]["classes"], found[1]["images"]) == (3, alone.images)
    assert {key: found[1][key] for key in alone.values} == pytest.approx(dict(alone.values))
    assert found[1]["top5"] == 100


def test_workers_of_a_data_set_end_before_those_of_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the classes is named train, which must not be used as the training split."""
    for name in ("train/a.png", "bus/b.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "set" / name)
    alive, others = [], set(multiprocessing.active_children())  # of other tests in this process

    def evaluate_and_count(*args: Any, **options: Any) -> EvaluationResult:
        result = evaluate(*args, **options)
        alive.append(len(set(multiprocessing.active_children()) - others))
        return result

    monkeypatch.setattr(program.report, "evaluate", evaluate_and_count)
    argv = [*RESNET, "--model.num_classes", "2", "--data.workers", "1", *QUIET]
    program.main([*argv, "--datasets", *[str(tmp_path / "set")] * 3])
    assert alive == [1, 1, 1]


def test_real_labels_are_for_imagenets_own_images(tmp_path: Path) -> None:
    for index, name in enumerate(("n01440764", "n01443537")):
        for folder, stem in (("val", f"ILSVRC2012_val_{index + 1:08d}"), ("sketch", "sketch_1")):
            (tmp_path / folder / name).mkdir(parents=True)
            Image.new("RGB", (40, 40), (90 * index, 0, 0)).save(tmp_path / folder / name / f"{stem}.JPEG")
    (tmp_path / "real.json").write_text("[[0, 1], []]")
    argv = [*RESNET, "--model.num_classes", "1000", "--data.workers", "0"]
    argv += ["--data.real_labels", str(tmp_path / "real.json"), "--datasets"]
    first, second = results([*argv, str(tmp_path / "val"), str(tmp_path / "sketch")], tmp_path)
    assert (first["real_top1"], first["classes"]) == (100, 2)
    assert second["real_top1"] is None
    assert "sketch_1.JPEG" in error_of([*argv, str(tmp_path / "sketch")])


def test_ranks_compare_images_and_real_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "val" / "n01440764").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "val" / "n01440764" / "ILSVRC2012_val_00000001.JPEG")
    compared: list[tuple[str, Mapping[str, str]]] = []
    monkeypatch.setattr(consistency, "check_data", lambda key, describe: compared.append((key, describe())))
    labels = tmp_path / "real.json"
    argv = [*RESNET, "--model.num_classes", "1000", "--data.workers", "0"]
    argv += ["--datasets", str(tmp_path / "val")]
    for content in ("[[0, 1]]", "[ [0, 1, 1] ]", "[[0]]"):
        labels.write_text(content)
        program.main([*argv, "--data.real_labels", str(labels), *QUIET])
    assert [key for key, _ in compared] == ["data.root", "data.real_labels", "model"] * 3
    images, first, _, _, equal, _, _, other, _ = (described for _, described in compared)
    assert images["images in data set 1"] == "1"
    assert first == equal != other


def test_a_stored_configuration_with_an_unknown_key(tmp_path: Path) -> None:
    config = dataclasses.asdict(TrainConfig(model=MODEL, data=DATA))
    config["model"]["depth"] = 3
    run = make_run(tmp_path / "odd", config=config)
    assert "stored configuration: model.depth: unknown key" in error_of(["--checkpoint", str(run)])


def test_a_mistyped_option_ends_the_program_with_one_line_and_status_2() -> None:
    argv = [forked.python(), "eval.py", "--checkpoit", "nowhere"]
    ended = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stdout) == (2, "")
    message = "error: command line: --checkpoit: unknown option; did you mean --checkpoint?"
    assert ended.stderr.splitlines() == [message]


def test_a_checkpoint_of_timm_with_a_named_model(tmp_path: Path) -> None:
    """The head has the rows of the weights, and the transform is that of timm's pretrained_cfg."""
    name, path = "test_vit", tmp_path / "x.pth"
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=12, img_size=32).eval()
    torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, path)
    argv = ["--checkpoint", str(path), "--model.name", f"timm/{name}", "--model.image_size", "32"]
    argv += ["--data.workers", "0"]
    (found,) = results(argv, tmp_path)
    assert (found["model"], found["images"], found["weights"]) == (f"timm/{name}", 360, "raw")
    same = ["--data.mean", "[0.5, 0.5, 0.5]", "--data.std", "[0.5, 0.5, 0.5]", "--data.crop_pct", "0.95"]
    assert found["loss"] == results([*argv, *same], tmp_path)[0]["loss"]
    assert found["loss"] != results([*argv, "--data.mean", "[0.4, 0.5, 0.5]"], tmp_path)[0]["loss"]
    assert "does not describe its model" in error_of(["--checkpoint", str(path)])


HEADLESS = ": the model has no classifier (0 classes): its output is features, not classes"


def test_features_are_no_logits(run: Path, tmp_path: Path) -> None:
    """A model without a head would have a Top-1 whose classes are channels."""
    best = ["--checkpoint", str(run)]
    assert error_of([*best, "--model.num_classes", "0"]).endswith(HEADLESS)
    config = dataclasses.asdict(TrainConfig(model=dataclasses.replace(MODEL, num_classes=0), data=DATA))
    headless = ["--checkpoint", str(make_run(tmp_path / "headless", config=config))]
    assert error_of(headless).endswith(HEADLESS)
    (found,) = results([*headless, "--complexity"], tmp_path)
    assert found["params"] == sum(value.numel() for value in weights(1).values()) - 10 * 17
    argv = ["--model", str(ROOT / "configs/models/vil_32.yaml"), "--model.num_classes", "0"]
    assert error_of(argv).endswith(HEADLESS)


def test_options_that_need_images_are_refused_without_any(run: Path) -> None:
    argv = ["--checkpoint", str(run), "--complexity"]
    images = {"datasets": "none", "match_classes": "position", "data.real_labels": "none"}
    for option, value in {**images, "tta": "hflip", "tta_scales": "1.2"}.items():
        message = f"{option}: requires images; complexity evaluates none"
        assert error_of([*argv, f"--{option}", value]) == message


def forward_passes(argv: list[str], folder: Path) -> set[tuple[int, torch.dtype, bool]]:
    """Return batch sizes, precisions and orders of channels of the forward passes of eval.py."""
    found = set()

    def record(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if isinstance(module, MultiScaleViT) and len(inputs[0]) > 16:  # fewer measure memory and speed
            channels_last = inputs[0].is_contiguous(memory_format=torch.channels_last)
            found.add((len(inputs[0]), output.dtype, channels_last))

    with torch.nn.modules.module.register_module_forward_hook(record):
        results(argv, folder)
    return found


def test_options_of_the_forward_pass_reach_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--checkpoint", str(run), "--batch_size", "120"]
    assert forward_passes(argv, tmp_path) == {(120, torch.float32, False)}
    assert forward_passes([*argv, "--batch_size", "180"], tmp_path) == {(180, torch.float32, False)}
    assert forward_passes([*argv, "--channels_last", "true"], tmp_path) == {(120, torch.float32, True)}
    assert forward_passes([*argv, "--precision", "bfloat16"], tmp_path) == {(120, torch.bfloat16, False)}
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    monkeypatch.setattr("vil.evaluation.report.check_compiler", lambda _: None)
    assert forward_passes(argv, tmp_path)
    assert not compiled
    assert forward_passes([*argv, "--compile", "true"], tmp_path)
    assert [type(model) for model in compiled] == [MultiScaleViT]


def test_files_that_a_run_names_are_not_replaced(tmp_path: Path) -> None:
    file = tmp_path / "labels.json"
    file.write_text("[]")
    config = TrainConfig(model=MODEL, data=dataclasses.replace(DATA, real_labels=str(file)))
    run = str(make_run(tmp_path / "run", config=dataclasses.asdict(config)))
    refusal = f"{file} is an input of this command; name another file"
    assert error_of(["--checkpoint", run, "--json", str(file)]) == f"json: {refusal}"
    with pytest.raises(UserError, match=f"^--json: {refusal}$"):
        probe.main([run, "--json", str(file)])
    assert file.read_text() == "[]"


def test_an_output_without_a_name_is_refused(run: Path) -> None:
    for option in ("json", "csv", "per_class_csv", "confusion_csv"):
        message = error_of(["--checkpoint", str(run), f"--{option}", ""])
        assert message == f"{option}: expected the name of a file, got ''"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{global_pool: ''}", "timm_options: timm/resnet10t cannot compute images of 32×32 pixels: "),
        ("{num_classes: 7}", "timm_options: num_classes: set model.num_classes instead"),
        ("{in_chans: 1}", "timm_options: in_chans: set model.in_chans instead"),
        ("{features_only: true}", "timm_options: features_only: the model would have no classes"),
        ("{drop_rate: 2}", "timm_options: drop_rate: expected a number from 0 to 1"),
        ("{stem_width: 0}", "timm_options: timm/resnet10t cannot compute images of 32×32 pixels: "),
    ],
)
def test_models_of_timm_without_logits_are_refused(options: str, message: str) -> None:
    argv = ["--model.name", "timm/resnet10t", "--model.image_size", "32", "--data.source", "digits"]
    assert error_of([*argv, "--model.timm_options", options]).startswith(f"model.{message}")


def test_a_rate_of_growth_is_no_probability() -> None:
    config = ModelConfig("timm/densenet121", num_classes=2, timm_options={"growth_rate": 4, "drop_rate": 0.5})
    assert model_from_config(config).num_features == 128


def test_images_that_a_model_of_timm_cannot_compute_are_refused() -> None:
    argv = ["--model.name", "timm/inception_v3", "--model.image_size", "32", "--data.source", "digits"]
    message = error_of(argv)
    assert message.startswith("model.name: timm/inception_v3 cannot compute images of 32×32 pixels: ")
