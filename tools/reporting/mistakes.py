"""What the best model of a run gets wrong, and the pictures of it."""

from __future__ import annotations

import base64
import dataclasses
import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from data import build_validation
from tools.reporting.runs import Run
from vil import command_line
from vil.config import ConfigError, EvalConfig
from vil.evaluation.classes import find_rows
from vil.evaluation.complexity import measure_complexity
from vil.evaluation.predictions import Mistake, Predictions, predict
from vil.models.released import open_model
from vil.models.zoo import check_device, model_from_config
from vil.pictures import denormalised
from vil.training.precision import check_precision
from vil.weight_files import model_section

SMALL = 64
"""Side in pixels up to which a picture is kept as it is."""
SIDE = 128
"""Largest side of a larger one on the page."""


@dataclass(frozen=True)
class Evaluated:
    """The predictions of a run's best model on its validation images.

    Attributes:
        predictions: counts and mistakes.
        class_names: of the data, in the order of the targets.
        weights: raw or ema.
        pictures: the images of `predictions.mistakes`, as `data:` addresses.
    """

    predictions: Predictions
    class_names: tuple[str, ...]
    weights: str
    pictures: list[str]


def evaluate_run(
    run: Run,
    *,
    device: torch.device,
    batch_size: int = 128,
    most_mistakes: int = 24,
    root: str | None = None,
    progress: bool = False,
) -> Evaluated:
    """Runs the best model of a run over its validation images.

    Args:
        run: the run.
        device: where to compute.
        batch_size: images per forward pass.
        most_mistakes: how many of the mistakes to show.
        root: folder of the data set, in place of the run's.
        progress: show a bar.

    Raises:
        ConfigError: there is no checkpoint yet, or the images are not there.
    """
    model, file = open_model(run.folder)
    if file.model is None:  # open_model has refused such a file
        raise ConfigError(file.path, "does not hold its model")
    stored = {"model": dataclasses.asdict(file.model), "data": {**file.data, "real_labels": None}}
    words = [] if root is None else [f"--data.root={root}"]
    config = command_line.parse(EvalConfig, words, base_values=stored).config
    validation = build_validation(
        config.data,
        image_size=config.model.image_size,
        in_chans=config.model.in_chans,
        batch_size=batch_size,
        device=device,
    )
    check_device(model, device)
    predictions = predict(
        model.to(device),
        validation.loader,
        device=device,
        precision=check_precision(None, device),
        class_count=validation.num_classes,
        class_rows=find_rows(validation.class_names, file.class_names, config.model.num_classes),
        most_mistakes=most_mistakes,
        progress=progress,
    )
    pictures = [picture(mistake, config.data.mean, config.data.std) for mistake in predictions.mistakes]
    return Evaluated(predictions, validation.class_names, file.kind, pictures)


def picture(mistake: Mistake, mean: tuple[float, ...], std: tuple[float, ...]) -> str:
    """The image as people see it: a `data:` address, PNG where it is small, else a small JPEG."""
    pixels = denormalised(mistake.image, mean, std).mul(255).round().byte()  # (3, H, W)
    image = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
    buffer = io.BytesIO()
    if max(image.size) <= SMALL:
        kind = "png"
        image.save(buffer, "PNG", optimize=True)
    else:
        kind = "jpeg"
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        image.save(buffer, "JPEG", quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def count_cost(run: Run) -> None:
    """Counts params and flops of a run that has no summary.json yet to tell them.

    A model that its configuration does not describe completely stays without.
    """
    if run.summary:
        return
    try:
        config = model_section(run.config.get("model"))
        if config.num_classes is None:
            return
        with torch.device("meta"):  # shapes without numbers: all that counting needs
            found = measure_complexity(model_from_config(config), config.image_size, config.in_chans)
    except Exception:  # of whatever kind: a configuration of a stranger describes anything
        return
    run.counted = {"params": found.params, "flops": found.flops}
