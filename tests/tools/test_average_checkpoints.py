"""tools/average_checkpoints.py: uniform and greedy averages, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import eval as eval_program
import vil
from tools.programs.average_checkpoints import WeightAverage, main
from vil.checkpoints.checkpoint_files import BEST, digest_file, step_file, step_files
from vil.checkpoints.open import open_weights
from vil.checkpoints.training_state import library_versions, write_training_state
from vil.checkpoints.weights import NO_MODEL
from vil.config import DataConfig, ModelConfig, StageConfig, TrainConfig
from vil.errors import UserError
from vil.models.zoo import model_from_config

NAMES = list("0123456789")
STAGE = StageConfig(dim=8, heads=2, patch=8, attention="full")
MODEL = ModelConfig(name="vil", image_size=16, num_classes=10, stages=[STAGE])
DATA = DataConfig(workers=0, crop_mode="squash")
QUIET = ["--device", "cpu", "--progress", "false"]


def draw_weights(seed: int, model: ModelConfig = MODEL) -> dict[str, torch.Tensor]:
    """Return the same weights for every seed, with another noise."""
    torch.manual_seed(0)
    created = model_from_config(copy.deepcopy(model)).state_dict()
    torch.manual_seed(seed)
    return {name: value + 0.1 * torch.randn(value.shape) for name, value in created.items()}


def make_run(
    folder: Path,
    *seeds: int,
    model: ModelConfig = MODEL,
    data: DataConfig = DATA,
    names: list[str] = NAMES,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a run: best.pt has the weights of the first seed, step i those of seed i."""
    (folder / "checkpoints").mkdir(parents=True)
    for step, seed in enumerate(seeds):
        state: dict[str, Any] = {
            "model": {name: value.to(dtype) for name, value in draw_weights(seed, model).items()},
            "ema": None,
            "best": {"top1": 1.0, "weights": "raw", "epoch": 1},
            "config": dataclasses.asdict(TrainConfig(model=copy.deepcopy(model), data=data)),
            "class_names": names,
            "versions": library_versions(),
        }
        if step == 0:
            write_training_state(folder / BEST, state)
        write_training_state(step_file(folder, step), state)
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    return [str(make_run(tmp_path / name, *seeds)) for name, seeds in (("a", (1, 2, 3)), ("b", (4,)))]


def state_dict(path: Path) -> dict[str, torch.Tensor]:
    return dict(open_weights(path).state_dict)


