"""Safetensors with the model, the transform and the class names in their metadata."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from vil.checkpoints.training_state import WeightsKind
from vil.checkpoints.weights import Weights
from vil.errors import UserError, error_reason
from vil.runtime.files import open_regular, parse_json, write_output
from vil.validation import without_start_options

MAX_HEADER_BYTES = 1 << 23
"""Length of the header; 0.6 MB with 600 tensors and the names of 21,841 classes."""

_METADATA_KEYS = ("model", "data", "class_names", "weights")


def is_safetensors(path: Path) -> bool:
    """Return True if a file starts like safetensors, or is named so: eight bytes of length, then JSON."""
    try:
        with open_regular(path) as file:
            start = file.read(9)
    except OSError:  # reported by the reader
        return False
    return start[8:] == b"{" or (path.suffix == ".safetensors" and len(start) > 0)


def read_safetensors(path: Path) -> Weights:
    """Return the content of a file of safetensors; one without the metadata of this project has no model."""
    try:
        with open_regular(path) as opened:
            length = int.from_bytes(opened.read(8), "little")
        if MAX_HEADER_BYTES < length < path.stat().st_size:
            raise UserError("", f"not safetensors of a model: a header of {length:,} bytes")
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state_dict = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except UserError:
        raise
    except OSError as error:
        raise UserError("", f"cannot be read: {error_reason(error)}") from None
    except Exception as error:  # the library raises any type for a damaged file
        raise UserError("", f"damaged or not safetensors: {error_reason(error)}") from None
    try:
        stored = {key: parse_json(metadata.get(key, "null")) for key in _METADATA_KEYS}
        kind: WeightsKind = "ema" if stored.pop("weights") == "ema" else "raw"
        weights = Weights.from_stored("safetensors", kind, state_dict, **stored)
        if weights.data:
            raise ValueError
    except UserError:
        raise
    except (ValueError, TypeError, RecursionError):
        raise UserError("", "its metadata are not those of tools/export.py") from None
    return weights


def write_safetensors(
    path: str | Path, weights: Weights, extra_metadata: Mapping[str, object] | None = None
) -> None:
    """Write weights with their model, transform, class names and `extra_metadata` as JSON in the metadata.

    `path` holds the old content or the new at every moment; its folder is created.
    """
    path = Path(path)
    metadata = {
        "format": "pt",
        "model": json.dumps(weights.model and without_start_options(dataclasses.asdict(weights.model))),
        "data": json.dumps(dict(weights.transform)),
        "class_names": json.dumps(weights.class_names),
        "weights": json.dumps(weights.kind),
        **{key: json.dumps(value) for key, value in (extra_metadata or {}).items()},
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.state_dict.items()}
    try:
        content = save(tensors, metadata)
    except SafetensorError as error:
        raise UserError(str(path), f"cannot be written: {error_reason(error)}") from None
    write_output(path, content)
