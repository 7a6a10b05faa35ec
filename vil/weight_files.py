"""Files of weights, of whichever kind, read without running anything that is in them.

A run's folder and its checkpoints (`vil.training.checkpoint`), safetensors with the model's configuration in
the metadata, and the checkpoints published with the paper. What a file holds may come from a stranger:
whatever is wrong with it ends in a `ConfigError` of one line.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vil import checkpoint_files, safe_pickle
from vil.config import ConfigError, DataConfig, EvalConfig, ModelConfig
from vil.runtime import files
from vil.schema import STORED, check_plain, validate, without_start_options

TRANSFORM = ("crop_pct", "interpolation", "mean", "std")
"""The options of a data section that belong to a model: how its images are brought to it."""

NO_MODEL = "does not hold its model; add the configuration published with it, or name the model"
"""What is wrong with a file whose `WeightsFile.model` is None, where one is needed."""

_DTYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}
"""What a weight may be; whether it must be a floating-point number is the model's to say."""

MAX_IMAGE_SIZE = 8192
"""Side of the images of a stored model, in pixels."""
MAX_HEADER_BYTES = 1 << 23
"""Length of the header of safetensors; with 600 tensors and the names of 21,841 classes it has 0.6 MB."""

Choice = Literal["auto", "raw", "ema"]


@dataclass(frozen=True)
class WeightsFile:
    """What a file of weights holds.

    Attributes:
        path: the file.
        origin: `run` for a checkpoint of train.py, `converted` for safetensors, `published` for one of the
            paper's, whose weights have names of their own and whose configuration is another file, `foreign`
            for one of another program.
        kind: the weights as the optimiser left them (`raw`), or their moving average (`ema`).
        weights: names → tensors on the CPU.
        model: the model that the weights belong to; None where the file does not say.
        data: options of the data section: all of a run's, else those of `TRANSFORM`, or nothing.
        class_names: names of the classes in the order of the head's rows; None where the file does not say.
    """

    path: str
    origin: Literal["run", "converted", "published", "foreign"]
    kind: str
    weights: Mapping[str, Tensor]
    model: ModelConfig | None = None
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    class_names: tuple[str, ...] | None = None


def read(path: str | Path, which: Literal["best", "last"] = "best", weights: Choice = "auto") -> WeightsFile:
    """Reads the weights of a file, or of the `which` checkpoint of a run's folder.

    Args:
        path: a run's folder, a checkpoint of train.py, safetensors, or a published checkpoint.
        which: which checkpoint of a folder.
        weights: raw or ema; auto takes the kind that was best.

    Raises:
        ConfigError: the file is missing, damaged, of no known kind, holds more than tensors and plain values,
            or weights that are not finite; or it lacks the kind of weights that is asked for.
    """
    file = find_checkpoint(path, which)
    found = _read_safetensors(file) if _is_safetensors(file) else _read_checkpoint(file, weights)
    if weights not in ("auto", found.kind):
        raise ConfigError(str(file), f"holds {found.kind} weights only, not {weights}")
    if not found.weights:
        raise ConfigError(str(file), "holds no weights")
    for name, value in found.weights.items():
        if problem := _unusable(name, value):
            raise ConfigError(str(file), problem)
    return found


def _unusable(name: Any, value: Any) -> str | None:
    """What keeps a pair of a name and a tensor, as a stranger's file may hold it, from being a weight."""
    if not isinstance(name, str) or not name.isprintable():
        return f"not a checkpoint: {_shown(repr(name))} is no name of a weight"
    if not isinstance(value, Tensor):
        return f"not a checkpoint: {name} is not a tensor"
    if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided or value.is_nested:
        return f"{name} is no plain tensor but a {type(value).__name__} of layout {value.layout}"
    if value.device.type != "cpu":
        return f"{name} has no values: it was saved from the device {value.device.type}"
    if value.is_quantized or value.dtype not in _DTYPES:
        return f"{name} is of {value.dtype}, which is not supported; convert it to torch.float32"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"{name} is of shape {tuple(value.shape)}, of which the file holds a part only"
    if value.is_floating_point() and not value.isfinite().all():
        return f"{name} holds values that are not finite"
    return None


