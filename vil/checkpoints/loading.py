"""Models with weights, by name or by file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn
from torchvision import transforms

from vil.checkpoints.open import open_weights
from vil.checkpoints.weights import Weights
from vil.config import DataConfig, EvalConfig, Tree, UserError, errors_in_option
from vil.models import zoo
from vil.validation import validate


class LoadedModel(NamedTuple):
    """A trained model and everything needed to use it.

    Attributes:
        model: in eval mode; maps images (B, C, H, W) to logits (B, classes).
        transform: the evaluation transform of the weights, from a PIL image to (C, H, W), float32.
        class_names: names of the classes in the order of the logits; None if unknown.
    """

    model: nn.Module
    transform: Callable[[Image.Image], Tensor]
    class_names: tuple[str, ...] | None


def load(path: str | Path) -> LoadedModel:
    """Load a model from a run's folder, a checkpoint of train.py, or safetensors of tools/export.py.

    Raises:
        UserError: the file cannot be used, or does not describe its model.
    """
    weights = open_weights(path)
    config, model = weights.require_model(), weights.build_model()
    with errors_in_option(weights.path):
        data = validate(EvalConfig, {"data": dict(weights.transform)}).data
    transform = evaluation_transform(data, config.image_size, config.in_chans)
    return LoadedModel(model, transform, weights.class_names)


def evaluation_transform(data: DataConfig, image_size: int, in_chans: int) -> Callable[[Image.Image], Tensor]:
    """Return timm's evaluation transform, from a PIL image to (in_chans, image_size, image_size), float32.

    The short side is resized to image_size / crop_pct. Images are converted to RGB, or to grayscale for one
    channel, with mean and standard deviation averaged over red, green and blue.
    """
    mean, std = data.mean, data.std
    if in_chans == 1:
        mean, std = (sum(mean) / 3,), (sum(std) / 3,)  # type: ignore[assignment]
    elif in_chans != 3:
        raise UserError("model.in_chans", f"images have 1 or 3 channels, the model {in_chans}")
    mode = "L" if in_chans == 1 else "RGB"
    convert = partial(Image.Image.convert, mode=mode)
    transform = create_transform(
        image_size, crop_pct=data.crop_pct, interpolation=data.interpolation, mean=mean, std=std
    )
    return transforms.Compose([convert, transform])


def load_released(
    config_path: str | Path,
    checkpoint_path: str | Path,
    image_size: int | None = None,
    num_classes: int | None = None,
) -> nn.Module:
    """Load a published checkpoint with its published configuration.

    Args:
        config_path: the YAML file published with the checkpoint.
        checkpoint_path: the checkpoint, e.g. `model_best.pth`.
        image_size: another image size in pixels; embeddings and bias tables are resized bilinearly.
        num_classes: another number of classes; a head with more rows keeps its first ones.

    Returns:
        The model in eval mode.

    Raises:
        UserError: a file is missing, damaged or of another format, or the weights do not fit the model.
    """
    return open_weights(checkpoint_path, config_path).build_model(image_size, num_classes)


def create_model(
    name: str | None,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    *,
    checkpoint: str | Path | Weights | None = None,
    **options: Any,
) -> nn.Module:
    """Create a model, optionally with the weights of a checkpoint.

    Args:
        name: see `vil.models.zoo.create_model`; None for the model that the checkpoint describes.
        image_size: (height, width) of the images in pixels, or one number for both; None is the checkpoint's,
            or 224.
        num_classes: classes of the head, 0 for none; None is the checkpoint's number, or 1000.
        checkpoint: weights to load, strictly (see `open_weights` and `Weights.load_into`). If it holds a
            model of this name, the model has its options, and the arguments of this call override them. For
            any other name the weights must fit the model that the arguments describe.
        **options: see `vil.models.zoo.create_model`; None is the default.

    Raises:
        UserError: an unknown name, an impossible combination of options, or a checkpoint that cannot be read
            or does not fit.
    """
    options = {"num_classes": num_classes, **options}
    given = {key: value for key, value in options.items() if value is not None}
    weights = open_weights(checkpoint) if isinstance(checkpoint, str | Path) else checkpoint
    stored: Tree = {}
    if weights is not None and weights.model is not None:
        keys = [field.name for field in fields(weights.model)]
        if name not in (None, weights.model.name):
            keys = ["image_size", "num_classes"]
        values = {key: getattr(weights.model, key) for key in keys}
        stored = {key: value for key, value in values.items() if value is not None}
        name = name or weights.model.name
    if name is None:
        if weights is None:
            raise UserError("name", "is needed without a checkpoint")
        name = weights.require_model().name
    config = zoo.config_from_options({"num_classes": 1000, **stored, **given, "name": name})
    if weights is None:
        return zoo.model_from_config(config, image_size=image_size)
    model = weights.empty_model(config, image_size=image_size)
    weights.load_into(model, image_size if isinstance(image_size, int) else config.image_size)
    return model
