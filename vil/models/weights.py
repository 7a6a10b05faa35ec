"""Weights into a model: strictly, but for what another image size or number of classes asks for."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping

from timm.models import adapt_input_conv, get_pretrained_cfg
from torch import Tensor, nn

from vil.attention.full import FullAttention, resize_offsets
from vil.attention.vision_longformer import VisionLongformerAttention
from vil.config import ConfigError
from vil.models.limits import sized_for
from vil.models.multiscale_vit import MultiScaleViT
from vil.models.position import resize_embedding
from vil.models.released_names import convert_weights
from vil.weight_files import WeightsFile

_WITH_TABLE = (FullAttention, VisionLongformerAttention)
"""Attentions with a bias per head and offset: (heads, 2H−1, 2W−1), H = W = 2 × window for the local one."""

MAX_NAMED = 3
"""Weights of each kind that an error names; it counts the others."""

_logger = logging.getLogger(__name__)


def load_file(
    model: nn.Module, file: WeightsFile, image_size: int | None = None, new_head: bool = False
) -> None:
    """Loads a file of weights into a model that may have another image size or number of classes.

    Embeddings and bias tables are resized bilinearly, without aligned corners (a timm model resizes its own
    in its own way); a head with more rows keeps its first ones. All of it is logged.

    Args:
        model: the model; its class decides about the names of published weights.
        file: the weights.
        image_size: side of the images that `model` is built for, in pixels; needed for models of timm only.
        new_head: a head that does not fit in any other way keeps the weights that it has in `model`.

    Raises:
        ConfigError: anything is missing, unexpected, or of another shape, by name.
    """
    weights: Mapping[str, Tensor] = file.weights
    if isinstance(model, MultiScaleViT):
        if file.origin == "published" or any(name.startswith("layer1.") for name in weights):
            try:
                weights = convert_weights(model, weights)
            except ConfigError as error:
                raise ConfigError(file.path, error.reason) from None
        weights = resized(model, weights)
    weights = _with_head(model, weights, new_head)
    weights = _with_input_channels(model, weights)
    if isinstance(model, MultiScaleViT) or not _problems(model, weights):
        load_weights(model, weights, file.path)
        return
    before = file.model.image_size if file.model is not None else image_size
    if before != image_size and hasattr(model, "set_input_size"):
        try:
            with sized_for(file):
                model.set_input_size((before, before))  # type: ignore[operator]  # exists, as looked up
        except (RuntimeError, ValueError, AssertionError) as error:
            if isinstance(error, ConfigError):
                raise
            reason = f"its images of {before} pixels are no size of this model: {_one_line(error)}"
            raise ConfigError(file.path, reason) from None
        if not _problems(model, weights):
            load_weights(model, weights, file.path)
            model.set_input_size((image_size, image_size))  # type: ignore[operator]
            _logger.info("%s: resized from %s to %s pixels by timm", type(model).__name__, before, image_size)
            return
        model.set_input_size((image_size, image_size))  # type: ignore[operator]
    load_weights(model, _translated(model, weights), file.path)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def head_rows(name: str, weights: Mapping[str, Tensor]) -> int | None:
    """Return how many rows the head has in the weights of a model, by its name; None if they have no head."""
    cfg = get_pretrained_cfg(name.removeprefix("timm/"))
    layers = (cfg and cfg.classifier) or "head"
    weight = weights.get(f"{layers if isinstance(layers, str) else layers[0]}.weight")
    return len(weight) if weight is not None and weight.dim() else None


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Loads a state dict that must fit `model` exactly: same names, same shapes.

    Args:
        model: what to load into; unchanged where the weights do not fit.
        weights: names → tensors.
        source: what to call the weights in errors: the file.

    Raises:
        ConfigError: anything is missing, unexpected, or of another shape; all of it by name, on one line.
    """
    if problems := _problems(model, weights):
        names = [name for kind in ("missing", "unexpected") for name in problems.get(kind, [])]
        other = "architecture" if names else "size"
        counted = [
            f"{len(found)} {kind}: {', '.join(found[:MAX_NAMED])}{', ...' if len(found) > MAX_NAMED else ''}"
            for kind, found in problems.items()
        ]
        raise ConfigError(source, f"does not fit the model, it is of another {other}; {'; '.join(counted)}")
    model.load_state_dict(weights)