def find_checkpoint(path: str | Path, which: Literal["best", "last"] = "best") -> Path:
    """The checkpoint file of a run's folder: the best, or the newest that is whole; a file is itself.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    given = Path(path)
    try:
        exists = given.exists()
    except (OSError, ValueError) as error:  # a name that is too long, or holds a null byte
        raise ConfigError(str(path), getattr(error, "strerror", None) or str(error)) from None
    if not exists:
        raise ConfigError(str(path), "no such file or folder")
    if not given.is_dir():
        file = given
    elif which == "best":
        file = given / checkpoint_files.BEST
        if not file.is_file():
            raise ConfigError(str(path), f"the folder holds no {checkpoint_files.BEST}")
    else:
        found = checkpoint_files.newest(given, lambda file: None)
        if found is None:
            raise ConfigError(str(path), f"the folder holds no {checkpoint_files.FOLDER}/step_….pt")
        return found[0]
    checkpoint_files.check_digest(file)
    return file


def choose_weights(state: Mapping[str, Any], weights: Choice = "auto") -> tuple[Mapping[str, Tensor], str]:
    """Return a state dict of a run's checkpoint, and whether it is `raw` or `ema`.

    auto takes the kind that was best, or the raw weights where a continued run no longer keeps an average.

    Raises:
        ConfigError: the average of the weights is asked for and was not kept.
    """
    if weights == "auto":
        weights = state["best"]["weights"] if state["best"] and state["ema"] is not None else "raw"
    if weights == "raw":
        return state["model"], "raw"
    if state["ema"] is None:
        raise ConfigError(
            "weights", "the checkpoint has no ema weights: its run had no schedule.ema_decay; use raw"
        )
    return state["ema"], "ema"


def read_pickle(path: str | Path) -> Any:
    """What `torch.save` wrote, as long as it is made of tensors and plain values; tensors are on the CPU.

    Raises:
        ConfigError: the file is missing, empty, damaged, no checkpoint, or holds anything else, which is
            never executed.
    """
    try:
        with files.open_regular(path) as file:
            start = file.read(2)
            if not start:
                raise ConfigError(str(path), "the file is empty")
            if start == b"PK" and not zipfile.is_zipfile(file):  # a zip's directory is at its end
                raise ConfigError(str(path), "damaged: not a checkpoint, or one that was cut off")
            if start != b"PK" and start[0] != pickle.PROTO[0]:
                raise ConfigError(str(path), "not a checkpoint: neither a zip, a pickle nor safetensors")
            file.seek(0)
            check = safe_pickle.check_zip if start == b"PK" else safe_pickle.check_legacy
            check(file)
            file.seek(0)
            inert: list[Any] = [(replacement, name) for name, replacement in safe_pickle.INERT.items()]
            with warnings.catch_warnings(), torch.serialization.safe_globals(inert):
                warnings.simplefilter("ignore")  # one line is said here, or nothing
                return torch.load(file, map_location="cpu", weights_only=True)
    except ConfigError:
        raise
    except safe_pickle.RefusedPickleError as error:
        reason = "holds something other than tensors and plain values, which is refused, or is damaged"
        raise ConfigError(str(path), str(error) or reason) from None
    except FileNotFoundError:
        raise ConfigError(str(path), "no such file") from None
    except pickle.UnpicklingError:
        reason = "holds something other than tensors and plain values, which is refused, or is damaged"
        raise ConfigError(str(path), reason) from None
    except OSError as error:
        raise checkpoint_files.UnreadableFileError(str(path), error) from None
    except Exception as error:  # a damaged file may fail anywhere inside torch.load, with any type of error
        raise ConfigError(str(path), f"damaged or not a checkpoint: {_first_line(error)}") from None


def write_safetensors(path: str | Path, file: WeightsFile) -> None:
    """Writes weights with their model, transform and class names, as `read` reads them back.

    Everything but the weights is JSON in the metadata, under `model`, `data`, `class_names` and `weights`.
    `path` holds the old content or the new, whatever happens.

    Raises:
        ConfigError: the file cannot be written.
    """
    path = Path(path)
    model = file.model and dataclasses.replace(file.model, init_from=None, init_released_config=None)
    metadata = {
        "format": "pt",
        "model": json.dumps(model and dataclasses.asdict(model)),
        "data": json.dumps({key: file.data[key] for key in TRANSFORM if key in file.data}),
        "class_names": json.dumps(file.class_names),
        "weights": json.dumps(file.kind),
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in file.weights.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_output(path, save(tensors, metadata))
    except (OSError, SafetensorError) as error:
        raise ConfigError(str(path), f"cannot be written: {_first_line(error)}") from None


def model_section(values: Any) -> ModelConfig:
    """Return a stored model section, a mapping, as a configuration; every key, type and range is checked.

    What only starts a run (`init_from`, and timm's options that load weights) is left out: a file of weights
    needs none of it.

    Raises:
        ConfigError: an unknown key or a value of another type.
    """
    try:
        check_plain(values)
        if isinstance(values, Mapping):
            values = without_start_options(values)
        model = validate(EvalConfig, {"model": values}).model
        if not 1 <= model.image_size <= MAX_IMAGE_SIZE:
            reason = f"expected 1 to {MAX_IMAGE_SIZE:,} pixels, got {model.image_size}"
            raise ConfigError("model.image_size", reason)
        return model
    except ConfigError as error:
        raise ConfigError(error.key or "model", error.reason, STORED) from None


def _read_checkpoint(path: Path, weights: Choice) -> WeightsFile:
    content = read_pickle(path)
    if isinstance(content, Mapping) and isinstance(content.get("net"), Mapping):
        file = _foreign(path, content, weights)
        is_published = any(isinstance(name, str) and name.startswith("layer1.") for name in file.weights)
        return dataclasses.replace(file, origin="published") if is_published else file
    lacking = {"model", "ema", "best", "config", "class_names"}
    if isinstance(content, Mapping):
        lacking -= content.keys()
        if "class_names" in lacking:
            return _foreign(path, content, weights)
    if lacking:
        reason = f"lacks {', '.join(sorted(lacking))}"
        raise ConfigError(str(path), f"not a checkpoint of train.py: {reason}")
    try:
        chosen, kind = choose_weights(content, weights)
        stored, names = content["config"], _texts(content["class_names"])
        model, data = stored["model"], dict(stored["data"])
        weights_of_names = dict(chosen)
    except ConfigError:
        raise
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ConfigError(str(path), f"damaged: {_first_line(error)} in the checkpoint") from None
    return WeightsFile(str(path), "run", kind, weights_of_names, _of_file(path, model), data, names)


_RAW_KEYS, _EMA_KEYS = ("state_dict", "model", "net"), ("state_dict_ema", "model_ema", "ema")
_PREFIXES = ("module.", "_orig_mod.")
"""Prefixes that DistributedDataParallel and torch.compile put in front of names."""


def _foreign(path: Path, content: Mapping[Any, Any], weights: Choice) -> WeightsFile:
    """Return the weights of a checkpoint of another program, as timm, DeiT and Swin write them.

    They lie under a key, raw or averaged, or are the content itself; `auto` takes the raw ones if there are
    any. Prefixes of wrappers are removed.

    Raises:
        ConfigError: there are none, or not the kind that is asked for.
    """

    def is_state_dict(value: Any) -> bool:
        return isinstance(value, Mapping) and any(isinstance(inner, Tensor) for inner in value.values())

    found = {"raw": [content[key] for key in _RAW_KEYS if is_state_dict(content.get(key))]}
    found["ema"] = [content[key] for key in _EMA_KEYS if is_state_dict(content.get(key))]
    if not found["raw"] and not found["ema"]:
        found["raw"] = [content] if is_state_dict(content) else []
    kinds = [kind for kind in ("raw", "ema") if found[kind] and weights in ("auto", kind)]
    if not kinds:
        if held := [kind for kind in found if found[kind]]:
            raise ConfigError(str(path), f"holds {held[0]} weights only, not {weights}")
        keys = ", ".join((*_RAW_KEYS, *_EMA_KEYS))
        raise ConfigError(
            str(path), f"not a checkpoint: it holds no weights, neither itself nor under {keys}"
        )
    named = {}
    for name, value in found[kinds[0]][0].items():
        while isinstance(name, str) and name.startswith(_PREFIXES):
            name = name.partition(".")[2]
        named[name] = value
    return WeightsFile(str(path), "foreign", kinds[0], named)


def _texts(names: Any) -> tuple[str, ...]:
    """Names of classes. Raises TypeError where they are no list of texts."""
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError("class_names is no list of texts")
    return tuple(names)


def _is_safetensors(path: Path) -> bool:
    """By its content: the length of the header in eight bytes, then JSON; or by a name that promises it."""
    try:
        with files.open_regular(path) as file:
            start = file.read(9)
    except OSError:  # which is said when it is read
        return False
    return start[8:] == b"{" or (path.suffix == ".safetensors" and len(start) > 0)


def _read_safetensors(path: Path) -> WeightsFile:
    try:
        with files.open_regular(path) as opened:
            length = int.from_bytes(opened.read(8), "little")
        if MAX_HEADER_BYTES < length < path.stat().st_size:
            raise ConfigError(str(path), f"not safetensors of a model: a header of {length:,} bytes")
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror or _first_line(error)}") from None
    except Exception as error:  # a damaged file may fail anywhere inside the library
        raise ConfigError(str(path), f"damaged or not safetensors: {_first_line(error)}") from None
    try:
        stored = {
            key: files.parse_json(metadata.get(key, "null"))
            for key in ("model", "data", "class_names", "weights")
        }
        names = None if stored["class_names"] is None else _texts(stored["class_names"])
        data = dict(stored["data"] or {})
        if not data.keys() <= set(TRANSFORM):
            raise ValueError
    except (ValueError, TypeError, RecursionError):
        raise ConfigError(str(path), "its metadata are not those of tools/convert.py") from None
    return WeightsFile(
        path=str(path),
        origin="converted",
        kind="ema" if stored["weights"] == "ema" else "raw",
        weights=weights,
        model=None if stored["model"] is None else _of_file(path, stored["model"]),
        data=data,
        class_names=names,
    )


def _of_file(path: Path, values: Any) -> ModelConfig:
    try:
        return model_section(values)
    except ConfigError as error:
        raise ConfigError(str(path), str(error)) from None


def transform_of(data: DataConfig) -> dict[str, Any]:
    """The options of a data section that belong to a model."""
    return {key: getattr(data, key) for key in TRANSFORM}


def _shown(text: str, most: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
