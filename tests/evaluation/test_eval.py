"""eval.py: what it makes of its command line, with a small model on the digits, and how it refuses."""

from __future__ import annotations

import copy
import dataclasses
import json
import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import eval as program
from data import build_validation
from data.sources.digits import Digits
from vil.checkpoint_files import BEST, step_file
from vil.config import ConfigError, DataConfig, ModelConfig, StageConfig, TrainConfig
from vil.evaluation.accuracy import evaluate
from vil.models.zoo import model_from_config
from vil.training import checkpoint

ROOT = Path(program.__file__).parent
CPU = torch.device("cpu")
STAGE = StageConfig(dim=16, heads=2, patch=8, attention="full")
MODEL = ModelConfig(name="vil", image_size=32, num_classes=10, stages=[STAGE])
DATA = DataConfig(workers=0, mean=(0.3, 0.3, 0.3), std=(0.4, 0.4, 0.4))


def weights(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model = model_from_config(MODEL)
    return {name: value + 0.2 * torch.randn(value.shape) for name, value in model.state_dict().items()}


def make_run(folder: Path, **changes: Any) -> Path:
    """A run's folder as train.py leaves it: best.pt with raw (seed 1) and ema (2), the last with raw (3)."""
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
        "versions": checkpoint.versions(),
    }
    checkpoint.save(folder / BEST, {**state, **changes})
    checkpoint.save(step_file(folder, 5), {**state, "model": weights(3), "ema": None, "best": None})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "digits")


def results(words: list[str], folder: Path) -> list[dict[str, Any]]:
    program.evaluate([*words, "--json", str(folder / "out.json"), "--progress", "false", "--device", "cpu"])
    return json.loads((folder / "out.json").read_text())


def expected(seed: int) -> dict[str, Any]:
    """Accuracy of the weights of a seed, found without eval.py."""
    model = model_from_config(MODEL)
    model.load_state_dict(weights(seed))
    images = build_validation(DATA, image_size=32, in_chans=3, batch_size=128).loader
    return dataclasses.asdict(evaluate(model, images, device=CPU, precision="float32"))


