"""ImageNet-C: its folders, and the mCE."""

from __future__ import annotations

from pathlib import Path

import pytest

from vil.errors import UserError
from vil.evaluation.corruptions import ALEXNET_ERRORS, SEVERITIES, add_corruption_summaries, list_datasets
from vil.evaluation.metrics import METRICS
from vil.evaluation.report import Result


def make_folders(root: Path, *corruptions: str) -> Path:
    for name in corruptions:
        for severity in SEVERITIES:
            (root / name / severity / "n01440764").mkdir(parents=True)
    return root


def test_data_sets_of_a_folder(tmp_path: Path) -> None:
    root = make_folders(tmp_path / "c", "fog", "snow")
    found = list_datasets(str(root))
    assert found == [str(root / name / s) for name in ("fog", "snow") for s in SEVERITIES]
    assert list_datasets(str(root / "fog")) == found[:5]
    assert list_datasets(found[0]) == [found[0]]
    for name in range(8):  # ImageNet-V2: folders 0, 1, ... with images, which are classes
        (tmp_path / "v2" / str(name)).mkdir(parents=True)
    assert list_datasets(str(tmp_path / "v2")) == [str(tmp_path / "v2")]
    with pytest.raises(UserError) as caught:
        list_datasets(str(tmp_path / "none"))
    assert str(caught.value) == f"{tmp_path / 'none'}: No such file or directory"


def make_results(corruptions: list[str], error: float, checkpoint: str = "a") -> list[Result]:
    fixed = {"model": "vil", "checkpoint": checkpoint, "weights": "raw", **dict.fromkeys(METRICS, 2.0)}
    return [
        fixed
        | {"data": f"/x/c/{name}/{severity}", "top1": 100 - error, "real_top1": 10.0 * int(severity)}
        | {"images": 10, "unreadable": 1}
        for name in corruptions
        for severity in SEVERITIES
    ]


def test_mean_corruption_error() -> None:
    results = make_results([*ALEXNET_ERRORS], 50.0) + make_results([*ALEXNET_ERRORS], 25.0, "b")
    found = add_corruption_summaries(results)
    assert len(found) == 152
    first, second = found[75], found[151]
    assert (first["data"], first["images"], first["unreadable"]) == ("/x/c", 750, 75)
    assert (first["checkpoint"], second["checkpoint"]) == ("a", "b")
    expected = sum(50 / error for error in ALEXNET_ERRORS.values()) / 15
    assert (first["mce"], second["mce"]) == pytest.approx((expected, expected / 2))
    assert (second["top1"], second["loss"]) == (75, 2)


def test_some_corruptions_have_means_but_no_mce() -> None:
    results = make_results(["fog"], 40.0)
    assert add_corruption_summaries(results[:4]) == results[:4]
    (summary,) = add_corruption_summaries(results)[5:]
    assert (summary["top1"], summary["real_top1"], summary["mce"]) == (60, 30, None)
    assert add_corruption_summaries([{"data": None}]) == [{"data": None}]
