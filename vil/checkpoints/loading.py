"""Models with weights, by name or by file."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform
from timm.models._builder import pretrained_cfg_for_features
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn
from torchvision import transforms

from vil.checkpoints.open import open_weights
from vil.checkpoints.weights import Weights, name_rows
from vil.config import DataConfig, EvalConfig, ModelConfig, Size, Tree, as_size, check_border_color
from vil.errors import UserError, error_reason, errors_in_option
from vil.models import zoo
from vil.models.multiscale_vit import MultiScaleViT
from vil.runtime.class_names import check_has_classes
from vil.runtime.files import read_bytes
from vil.runtime.images import (
    MAX_ENCODED_BYTES,
    convert_image,
    limit_aspect_ratio,
    max_aspect_ratio,
    supported_formats,
)
from vil.validation import validate

NOT_FINITE = "the logits are not finite"
"""Reason why an image has no prediction."""

ImageInput = Image.Image | str | Path
"""An image of Pillow, or the path of an image file."""

_IMAGE_TYPES = "an image of Pillow or the path of an image file"


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

    @torch.inference_mode()
    def predict(
        self, images: ImageInput | Sequence[ImageInput], top: int = 5, batch_size: int = 32
    ) -> list[list[tuple[str, float]]]:
        """Return the most probable classes of images, on the device of the model and in its present mode.

        Args:
            images: an image of Pillow, the path of an image file, or a sequence of them.
            top: number of classes per image; all if the model has fewer.
            batch_size: images per forward pass.

        Returns:
            For each image, also for a single one, a list of (class name, probability), the most probable
            first. Without `class_names`, 1,000 classes have ImageNet's WordNet ids, others their number.

        Raises:
            UserError: an image cannot be read or is of another type, the logits of one are not finite, a
                number is below 1, or the model has no classes or does not return one logit per class.
        """
        check_has_classes(getattr(self.model, "num_classes", None))
        for name, number in (("top", top), ("batch_size", batch_size)):
            if number < 1:
                raise UserError(name, f"expected a number from 1, got {number}")
        if isinstance(images, str | Path | Image.Image):
            images = [images]
        if isinstance(images, bytes | bytearray | memoryview) or not isinstance(images, Sequence):
            raise UserError("images", f"expected {_IMAGE_TYPES}, or a sequence, got {type(images).__name__}")
        parameter = next(self.model.parameters())
        predictions: list[list[tuple[str, float]]] = []
        for start in range(0, len(images), batch_size):
            batch = torch.stack([self._read(image) for image in images[start : start + batch_size]])
            logits = self.model(batch.to(device=parameter.device, dtype=parameter.dtype))  # (B, classes)
            if not isinstance(logits, Tensor) or logits.ndim != 2:
                kind = (
                    f"of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
                )
                raise UserError("model", f"its output is {kind}, expected one logit per class")
            names = name_rows(self.class_names, logits.shape[1])
            for index, is_finite in enumerate(logits.isfinite().all(dim=1).tolist(), start):
                if not is_finite:
                    raise UserError("images", f"{NOT_FINITE} for image {index}")
            top_classes = logits.float().softmax(dim=1).topk(min(top, len(names)), dim=1)
            for indices, values in zip(top_classes.indices.tolist(), top_classes.values.tolist()):
                predictions.append([(names[index], value) for index, value in zip(indices, values)])
        return predictions

    def _read(self, image: ImageInput) -> Tensor:
        """Return an image as the model's input (C, H, W)."""
        if isinstance(image, Image.Image):
            try:
                return self.transform(image)
            except Exception as error:  # as of a file that is decoded only now
                raise UserError("images", f"{image!r} cannot be used: {error_reason(error)}") from error
        if not isinstance(image, str | Path):
            raise UserError("images", f"expected {_IMAGE_TYPES}, got {type(image).__name__}")
        try:
            content = read_bytes(image, MAX_ENCODED_BYTES)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(io.BytesIO(content), formats=supported_formats()) as opened:
                    return self.transform(opened)
        except UnidentifiedImageError:
            raise UserError(str(image), "cannot be read: not an image of a supported format") from None
        except Exception as error:  # decoders raise any type for damaged files
            raise UserError(str(image), f"cannot be read: {error_reason(error)}") from error


def load(path: str | Path) -> LoadedModel:
    """Load a model from a run's folder, a checkpoint of train.py, or safetensors of tools/export.py.

    Raises:
        UserError: the file cannot be used, or does not describe its model.
    """
    weights = open_weights(path)
    config, model = weights.require_model(), weights.build_model()
    with errors_in_option(weights.path):
        data = validate(EvalConfig, {"data": dict(weights.transform)}).data
    transform = evaluation_transform(data, config.size, config.in_chans)
    return LoadedModel(model, transform, weights.class_names)


def evaluation_transform(
    data: DataConfig, image_size: int | Size, in_chans: int
) -> Callable[[Image.Image], Tensor]:
    """Return timm's evaluation transform, from a PIL image to (in_chans, height, width), float32.

    The image is resized to image_size / crop_pct as `data.crop_mode` says; of one longer than
    `max_aspect_ratio` only the center is used. Images are converted to RGB, or to grayscale for one channel,
    with mean and standard deviation averaged over red, green and blue.
    """
    mean, std = data.mean, data.std
    if in_chans == 1:
        mean, std = (sum(mean) / 3,), (sum(std) / 3,)  # type: ignore[assignment]
    elif in_chans != 3:
        raise UserError("model.in_chans", f"images have 1 or 3 channels, the model {in_chans}")
    convert = partial(convert_image, mode="L" if in_chans == 1 else "RGB")
    check_border_color(data)
    size = as_size(image_size)
    limit = partial(limit_aspect_ratio, max_ratio=max_aspect_ratio(data.crop_mode, size))
    transform = create_transform(
        size,
        crop_pct=data.crop_pct,
        crop_mode=data.crop_mode,
        interpolation=data.interpolation,
        mean=mean,
        std=std,
    )
    return transforms.Compose([convert, limit, transform])


