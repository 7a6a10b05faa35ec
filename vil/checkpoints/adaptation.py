"""Adaptation of a state dict to a model: head, input channels, layouts of timm; strict loading."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence

from timm.models import adapt_input_conv
from torch import Tensor, nn

from vil.errors import UserError

MAX_NAMED_WEIGHTS = 3
"""Weights of each kind that an error names; it counts the others."""

HEADS = ("head", "head_dist")
"""Heads of a model without a configuration of timm; a distilled one has both."""

_logger = logging.getLogger(__name__)


def load_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict that must have exactly the names and shapes of a model.

    Raises:
        UserError: weights from the file `source` are missing, unexpected, or of another shape; one line that
            names them. The model is unchanged.
    """
    if mismatches := find_mismatches(model, state_dict):
        named = [name for kind in ("missing", "unexpected") for name in mismatches.get(kind, [])]
        difference = "architecture" if named else "size"
        counted = [
            f"{len(names)} {kind}: {', '.join(names[:MAX_NAMED_WEIGHTS])}"
            f"{', ...' if len(names) > MAX_NAMED_WEIGHTS else ''}"
            for kind, names in mismatches.items()
        ]
        reason = f"does not fit the model, it is of another {difference}"
        raise UserError(source, f"{reason}; {'; '.join(counted)}")
    model.load_state_dict(state_dict)


def find_mismatches(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return the differences between a state dict and that of a model, by kind; empty if it fits."""
    expected = model.state_dict()
    common = [name for name in expected if name in state_dict]
    mismatches = {
        "missing": [name for name in expected if name not in state_dict],
        "unexpected": [str(name) for name in state_dict if name not in expected],
        "of another shape": [
            f"{name} is {tuple(state_dict[name].shape)}, the model's {tuple(expected[name].shape)}"
            for name in common
            if state_dict[name].shape != expected[name].shape
        ],
        "of another type": [
            f"{name} is of {state_dict[name].dtype}, the model's of {expected[name].dtype}"
            for name in common
            if state_dict[name].is_floating_point() != expected[name].is_floating_point()
        ],
    }
    return {kind: names for kind, names in mismatches.items() if names}


def as_list(names: str | Sequence[str]) -> list[str]:
    """Return the names of one or several layers, as timm's configurations give them, as a list."""
    return [names] if isinstance(names, str) else list(names)


def layer_names(model: nn.Module, key: str, default: str | Sequence[str]) -> list[str]:
    """Return the names of the layers that timm's configuration of a model lists under `key`."""
    return as_list(getattr(model, "pretrained_cfg", {}).get(key) or default)


def _shapes(state_dict: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state_dict.items()}


def adapt_head(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut a head with more rows to its first ones; drop it for a model without one."""
    expected, result = model.state_dict(), dict(state_dict)
    for layer in layer_names(model, "classifier", HEADS):
        names = [f"{layer}.weight", f"{layer}.bias"]
        current = {name: expected[name] for name in names if name in expected}
        given = {name: state_dict[name] for name in names if name in state_dict}
        if _shapes(current) == _shapes(given):
            continue
        adapted = {
            name: value[: len(current[name])] if name in current and value.dim() else value
            for name, value in given.items()
        }
        if current and _shapes(adapted) == _shapes(current):
            change = "first rows kept"
        elif not current:
            change, adapted = "dropped", {}
        else:
            continue
        for name in given.keys() | adapted.keys():
            result.pop(name, None)
        result.update(adapted)
        for name in names:
            shapes = (_shapes(given).get(name), _shapes(current).get(name))
            _logger.info("%s: %s → %s, %s", name, *shapes, change)
    return result


def adapt_input_channels(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adapt the first convolution to the model's number of channels, as timm does."""
    expected, result = model.state_dict(), dict(state_dict)
    for layer in layer_names(model, "first_conv", ()):
        name = f"{layer}.weight"
        if name not in expected or name not in result or result[name].dim() != expected[name].dim():
            continue
        old, new = result[name].shape[1], expected[name].shape[1]
        if old == new or 3 not in (old, new) or not result[name].is_floating_point():
            continue
        try:
            result[name] = adapt_input_conv(new, result[name])
        except NotImplementedError:  # from neither 1 nor 3 channels
            continue
        _logger.info("%s: from %s to %s channels", name, old, new)
    return result


def filter_by_timm(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the result of timm's `checkpoint_filter_fn` of a model; the state dict itself if it fails."""
    translate = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if translate is None:
        return dict(state_dict)
    try:
        translated: dict[str, Tensor] = translate(dict(state_dict), model)
    except Exception:  # of any type, for weights of another model
        return dict(state_dict)
    return translated


def translate_by_timm(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Translate other layouts and sizes by timm's `checkpoint_filter_fn`, if the result fits the model."""
    translated = filter_by_timm(model, state_dict)
    if translated.keys() == state_dict.keys() and _shapes(translated) == _shapes(state_dict):
        return state_dict
    if find_mismatches(model, translated):
        return state_dict
    _logger.info("%s: weights translated by timm", type(model).__name__)
    return translated