@pytest.mark.parametrize("name", ["out/soup.pt", "soup.safetensors"])
def test_an_average_is_a_checkpoint_like_any_other(
    name: str, runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / name
    main([*runs, f"{runs[0]}/checkpoints/step_00000002.pt", "--output", str(output)])
    assert capsys.readouterr().out == f"{output}: average of 3 of 3 checkpoints\n"
    parts = [draw_weights(seed) for seed in (1, 4, 3)]
    for key, value in state_dict(output).items():
        torch.testing.assert_close(
            value, sum(part[key].double() for part in parts).div(3).float(), rtol=0, atol=0
        )
    model, _, class_names = vil.load(output)
    assert class_names == tuple(NAMES)
    assert model.pretrained_cfg["crop_mode"] == "squash"
    argv = ["--checkpoint", str(output), "--json", str(tmp_path / "x.json"), "--data.workers", "0"]
    eval_program.main([*argv, *QUIET])
    (result,) = json.loads((tmp_path / "x.json").read_text())
    assert (result["images"], result["data"], result["weights"]) == (360, "digits", "raw")
    files = [*(f"{run}/checkpoints/best.pt" for run in runs), f"{runs[0]}/checkpoints/step_00000002.pt"]
    expected = [{"file": file, "weights": "raw"} for file in files]
    if output.suffix == ".pt":
        assert torch.load(output, weights_only=True)["averaged"] == expected
        assert digest_file(output).is_file()
    else:
        with safe_open(output, "pt") as opened:
            assert json.loads(opened.metadata()["averaged"]) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_average_of_equal_checkpoints_is_equal_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    run = str(make_run(tmp_path / "a", 1, dtype=dtype))
    shutil.copytree(run, tmp_path / "b")
    main([run, str(tmp_path / "b"), "--output", str(tmp_path / "x.pt")])
    for name, value in state_dict(tmp_path / "x.pt").items():
        assert value.dtype == dtype
        assert torch.equal(value, state_dict(Path(run))[name])


def test_the_last_checkpoints_of_a_run(runs: list[str], tmp_path: Path) -> None:
    main([runs[0], "--last", "2", "--output", str(tmp_path / "x.pt")])
    parts = [draw_weights(seed) for seed in (2, 3)]
    for name, value in state_dict(tmp_path / "x.pt").items():
        assert torch.equal(value, sum(part[name].double() for part in parts).div(2).float())


def test_the_last_checkpoint_of_a_run_and_a_file(runs: list[str], tmp_path: Path) -> None:
    file, output = f"{runs[1]}/checkpoints/best.pt", tmp_path / "x.pt"
    main([runs[0], file, "--run-checkpoint", "last", "--output", str(output)])
    newest = step_files(Path(runs[0]))[0][1]
    assert [part["file"] for part in torch.load(output, weights_only=True)["averaged"]] == [str(newest), file]


def test_statistics_are_averaged_and_integers_are_those_of_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ModelConfig(name="timm/test_resnet", image_size=32, num_classes=10)
    paths = [str(make_run(tmp_path / str(seed), seed, model=model)) for seed in (1, 2)]
    main([*paths, "--output", str(tmp_path / "x.pt")])
    first, second, mean = (state_dict(Path(path)) for path in (*paths, tmp_path / "x.pt"))
    statistics = [name for name in mean if name.endswith(("running_mean", "running_var"))]
    line = f"{len(statistics)} running statistics of batch norms are averaged, not recomputed"
    assert capsys.readouterr().out.splitlines()[0] == line
    for name in statistics:
        assert torch.equal(mean[name], ((first[name].double() + second[name]) / 2).float())
    average = WeightAverage({"w": torch.tensor([1.0]), "n": torch.tensor(3)})
    average.add({"w": torch.tensor([2.0]), "n": torch.tensor(8)})
    assert average.state_dict() == {"w": torch.tensor([1.5]), "n": torch.tensor(3)}


def top1(path: Path | str, folder: Path) -> float:
    eval_program.main(["--checkpoint", str(path), "--json", str(folder / "x.json"), *QUIET])
    return json.loads((folder / "x.json").read_text())[0]["top1"]


def test_a_greedy_average_keeps_what_does_not_lower_the_accuracy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(make_run(tmp_path / str(seed), seed)) for seed in range(28, 32)]
    alone = [top1(run, tmp_path) for run in runs]
    order = sorted(range(4), key=lambda index: -alone[index])
    # By hand: averages of files, evaluated by eval.py.
    kept, best, decisions = [order[0]], alone[order[0]], {order[0]: "kept"}
    for index in order[1:]:
        main([*(runs[i] for i in (*kept, index)), "--output", str(tmp_path / "trial.pt")])
        changed = top1(tmp_path / "trial.pt", tmp_path)
        decisions[index] = "kept" if changed >= best else "left out"
        if changed >= best:
            kept, best = [*kept, index], changed
    assert set(decisions.values()) == {"kept", "left out"}
    assert len(kept) > 1
    main([*(runs[i] for i in kept), "--output", str(tmp_path / "expected.pt")])
    capsys.readouterr()
    main([*runs, "--output", str(tmp_path / "soup.pt"), "--greedy", *QUIET])
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(": ")[2] for line in lines[:4]] == [decisions[index] for index in order]
    for index, line in zip(order, lines):
        assert line.startswith(f"{runs[index]}/checkpoints/best.pt: Top-1 {alone[index]:.2f} %, with it ")
    assert lines[4] == f"{tmp_path}/soup.pt: average of {len(kept)} of 4 checkpoints"
    for name, value in state_dict(tmp_path / "expected.pt").items():
        assert torch.equal(value, state_dict(tmp_path / "soup.pt")[name])
    averaged = torch.load(tmp_path / "soup.pt")["averaged"]
    assert [entry["top1"] for entry in averaged] == [alone[index] for index in kept]


def error_of(argv: list[str]) -> str:
    with pytest.raises(UserError) as refused:
        main(argv)
    return str(refused.value)


