"""ImageNet-C: 15 corruptions at 5 severities each, and four more, as folders corruption/severity/class/image.

Source: Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations, https://arxiv.org/abs/1903.12261.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vil.errors import UserError, error_reason
from vil.evaluation.metrics import METRICS
from vil.evaluation.report import Result

SEVERITIES = ("1", "2", "3", "4", "5")
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""AlexNet's error on each of the 15 corruptions, averaged over severities: the unit of the mCE."""


def list_datasets(folder: str) -> list[str]:
    """Return the folders of class folders in `folder`: one per corruption and severity, or `folder` itself.

    Raises:
        UserError: there is no such folder.
    """
    root = Path(folder).expanduser()
    try:
        subfolders = _subfolders(root)
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise UserError(folder, error_reason(error)) from None
    corruptions = [root] if _is_corruption(root) else [path for path in subfolders if _is_corruption(path)]
    return [str(path / severity) for path in corruptions for severity in SEVERITIES] or [str(root)]


def _subfolders(folder: Path) -> list[Path]:
    return sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir())


def _is_corruption(folder: Path) -> bool:
    """Return True if all severities are folders that contain folders, unlike ImageNet-V2's classes 1 to 5."""
    levels = [folder / severity for severity in SEVERITIES]
    return all(level.is_dir() for level in levels) and bool(_subfolders(levels[0]))


def add_corruption_summaries(results: Sequence[Result]) -> list[Result]:
    """Return the results with a summary after those of a model on all severities of some corruptions.

    The summary has the mean of each metric and, if all 15 corruptions exist, the mCE in percent: the mean
    over corruptions of the error, averaged over severities and divided by AlexNet's.
    """
    groups: dict[tuple[str, str, str | None, str | None], list[Result]] = {}
    for result in results:
        parts = Path(result["data"] or "").parts
        if len(parts) >= 3 and parts[-1] in SEVERITIES:
            root = str(Path(*parts[:-2]))
            key = (root, result["model"], result["checkpoint"], result["weights"])
            groups.setdefault(key, []).append(result)
    summarized = list(results)
    for (root, *_), group in groups.items():
        errors: dict[str, list[float]] = {}
        for result in group:
            errors.setdefault(Path(result["data"]).parts[-2], []).append(100 - result["top1"])
        if any(len(by_severity) != len(SEVERITIES) for by_severity in errors.values()):
            continue
        summary = {**group[-1], "data": root, "mce": None, "per_class": None}
        for metric in METRICS:
            values = [result[metric] for result in group if result[metric] is not None]
            summary[metric] = sum(values) / len(values) if values else None
        for count in ("images", "unreadable"):
            summary[count] = sum(result[count] for result in group)
        if ALEXNET_ERRORS.keys() <= errors.keys():
            relative = [sum(errors[c]) / len(SEVERITIES) / ALEXNET_ERRORS[c] for c in ALEXNET_ERRORS]
            summary["mce"] = sum(relative) / len(relative)
        summarized.insert(summarized.index(group[-1]) + 1, summary)
    return summarized
