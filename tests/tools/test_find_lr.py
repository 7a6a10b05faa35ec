"""The learning-rate range test."""

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_run import CPU
from PIL import Image

from tools.programs import find_lr
from tools.programs.find_lr import Point, main, range_test, suggest
from vil.command_line import resolve_train_command
from vil.errors import UserError
from vil.runtime import consistency

TINY = (
    *("--data.source", "digits", "--data.images_per_class", "8", "--data.workers", "0", "--device", "cpu"),
    *("--schedule.batch_size", "16", "--model.image_size", "16", "--progress", "false"),
)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def test_a_test_writes_its_files_and_nothing_else(tmp_path: Path, capsys):
    files = ("--json", "out/lr.json", "--curve", "out/lr.png")
    main(["--steps", "30", "--min-lr", "1e-5", "--max-lr", "0.05", *files, *TINY, "--output", "run"])
    result = json.loads(Path("out/lr.json").read_text())
    rates = [point["lr"] for point in result["points"]]
    assert rates == pytest.approx(np.geomspace(1e-5, 0.05, 30)[: len(rates)].tolist())
    assert all(np.isfinite(point["loss"]) for point in result["points"])
    assert not result["diverged"]
    assert 1e-5 < result["suggestion"] < 0.05
    expected = f"suggested: --schedule.lr {result['suggestion']:.1e}; no divergence up to 5.0e-02\n"
    assert capsys.readouterr().out == expected
    assert Image.open("out/lr.png").format == "PNG"
    assert [path.name for path in Path().iterdir()] == ["out"]
    assert sorted(path.name for path in Path("out").iterdir()) == ["lr.json", "lr.png"]


def test_ranks_compare_images_and_weights(monkeypatch: pytest.MonkeyPatch):
    compared = {}
    monkeypatch.setattr(consistency, "check_data", lambda key, describe: compared.update({key: describe()}))
    monkeypatch.setattr(consistency, "check_weights", lambda key, model: compared.update({key: model}))
    main(["--steps", "10", *TINY])
    assert compared["data.root"]["training images"] == "80"
    assert isinstance(compared["model"], torch.nn.Module)


def test_a_test_ends_when_the_loss_diverges(capsys):
    options = ("--steps", "60", "--min-lr", "1", "--max-lr", "1e6", "--schedule.optimizer", "momentum")
    main([*options, *TINY])
    assert "diverged at " in capsys.readouterr().out


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_the_rates_are_those_of_the_schedule(layer_decay: float | None, monkeypatch: pytest.MonkeyPatch):
    """Scaled from lr_batch_size to the batch size, and by the layer decay."""
    used = []
    original = find_lr.ModelUpdater.update

    def update(self, step, loss):
        used.append(max(self.learning_rates()))
        return original(self, step, loss)

    monkeypatch.setattr(find_lr.ModelUpdater, "update", update)
    config = resolve_train_command([*TINY, "--schedule.lr_batch_size", "32"]).config
    config.schedule.layer_decay = layer_decay
    config.schedule.accumulation = 2
    points = range_test(config, CPU, [1e-4, 1e-3])
    assert [point.lr for point in points] == [1e-4, 1e-3]
    assert used == pytest.approx([1e-4 / 2, 1e-3 / 2])


def test_equal_tests_have_equal_losses():
    def test() -> list[Point]:
        return range_test(resolve_train_command(TINY).config, CPU, [1e-4, 1e-3, 1e-2])

    assert test() == test()


def test_the_suggestion_is_where_the_loss_falls_fastest():
    losses = [2.0, 1.95, 1.5, 1.0, 0.9, 3.0, 0.95]
    points = [Point(10.0**index, loss, loss) for index, loss in enumerate(losses)]
    assert suggest(points) == 100.0
    assert suggest(points[4:6]) is None


def test_a_fall_within_the_noise_gives_no_suggestion():
    """The smoothed loss falls by 0.04 in all cases; single losses vary by the amplitude around it."""
    smoothed = np.linspace(1.84, 1.80, 50).tolist() + np.linspace(1.80, 8.0, 50).tolist()
    for amplitude, is_found in ((0.01, True), (0.03, False)):
        points = [
            Point(10.0 ** (0.06 * step - 6), loss + amplitude * (-1) ** step, loss)
            for step, loss in enumerate(smoothed)
        ]
        assert (suggest(points) is not None) == is_found


def test_a_loss_that_does_not_fall_gives_no_suggestion(capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(find_lr, "range_test", lambda *_: [Point(0.1, 1.0, 1.0), Point(1.0, 2.0, 2.0)])
    main(["--steps", "10", *TINY])
    assert capsys.readouterr().out == (
        "no suggestion: the loss does not fall by more than its noise; diverged at 1.0e+00; "
        "try more --steps or a larger batch\n"
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--min-lr", "1"], "command line: --min-lr: expected less than --max-lr 1, got 1"),
        (["--max-lr", "nan"], "command line: argument --max-lr: expected a number above 0, got 'nan'"),
        (["--steps", "3"], "command line: argument --steps: expected an integer from 10 to 1000000, got '3'"),
        (["--curve", "."], "--curve: . cannot be written: Is a directory"),
    ],
)
def test_refused_arguments(argv: list[str], message: str):
    with pytest.raises(UserError) as refused:
        main([*argv, *TINY])
    assert str(refused.value) == message


def test_options_of_training_are_checked():
    with pytest.raises(UserError, match=r"^command line: --schedule.lrr: unknown option"):
        main([*TINY, "--schedule.lrr", "1"])
    with pytest.raises(UserError, match=r"^command line: schedule.batch_size: 99999 is more than "):
        main([*TINY, "--schedule.batch_size", "99999"])


def skip_steps(monkeypatch: pytest.MonkeyPatch, skipped: set[int]) -> None:
    """Report the gradient of these steps as not finite."""
    original = find_lr.ModelUpdater.update

    def update(self, step, loss):
        loss, norm, is_finite = original(self, step, loss)
        return loss, norm, is_finite & (step not in skipped)

    monkeypatch.setattr(find_lr.ModelUpdater, "update", update)


@pytest.mark.parametrize(
    ("precision", "skipped", "points"),
    [("float16", {0, 1, 3}, 6), ("float16", {2, 3, 4}, 2), ("float16", {0, 1, 2}, 0), ("float32", {2}, 2)],
)
def test_steps_that_the_scaling_of_float16_skips_are_no_divergence(
    monkeypatch: pytest.MonkeyPatch, precision: str, skipped: set[int], points: int
):
    skip_steps(monkeypatch, skipped)
    monkeypatch.setattr(find_lr, "choose_precision", lambda *_: precision)
    monkeypatch.setattr("vil.training.model_updater.autocast", lambda *_: nullcontext())
    config = resolve_train_command([*TINY, "--max_skipped_steps", "2"]).config
    rates = np.geomspace(1e-5, 1e-4, 6).tolist()
    if points:
        assert [point.lr for point in range_test(config, CPU, rates)] == rates[:points]
        return
    with pytest.raises(UserError, match="--min-lr: the loss or the gradient of the first steps is not"):
        range_test(config, CPU, rates)
