"""Evaluate the best model of a run: confusion matrix and most confident mistakes with their images."""

from __future__ import annotations

import base64
import io
import sys
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from data import build_validation
from tools.report_page.runs import Run
from vil import command_line
from vil.checkpoints.open import open_weights
from vil.checkpoints.weights import stored_model_config
from vil.config import EvalConfig
from vil.errors import errors_in_section
from vil.evaluation.accuracy import EvaluationDataset, EvaluationOptions
from vil.evaluation.complexity import measure_complexity
from vil.evaluation.predictions import Mistake, Predictions, predict
from vil.models.timm_models import check_logits
from vil.models.zoo import check_device, model_from_config
from vil.runtime.class_names import match_classes
from vil.runtime.distributed import Process
from vil.runtime.images import denormalize
from vil.runtime.precision import choose_precision
from vil.validation import as_tree

MAX_PNG_SIDE = 64
"""Side in pixels up to which an image is stored losslessly."""
THUMBNAIL_SIDE = 128


@dataclass(frozen=True)
class Evaluation:
    """Predictions of a run's best model on its validation images; `images`: the mistakes as `data:` URLs."""

    predictions: Predictions
    class_names: tuple[str, ...]
    weights: str
    images: list[str]


def evaluate_run(
    run: Run, process: Process, batch_size: int, max_mistakes: int, root: str | None
) -> Evaluation:
    """Evaluate the best model of a run on its validation images, in `root` instead of the run's folder."""
    weights = open_weights(run.folder)
    model_config = weights.require_model()
    model, device = weights.build_model(), process.device
    check_device(model, device)
    data = {**weights.data_with_split(), **weights.transform, "real_labels": None}
    stored = {"model": as_tree(model_config), "data": data, "batch_size": batch_size}
    argv = [] if root is None else [f"--data.root={root}"]
    config = command_line.parse(EvalConfig, argv, base_values=stored).config
    validation = build_validation(config, process)
    with errors_in_section("model"):
        check_logits(model.to(device), model_config)
    indices = match_classes(validation.class_names, weights.class_names, config.model.num_classes)
    dataset = EvaluationDataset(validation.name, validation.loader, validation.class_names, indices)
    options = EvaluationOptions(device, choose_precision(None, device), progress=sys.stderr.isatty())
    predictions = predict(model, dataset, options, max_mistakes)
    images = [image_url(mistake, config.data.mean, config.data.std) for mistake in predictions.mistakes]
    return Evaluation(predictions, validation.class_names, weights.kind, images)


def image_url(mistake: Mistake, mean: tuple[float, ...], std: tuple[float, ...]) -> str:
    """Return the denormalized image as a `data:` URL: a PNG if it is small, else a JPEG thumbnail."""
    pixels = denormalize(mistake.image, mean, std).mul(255).round().byte()  # (3, H, W)
    image = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
    buffer = io.BytesIO()
    is_small = max(image.size) <= MAX_PNG_SIDE
    if is_small:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
        image.save(buffer, "JPEG", quality=85)
    content = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{'png' if is_small else 'jpeg'};base64,{content}"


def count_cost(run: Run) -> None:
    """Count params and FLOPs of an unfinished run, which has no summary.json.

    If config.yaml does not describe the model completely, the costs stay unknown.
    """
    if run.summary:
        return
    try:
        config = stored_model_config(run.config.get("model"))
        if config.num_classes is None:
            return
        with torch.device("meta"):
            complexity = measure_complexity(model_from_config(config), config.size, config.in_chans)
    except Exception:  # an untrusted configuration can fail in any way
        return
    run.counted = {"params": complexity.params, "flops": complexity.flops}
