"""ImageNet-C: 15 corruptions at 5 severities each, and four more, as folders corruption/severity/class/image.

Source: Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations, https://arxiv.org/abs/1903.12261.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vil.config import ConfigError

SEVERITIES = ("1", "2", "3", "4", "5")
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816,
    "frost": 0.826572, "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204,
    "elastic_transform": 0.646056, "pixelate": 0.717840, "jpeg_compression": 0.606500,
}  # fmt: skip
"""AlexNet's error for each of the 15, averaged over the severities: the measure of the mCE."""


def corrupted_sets(folder: str) -> list[str]:
    """The folders of class folders in `folder`: each corruption's and severity's, or `folder` itself.

    Raises:
        ConfigError: there is no such folder.
    """
    root = Path(folder).expanduser()
    try:
        folders = _folders(root)
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise ConfigError(folder, getattr(error, "strerror", None) or str(error)) from None
    corruptions = [root] if _is_corruption(root) else [name for name in folders if _is_corruption(name)]
    return [str(name / severity) for name in corruptions for severity in SEVERITIES] or [str(root)]


def _folders(folder: Path) -> list[Path]:
    return sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir())


def _is_corruption(folder: Path) -> bool:
    """Whether there are all severities, with folders in them: ImageNet-V2's classes 1 to 5 hold images."""
    levels = [folder / severity for severity in SEVERITIES]
    return all(level.is_dir() for level in levels) and bool(_folders(levels[0]))


def with_summaries(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results, and behind those of a model on all severities of corruptions one that sums them up.

    It holds the means of the accuracies and, where the 15 corruptions are there, the mCE in per cent: the
    errors for each, averaged over severities and divided by AlexNet's, averaged over the corruptions.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for result in results:
        parts = Path(result["data"] or "").parts
        if len(parts) >= 3 and parts[-1] in SEVERITIES:
            place = (*(result[k] for k in ("model", "checkpoint", "weights")), str(Path(*parts[:-2])))
            groups.setdefault(place, []).append(result)
    summed = list(results)
    for (*_, root), group in groups.items():
        errors: dict[str, list[float]] = {}
        for result in group:
            errors.setdefault(Path(result["data"]).parts[-2], []).append(100 - result["top1"])
        if any(len(of_one) != len(SEVERITIES) for of_one in errors.values()):
            continue
        summary = {**group[-1], "data": root, "mce": None}
        for key in ("top1", "top5", "loss", "ece"):
            summary[key] = sum(result[key] for result in group) / len(group)
        for key in ("images", "unreadable"):
            summary[key] = sum(result[key] for result in group)
        real = [result["real_top1"] for result in group if result["real_top1"] is not None]
        summary["real_top1"] = sum(real) / len(real) if real else None
        if set(ALEXNET_ERRORS) <= set(errors):
            relative = [sum(errors[c]) / len(SEVERITIES) / ALEXNET_ERRORS[c] for c in ALEXNET_ERRORS]
            summary["mce"] = sum(relative) / len(relative)
        summed.insert(summed.index(group[-1]) + 1, summary)
    return summed
