"""Which file, which weights, and whether they fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from vil.config import ConfigError
from vil.evaluation.weights import choose_weights, find_checkpoint, load_weights


def state(best: str | None = "ema", has_ema: bool = True) -> dict:
    return {
        "model": {"w": torch.tensor(1.0)},
        "ema": {"w": torch.tensor(2.0)} if has_ema else None,
        "best": best and {"top1": 90.0, "weights": best, "epoch": 3},
    }


def test_files_of_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "last.pt").touch()
    assert find_checkpoint(str(tmp_path), "last") == folder / "last.pt"
    assert find_checkpoint(str(folder / "last.pt"), "best") == folder / "last.pt"
    with pytest.raises(ConfigError, match=r"holds no checkpoints/best\.pt"):
        find_checkpoint(str(tmp_path), "best")
    with pytest.raises(ConfigError, match="nowhere: no such file or folder"):
        find_checkpoint(str(tmp_path / "nowhere"), "best")


@pytest.mark.parametrize(
    ("best", "asked", "value", "kind"),
    [
        ("ema", "auto", 2, "ema"),
        ("raw", "auto", 1, "raw"),
        (None, "auto", 1, "raw"),
        ("ema", "raw", 1, "raw"),
        ("raw", "ema", 2, "ema"),
    ],
)
def test_choice_of_weights(best: str | None, asked: str, value: float, kind: str) -> None:
    weights, found = choose_weights(state(best), asked)
    assert (weights["w"].item(), found) == (value, kind)


def test_an_average_that_was_not_kept() -> None:
    with pytest.raises(ConfigError, match="weights: the checkpoint has no ema weights"):
        choose_weights(state("raw", has_ema=False), "ema")


def test_weights_that_fit_are_loaded() -> None:
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    load_weights(target, source.state_dict(), "x.pt")
    assert torch.equal(target.weight, source.weight)


def test_every_kind_of_difference_is_named_on_one_line() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = nn.Sequential(nn.Linear(4, 2), nn.Identity(), nn.Linear(2, 2))
    with pytest.raises(ConfigError) as caught:
        load_weights(model, other.state_dict(), "x.pt")
    message = str(caught.value)
    assert "\n" not in message
    assert "checkpoint: x.pt" in message
    assert "2 missing (1.weight, 1.bias)" in message
    assert "2 unknown (2.weight, 2.bias)" in message
    assert "1 of another shape (0.weight is 2×4, not 2×3)" in message
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_long_list_is_cut() -> None:
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(5)))
    with pytest.raises(ConfigError, match=r"10 missing \(0.weight, 0.bias, 1.weight, …\)"):
        load_weights(model, {}, "x.pt")