def test_a_runs_folder_gives_its_best_weights_on_its_data(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (result,) = results(["--checkpoint", str(run)], tmp_path)
    assert {key: result[key] for key in expected(2)} == expected(2)
    assert result["images"] == 360
    assert (result["weights"], result["data"], result["model"]) == ("ema", "digits", "vil")
    assert result["checkpoint"] == str(run / "checkpoints/best.pt")
    assert (result["precision"], result["image_size"], result["device"]) == ("float32", 32, "cpu")
    screen = capsys.readouterr().out
    assert f"{result['top1']:.2f}" in screen
    assert "counted bytes" in screen


def test_several_checkpoints_and_a_choice_of_weights(run: Path, tmp_path: Path) -> None:
    best, last = str(run), str(run / "checkpoints/step_00000005.pt")
    raw = results(["--checkpoint", best, last, "--weights", "raw"], tmp_path)
    assert [r["top1"] for r in raw] == [expected(1)["top1"], expected(3)["top1"]]
    (again,) = results(["--checkpoint", best, "--which", "last"], tmp_path)
    assert (again["loss"], again["weights"]) == (expected(3)["loss"], "raw")
    assert len({expected(seed)["loss"] for seed in (1, 2, 3)}) == 3


def test_the_line_goes_over_what_the_checkpoint_brings(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = ["--data", str(ROOT / "configs/data/digits.yaml")]  # of another mean, which belongs to the weights
    with caplog.at_level("INFO", logger="vil.eval"):
        (same,) = results(["--checkpoint", str(run), *file], tmp_path)
    assert f"as the weights need it, not of {file[1]}" in caplog.text
    (other,) = results(["--checkpoint", str(run), *file, "--data.mean", "[0.9, 0.9, 0.9]"], tmp_path)
    (larger,) = results(["--checkpoint", str(run), "--complexity", "--model.pool", "cls"], tmp_path)
    assert same["loss"] == expected(2)["loss"] != other["loss"]
    assert larger["top1"] is None
    assert larger["weights"] == "ema"


@pytest.mark.parametrize(
    ("words", "params"),
    [
        (["--model", "configs/models/deit_tiny_patch16.yaml"], 5_717_416),
        (["--model.name", "timm/resnet18", "--model.image_size", "32"], 11_689_512),
        (
            ["--model.name", "timm/resnet18", "--model.image_size", "32", "--model.num_classes", "10"],
            11_181_642,
        ),
    ],
)
def test_complexity_needs_no_data(
    words: list[str], params: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    (result,) = results([*words, "--complexity"], tmp_path)
    assert result["params"] == params
    assert (result["images"], result["weights"], result["data"]) == (None, "untrained", None)
    assert min(result[key] for key in ("flops", "train_memory_mb", "eval_memory_mb", "images_per_second")) > 0


def test_an_untrained_model_takes_its_classes_from_the_data(tmp_path: Path) -> None:
    words = ["--model.name", "timm/resnet10t", "--model.image_size", "32", "--data.workers", "0"]
    (first,) = results(words, tmp_path)
    (second,) = results(words, tmp_path)
    assert first["images"] == 360
    assert first["loss"] == second["loss"]
    assert first["params"] < 5_000_000  # with 1,000 classes it has 5.4 million


def refusal(words: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        program.evaluate([*words, "--progress", "false", "--device", "cpu"])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unusable_command_lines(run: Path, tmp_path: Path) -> None:
    good = ["--checkpoint", str(run)]
    (tmp_path / "text.pt").write_text("not a checkpoint")
    assert "checkpoint: nothing to evaluate" in refusal([])
    assert "checkpoint: nowhere: no such file or folder" in refusal(["--checkpoint", "nowhere"])
    assert "holds no checkpoints/best.pt" in refusal(["--checkpoint", str(tmp_path)])
    assert "text.pt" in refusal(["--checkpoint", str(tmp_path / "text.pt")])
    assert "nowhere" in refusal([*good, "nowhere"])
    assert "weights: the checkpoint has no ema weights" in refusal(
        [*good, "--which", "last", "--weights", "ema"]
    )
    other = ["--model", str(ROOT / "configs/models/vil_32.yaml")]
    assert "does not fit the model, it is of another architecture" in refusal([*good, *other])
    assert "does not fit the model, it is of another size" in refusal([*good, "--model.global_tokens", "3"])
    assert "model.name: there is no model 'vil_tny'; did you mean vil_tiny?" in refusal(
        ["--model.name", "vil_tny"]
    )
    assert "did you mean --checkpoint" in refusal(["--checkpoints", str(run)])
    assert "batch_size: expected at least 1" in refusal([*good, "--batch_size", "0"])
    assert "batch_size: expected at least 1" in refusal([*good, "--complexity", "--batch_size", "0"])
    assert "json: " in refusal([*good, "--json", str(tmp_path)])


def test_data_of_other_classes(run: Path, tmp_path: Path) -> None:
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "val" / name / "1.png")
    folder = ["--data.source", "folder", "--data.root", str(tmp_path)]
    message = refusal(["--checkpoint", str(run), *folder])
    assert f"data.source: {tmp_path / 'val'}: none of its classes, as 'cat', is one that the check" in message
    positions = [*folder, "--match_classes", "position", "--data.workers", "0", "--progress", "false"]
    (found,) = results(["--checkpoint", str(run), *positions], tmp_path)
    assert (found["images"], found["classes"]) == (2, 2)
    reordered = make_run(tmp_path / "reordered", class_names=list("1023456789"))
    message = refusal(["--checkpoint", str(reordered)])
    assert "another order: class 0 is '0' in the data, '1' in the checkpoint" in message


def digits_as_folders(root: Path, classes: str) -> Path:
    """The validation digits of some classes as images, in one folder for each class."""
    source = Digits("val", "RGB")
    for index in range(len(source)):
        image, target = source.load(index)
        if str(target) in classes:
            (root / str(target)).mkdir(parents=True, exist_ok=True)
            image.save(root / str(target) / f"{index}.png")
    return root


def test_several_data_sets_in_one_table(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = digits_as_folders(tmp_path / "all", "0123456789")
    part = digits_as_folders(tmp_path / "part", "247")
    other = tmp_path / "other.yaml"
    other.write_text("mean: [0.9, 0.9, 0.9]\nworkers: 4\n")
    words = ["--checkpoint", str(run), str(run / "checkpoints/step_00000005.pt"), "--data.workers", "0"]
    found = results([*words, "--sets", str(everything), str(part), str(other)], tmp_path)
    assert [r["data"] for r in found] == [str(everything), str(part), "digits"] * 2
    assert [r["checkpoint"] for r in found] == [
        str(run / "checkpoints" / n) for n in ["best.pt"] * 3 + ["step_00000005.pt"] * 3
    ]
    assert {key: found[0][key] for key in expected(2)} == pytest.approx(expected(2))
    assert found[2]["loss"] != found[0]["loss"]
    assert len({r["images_per_second"] for r in found}) == 2  # measured once for each checkpoint
    screen = capsys.readouterr().out.splitlines()
    assert sum("part" in line for line in screen) == 2
    assert "ECE %" in screen[0]

    # Of the part with three classes, three logits were compared.
    model = model_from_config(MODEL)
    model.load_state_dict(weights(2))
    data = dataclasses.replace(DATA, source="folder", root=str(part), val_split=".")
    images = build_validation(data, image_size=32, in_chans=3, batch_size=128).loader
    three = nn.Sequential(model, Columns([2, 4, 7]))
    alone = evaluate(three, images, device=CPU, precision="float32")
    assert (found[1]["classes"], found[1]["images"]) == (3, alone.images)
    assert (found[1]["top1"], found[1]["ece"]) == pytest.approx((alone.top1, alone.ece))
    assert found[1]["top5"] == 100


class Columns(nn.Module):
    def __init__(self, columns: list[int]) -> None:
        super().__init__()
        self.columns = columns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, self.columns]


def test_the_processes_of_a_set_end_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a class may be named train, which is no training split."""
    for name in ("train/a.png", "bus/b.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "set" / name)
    alive = []
    evaluate_model = program.report.evaluate_model

    def counted(*arguments: Any, **options: Any) -> dict[str, Any]:
        result = evaluate_model(*arguments, **options)
        alive.append(len(multiprocessing.active_children()))
        return result

    monkeypatch.setattr(program.report, "evaluate_model", counted)
    words = ["--model.name", "vil_tiny", "--model.image_size", "32", "--model.num_classes", "2"]
    words += ["--model.attention", "full", "--device", "cpu", "--progress", "false", "--data.workers", "1"]
    program.evaluate([*words, "--sets", *[str(tmp_path / "set")] * 3])
    assert alive == [1, 1, 1]


def test_data_sets_that_cannot_be(run: Path, tmp_path: Path) -> None:
    words = ["--checkpoint", str(run), "--sets"]
    assert "sets: " in refusal([*words, str(tmp_path / "none")])
    assert "expected at least one" in refusal([*words, "[]"])
    assert "no class folders in it" in refusal([*words, str(run / "checkpoints")])
    assert "none.yaml: no such file" in refusal([*words, "none.yaml"])


def test_real_labels_are_for_imagenets_own_images(tmp_path: Path) -> None:
    from PIL import Image

    for place, name in enumerate(("n01440764", "n01443537")):
        for folder, stem in (("val", f"ILSVRC2012_val_{place + 1:08d}"), ("sketch", "sketch_1")):
            (tmp_path / folder / name).mkdir(parents=True)
            Image.new("RGB", (40, 40), (90 * place, 0, 0)).save(tmp_path / folder / name / f"{stem}.JPEG")
    (tmp_path / "real.json").write_text("[[0, 1], []]")
    model = ["--model.name", "timm/resnet10t", "--model.image_size", "32", "--model.num_classes", "1000"]
    words = [*model, "--data.workers", "0", "--data.real_labels", str(tmp_path / "real.json")]
    first, second = results([*words, "--sets", str(tmp_path / "val"), str(tmp_path / "sketch")], tmp_path)
    assert (first["real_top1"], first["classes"]) == (100, 2)
    assert second["real_top1"] is None
    assert "sketch_1.JPEG is none of the 2 images" in refusal([*words, "--sets", str(tmp_path / "sketch")])


def test_a_stored_configuration_with_an_unknown_key(tmp_path: Path) -> None:
    config = dataclasses.asdict(TrainConfig(model=MODEL, data=DATA))
    config["model"]["depth"] = 3
    run = make_run(tmp_path / "odd", config=config)
    assert "stored configuration: model.depth: unknown key" in refusal(["--checkpoint", str(run)])


def command(words: list[str], *launcher: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, *launcher, "eval.py", *words]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_program_ends_with_one_line_and_status_2() -> None:
    ended = command(["--checkpoint", "nowhere"])
    assert ended.returncode == 2
    assert ended.stderr.splitlines() == ["error: command line: checkpoint: nowhere: no such file or folder"]
    assert ended.stdout == ""


def test_torchrun_counts_each_image_once(run: Path, tmp_path: Path) -> None:
    words = ["--checkpoint", str(run), "--json", str(tmp_path / "out.json"), "--device", "cpu"]
    ended = command(words, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3")
    assert ended.returncode == 0, ended.stderr
    (result,) = json.loads((tmp_path / "out.json").read_text())
    assert (result["images"], result["top1"], result["top5"]) == tuple(
        expected(2)[key] for key in ("images", "top1", "top5")
    )
    assert ended.stdout.count("Top-1 %") == 1


def test_a_checkpoint_of_timm_with_a_named_model(tmp_path: Path) -> None:
    """The head has the rows of its weights, and images are brought to it as pretrained_cfg says."""
    name = "vit_tiny_patch16_224"
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=12, img_size=32).eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "x.pth")
    words = [
        "--checkpoint",
        str(tmp_path / "x.pth"),
        "--model.name",
        f"timm/{name}",
        "--model.image_size",
        "32",
    ]
    words += ["--data.workers", "0"]
    (found,) = results(words, tmp_path)
    assert (found["model"], found["images"], found["weights"]) == (f"timm/{name}", 360, "raw")
    same = ["--data.mean", "[0.5, 0.5, 0.5]", "--data.std", "[0.5, 0.5, 0.5]", "--data.crop_pct", "0.9"]
    (by_hand,) = results([*words, *same], tmp_path)
    (other,) = results([*words, "--data.mean", "[0.4, 0.5, 0.5]"], tmp_path)
    assert found["loss"] == by_hand["loss"] != other["loss"]
    assert "does not hold its model" in refusal(["--checkpoint", str(tmp_path / "x.pth")])