def _problems(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return what keeps weights from fitting a model exactly: kind of problem → texts; empty if they fit."""
    expected = model.state_dict()
    common = [name for name in expected if name in weights]
    problems = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [str(name) for name in weights if name not in expected],
        "of another shape": [
            f"{name} is {tuple(weights[name].shape)}, the model's {tuple(expected[name].shape)}"
            for name in common
            if weights[name].shape != expected[name].shape
        ],
        "of another type": [
            f"{name} is of {weights[name].dtype}, the model's of {expected[name].dtype}"
            for name in common
            if weights[name].is_floating_point() != expected[name].is_floating_point()
        ],
    }
    return {kind: found for kind, found in problems.items() if found}


def _with_input_channels(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with the first convolution for the model's number of channels, as timm adapts it."""
    expected, result = model.state_dict(), dict(weights)
    layers = getattr(model, "pretrained_cfg", {}).get("first_conv") or ()
    for layer in [layers] if isinstance(layers, str) else layers:
        name = f"{layer}.weight"
        if name not in expected or name not in weights or weights[name].dim() != expected[name].dim():
            continue
        before, now = weights[name].shape[1], expected[name].shape[1]
        if before == now or 3 not in (before, now) or not weights[name].is_floating_point():
            continue
        try:
            result[name] = adapt_input_conv(now, weights[name])
        except NotImplementedError:  # from other than RGB
            continue
        _logger.info("%s: from %s to %s channels", name, before, now)
    return result


def _translated(model: nn.Module, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return weights as the module of timm that defines the model translates other layouts and sizes.

    What it cannot translate stays as it is, for `load_weights` to report.
    """
    translate = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if translate is None:
        return weights
    try:
        translated: Mapping[str, Tensor] = translate(dict(weights), model)
    except Exception:  # of whatever kind: it expects weights of its own model
        return weights
    if _problems(model, translated):
        return weights
    _logger.info("%s: weights translated by timm", type(model).__name__)
    return translated


def resized(model: MultiScaleViT, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with embeddings and bias tables resized for the maps and windows of the model.

    Row and column embeddings, bias tables of full attention, and those of local attention with another window
    are resized bilinearly, without aligned corners, as the paper's code does. What is resized is logged.
    """
    expected = model.state_dict()
    result = dict(weights)
    for name, value in weights.items():
        target = expected.get(name)
        if target is None or value.shape == target.shape or value.dim() != target.dim():
            continue
        if not value.numel() or not value.is_floating_point():
            continue  # nothing to resize, as load_weights will say
        module, _, _ = name.rpartition(".")
        if name.endswith((".position.rows", ".position.columns")) and value.shape[1] == target.shape[1]:
            fitted = resize_embedding(value, target.shape[0])
        elif name.endswith(".bias_table") and isinstance(model.get_submodule(module), _WITH_TABLE):
            divisor = 2 if isinstance(model.get_submodule(module), FullAttention) else 4
            if value.shape[0] != target.shape[0] or any((side + 1) % divisor for side in value.shape[1:]):
                continue  # of other heads, or no table of offsets
            fitted = resize_offsets(value, ((target.shape[1] + 1) // 2, (target.shape[2] + 1) // 2))
        else:
            continue
        _logger.info("%s: %s → %s", name, tuple(value.shape), tuple(fitted.shape))
        result[name] = fitted
    return result


def _with_head(model: nn.Module, weights: Mapping[str, Tensor], new_head: bool) -> dict[str, Tensor]:
    """The weights with the head's first rows where it has more, or with the model's own head."""
    expected = model.state_dict()
    result = dict(weights)
    layers = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    for layer in [layers] if isinstance(layers, str) else layers:
        names = [f"{layer}.weight", f"{layer}.bias"]
        own = {name: expected[name] for name in names if name in expected}
        given = {name: weights[name] for name in names if name in weights}
        if {n: v.shape for n, v in own.items()} == {n: v.shape for n, v in given.items()}:
            continue
        rows = {
            name: (value[: len(own[name])] if name in own and value.dim() else value)
            for name, value in given.items()
        }
        if own and {n: v.shape for n, v in rows.items()} == {n: v.shape for n, v in own.items()}:
            change = "cut to its first rows"
        elif new_head or not own:
            change, rows = "which begins anew" if own else "left out", own
        else:
            continue
        for name in given.keys() | rows.keys():
            result.pop(name, None)
        result.update(rows)
        for name in names:
            shapes = [tuple(v[name].shape) if name in v else None for v in (given, own)]
            _logger.info("%s: %s → %s, %s", name, *shapes, change)
    return result