def test_refusals(runs: list[str], tmp_path: Path) -> None:
    a, b = (f"{run}/checkpoints/best.pt" for run in runs)
    output = ["--output", str(tmp_path / "x.pt")]
    others = {
        "mask": dataclasses.replace(MODEL, mask="exact", stages=[dataclasses.replace(STAGE)]),
        "wide": dataclasses.replace(MODEL, stages=[dataclasses.replace(STAGE, dim=16)]),
        "rates": dataclasses.replace(MODEL, drop_path=0.3, head_dropout=0.1),
    }
    paths = {
        name: str(make_run(tmp_path / name, 1, model=model)) + "/checkpoints/best.pt"
        for name, model in others.items()
    }
    paths["names"] = str(make_run(tmp_path / "names", 1, names=NAMES[::-1])) + "/checkpoints/best.pt"
    paths["mean"] = str(make_run(tmp_path / "mean", 1, data=dataclasses.replace(DATA, mean=(0.1,) * 3)))
    paths["mean"] += "/checkpoints/best.pt"
    paths["half"] = str(make_run(tmp_path / "half", 1, dtype=torch.float16)) + "/checkpoints/best.pt"
    split = dataclasses.replace(DATA, val_split="train")
    paths["split"] = str(make_run(tmp_path / "split", 1, data=split)) + "/checkpoints/best.pt"
    main([a, paths["rates"], *output])
    assert error_of([runs[0], a, *output]) == f"checkpoint: {a} occurs twice"
    cases = {
        "mask": "model.mask is exact, not None",
        "names": "it has other classes, or in another order",
        "mean": "data.mean is [0.1, 0.1, 0.1], not [0.485, 0.456, 0.406]",
    }
    for name, reason in cases.items():
        assert error_of([a, paths[name], *output]) == f"{paths[name]}: cannot be averaged with {a}: {reason}"
    reason = f"{paths['wide']}: cannot be averaged with {a}: model.stages is [{{'dim': 16,"
    assert error_of([a, paths["wide"], *output]).startswith(reason)
    name = next(iter(draw_weights(1)))
    shape = tuple(draw_weights(1)[name].shape)
    reason = f"{name} is {shape} torch.float16, not {shape} torch.float32"
    assert error_of([a, paths["half"], *output]) == f"{paths['half']}: cannot be averaged with {a}: {reason}"
    reason = f"has other validation images than {a}: data.val_split; name the images by --data"
    assert error_of([a, paths["split"], *output, "--greedy", *QUIET]) == f"{paths['split']}: {reason}"
    plain = tmp_path / "plain.safetensors"
    main([a, b, "--output", str(plain)])
    assert (
        error_of([str(plain), a, *output, "--greedy"])
        == f"--greedy: {plain} names no data; name the images by --data"
    )
    foreign = tmp_path / "foreign.pt"
    torch.save(draw_weights(1), foreign)
    for options in ([], ["--greedy"]):
        reason = f"{NO_MODEL}: --released-config"
        assert error_of([str(foreign), a, *output, *options]) == f"{foreign}: {reason}"
    (tmp_path / "y.pt").touch()
    for argv, message in (
        ([a, *output], "checkpoint: expected at least two; --last N takes the newest N of one run"),
        ([a, b, "--last", "2", *output], "--last: requires the folder of one run"),
        (
            [runs[0], "--last", "4", *output],
            f"--last: {runs[0]} has 3 of 4 checkpoints; train.py --keep_checkpoints keeps more",
        ),
        (
            [a, b, "--output", "x.bin"],
            "--output: expected a name that ends with .pt or .safetensors, got x.bin",
        ),
        (
            [a, b, *output, "--data.root", "x"],
            "command line: --data.root: unknown option; options of eval.py require --greedy",
        ),
        (
            ["--data.root", "x", a, b, *output, "--greedy"],
            "command line: --data.root: options of eval.py follow the checkpoints",
        ),
        (
            [a, b, *output, "--greedy", "--tta", "hflip"],
            "command line: --tta: is not an option of average_checkpoints.py",
        ),
        (
            [runs[0], "--last", "2", "--run-checkpoint", "last", *output],
            "command line: --run-checkpoint: cannot be combined with --last",
        ),
        ([a, b, "--output", a], f"--output: {a} is an input of this command; name another file"),
        ([a, str(tmp_path / "none"), *output], f"{tmp_path / 'none'}: no such file or folder"),
        ([a, str(tmp_path / "y.pt"), *output], f"{tmp_path / 'y.pt'}: the file is empty"),
    ):
        assert error_of(argv) == message