def load_released(
    config_path: str | Path,
    checkpoint_path: str | Path,
    image_size: int | Size | None = None,
    num_classes: int | None = None,
) -> nn.Module:
    """Load a published checkpoint with its published configuration.

    Args:
        config_path: the YAML file published with the checkpoint.
        checkpoint_path: the checkpoint, e.g. `model_best.pth`.
        image_size: another (height, width) of the images in pixels, or one number for both; embeddings and
            bias tables are resized bilinearly.
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
    new_head: bool = False,
    features_only: bool = False,
    out_indices: zoo.OutIndices = None,
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
        new_head: keep the head of the checkpoint out; that of the model is new.
        features_only: return a model that maps images to a list of feature maps (B, C, H, W), as in timm.
        out_indices: levels of these features; see `vil.models.zoo.to_features`.
        **options: see `vil.models.zoo.create_model`; None is the default.

    Raises:
        UserError: an unknown name, an impossible combination of options, or a checkpoint that cannot be read
            or does not fit.
    """
    options = {"image_size": image_size, "num_classes": num_classes, **options}
    given = {key: value for key, value in options.items() if value is not None}
    weights = open_weights(checkpoint) if isinstance(checkpoint, str | Path) else checkpoint
    stored: Tree = {}
    if weights is not None and weights.model is not None:
        keys = [field.name for field in fields(weights.model)]
        if name not in (None, weights.model.name):
            keys = ["image_size", "num_classes"]
        values = {key: getattr(weights.model, key) for key in keys}
        stored = {key: value for key, value in values.items() if value is not None}
    if name is None:
        if weights is None:
            raise UserError("name", "is needed without a checkpoint")
        name = weights.require_model().name
    config = zoo.config_from_options({"num_classes": 1000, **stored, **given, "name": name})
    if weights is None and new_head:
        raise UserError("new_head", "requires a checkpoint")
    if out_indices is not None and not features_only:
        raise UserError("out_indices", "requires features_only=True")
    if weights is None:
        model = zoo.model_from_config(config)
    else:
        model = weights.empty_model(config)
        if new_head:
            weights.initialize(model, (), config.size, new_head=True)
            weights = replace(weights, class_names=None)
        else:
            weights.load_into(model, config.size)
        weights.describe(model, config.size, config.in_chans)
    return zoo.to_features(model, config, out_indices) if features_only else model


_NOT_IN_SHAPES = ("dim", "heads", "blocks", "patch", "attention", "global_tokens", "window")
"""Options of a stage that differ between models without a difference in the shapes of their weights, and
those that explain such a difference."""


def load_into_timm_model(model: nn.Module, path: str | Path) -> None:
    """Load a checkpoint into a model that `timm.create_model` has built, also one of features_only.

    Args:
        model: a `MultiScaleViT`, or timm's `FeatureGetterNet` of one.
        path: whatever `open_weights` reads; averaged weights are preferred in checkpoints of timm, as in
            timm.

    Raises:
        UserError: the file cannot be read, or the weights are those of another architecture.
    """
    weights = open_weights(path)
    if weights.format in ("foreign", "published") and weights.kind == "raw":
        with suppress(UserError):  # it has none
            weights = open_weights(path, weights="ema")
    inner: Any = model.model if isinstance(model, FeatureGetterNet) else model
    if weights.model is not None:
        _check_architecture(weights, inner)
    if inner is model:
        weights.load_into(inner)
    else:
        whole = MultiScaleViT(replace(inner.config, num_classes=0), inner.img_size)
        weights.load_into(whole)
        state_dict = whole.state_dict()
        inner.load_state_dict({name: state_dict[name] for name in inner.state_dict()})
    weights.describe(inner, inner.img_size, inner.in_chans)
    if inner is not model:
        cfg: Any = pretrained_cfg_for_features(inner.pretrained_cfg)
        model.pretrained_cfg = model.default_cfg = cfg


def _evaluated_neighbors(config: ModelConfig) -> str:
    """Return the chunks that the local attention sees in evaluation."""
    return "self" if config.neighbors == "self" else "all"


def _check_architecture(weights: Weights, model: MultiScaleViT) -> None:
    """Raise UserError if weights are those of a model that computes something else, with the same shapes."""
    stored = weights.require_model()
    if stored.name.startswith("timm/"):
        raise UserError(weights.path, f"holds a model {stored.name}")
    pairs: list[tuple[str, object, object]] = [
        ("mask", stored.mask or "chunk", model.config.mask or "chunk"),
        ("pool", stored.pool or "avg", model.global_pool or stored.pool or "avg"),
        ("neighbors", _evaluated_neighbors(stored), _evaluated_neighbors(model.config)),
    ]
    stages, built = zoo.resolve_stages(stored), model.config.stages or []
    pairs.append(("stages", len(stages), len(built)))
    for index, (stage, other) in enumerate(zip(stages, built)):
        pairs += [
            (f"stages[{index}].{name}", getattr(stage, name), getattr(other, name))
            for name in _NOT_IN_SHAPES
            if name != "window" or stage.attention == "vision_longformer"
        ]
    for name, value, found in pairs:
        if value != found:
            reason = f"holds a model {stored.name} with {name} {value}, not {found}"
            hint = "give timm.create_model its options, or use vil.create_model(None, checkpoint=...)"
            raise UserError(weights.path, f"{reason}; {hint}")
