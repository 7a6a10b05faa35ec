"""ImageNet-C: its folders, and the mCE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vil.config import ConfigError
from vil.evaluation.corruptions import ALEXNET_ERRORS, SEVERITIES, corrupted_sets, with_summaries


def make(root: Path, *names: str) -> Path:
    for name in names:
        for severity in SEVERITIES:
            (root / name / severity / "n01440764").mkdir(parents=True)
    return root


def test_folders(tmp_path: Path) -> None:
    root = make(tmp_path / "c", "fog", "snow")
    found = corrupted_sets(str(root))
    assert found == [str(root / name / s) for name in ("fog", "snow") for s in SEVERITIES]
    assert corrupted_sets(str(root / "fog")) == found[:5]
    assert corrupted_sets(found[0]) == [found[0]]
    for name in range(8):  # ImageNet-V2: folders 0, 1, ... with images, which are classes
        (tmp_path / "v2" / str(name)).mkdir(parents=True)
    assert corrupted_sets(str(tmp_path / "v2")) == [str(tmp_path / "v2")]
    with pytest.raises(ConfigError, match="No such file"):
        corrupted_sets(str(tmp_path / "none"))


def results(names: list[str], error: float, checkpoint: str = "a") -> list[dict[str, Any]]:
    fixed = {
        "model": "vil",
        "checkpoint": checkpoint,
        "weights": "raw",
        "top5": 90.0,
        "loss": 1.0,
        "ece": 2.0,
    }
    return [
        {**fixed, "data": f"/x/c/{name}/{s}", "top1": 100 - error, "real_top1": 10.0 * int(s), "images": 10}
        | {"unreadable": 0}
        for name in names
        for s in SEVERITIES
    ]


def test_the_mean_corruption_error() -> None:
    names = list(ALEXNET_ERRORS)
    given = results(names, 50.0) + results(names, 25.0, "b")
    found = with_summaries(given)
    assert len(found) == 152
    first, second = found[75], found[151]
    assert (first["data"], first["images"], first["checkpoint"]) == ("/x/c", 750, "a")
    expected = sum(50 / error for error in ALEXNET_ERRORS.values()) / 15
    assert first["mce"] == pytest.approx(expected)
    assert second["mce"] == pytest.approx(expected / 2)
    assert second["top1"] == 75


def test_a_part_has_means_but_no_mce() -> None:
    given = results(["fog"], 40.0)
    assert with_summaries(given[:4]) == given[:4]
    (summary,) = with_summaries(given)[5:]
    assert (summary["top1"], summary["real_top1"], summary["mce"]) == (60, 30, None)
    assert with_summaries([{"data": None}]) == [{"data": None}]
