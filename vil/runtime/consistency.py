"""Check that the ranks of a job agree on code, libraries, options, images and weights.

Ranks with different code or images would train the wrong model without an error.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

from vil.errors import UserError
from vil.runtime.distributed import all_gather_object, is_distributed

MACHINE_OPTIONS = ("data.root", "data.workers", "data.index", "device")
"""Options that may differ between machines."""
_ROOT = Path(__file__).parents[2]
_PACKAGES = ("vil", "data")
_LIBRARIES = ("torch", "torchvision", "timm", "numpy", "pillow")
_MISSING = "no value"


class InconsistentRanksError(UserError):
    """Ranks differ in something that must be equal; `lines` has one line per difference."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("", lines[0])
        self.lines = list(lines)


@functools.cache
def code_digest() -> str:
    """Return the SHA-256 of the source files of this project's packages, in hexadecimal digits."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((_ROOT / package).rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(_ROOT).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def dependency_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that results depend on."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in _LIBRARIES}}


def check_software(version: str) -> list[str]:
    """Raise InconsistentRanksError if code or PyTorch differ; return warnings about other libraries.

    Versions of a library may round differently: a run is then not reproducible bit by bit.

    Args:
        version: of this project.
    """
    if not is_distributed():
        return []
    local = {"vil": f"{version}, SHA-256 {code_digest()[:12]}", **dependency_versions()}
    ranks = all_gather_object((socket.gethostname(), local))
    first, versions = ranks[0]
    warnings: dict[str, None] = {}
    for rank, (host, other) in enumerate(ranks):
        names = f"rank {rank} ({host})", f"rank 0 ({first})"
        if other["vil"] != versions["vil"]:
            reason = (
                f"{names[0]} runs different vil code ({other['vil']}) than {names[1]} ({versions['vil']})"
            )
            raise InconsistentRanksError([reason])
        if other["torch"].partition("+")[0] != versions["torch"].partition("+")[0]:
            reason = f"{names[0]} has torch {other['torch']}, {names[1]} has torch {versions['torch']}"
            raise InconsistentRanksError([reason])
        for name, version in other.items():
            if version != versions[name]:
                line = f"{name} {version} on {host}, {versions[name]} on {first}: not reproducible bit by bit"
                warnings[f"warning: {line}"] = None
    return list(warnings)


@dataclass(frozen=True)
class RankOptions:
    """The options of one rank, by dotted key.

    Attributes:
        values: all of them.
        assigned: those that the command line assigns.
        is_stored: True if the others are those of a run's stored configuration.
    """

    values: Mapping[str, object]
    assigned: Mapping[str, object]
    is_stored: bool


def check_options(local: RankOptions) -> None:
    """Raise InconsistentRanksError if an option that is not of `MACHINE_OPTIONS` differs from rank 0's.

    If the run continues, rank 0's stored configuration is used, which other machines may not see: only the
    options that the command line assigns are compared.
    """
    ranks = all_gather_object((socket.gethostname(), local))
    first, main = ranks[0]
    lines: dict[str, str] = {}
    for rank, (host, other) in enumerate(ranks):
        is_stored = other.is_stored or main.is_stored
        values, expected = (given.assigned if is_stored else given.values for given in (other, main))
        for key in {**expected, **values}:
            value, wanted = values.get(key, _MISSING), expected.get(key, _MISSING)
            if value != wanted and key not in (*MACHINE_OPTIONS, *lines):
                names = f"rank {rank} ({host})", f"rank 0 ({first})"
                lines[key] = f"{key}: {value} of {names[0]} differs from {wanted} of {names[1]}"
    if lines:
        raise InconsistentRanksError(list(lines.values()))


def check_data(key: str, describe: Callable[[], Mapping[str, str]]) -> None:
    """Raise UserError if the data of a rank is not that of rank 0.

    Args:
        key: the option that names the data, for the error.
        describe: returns descriptions, such as "81 training images", and digests by a noun, such as "training
            images"; called on the first rank of each machine.
    """
    if not is_distributed():
        return
    ranks = all_gather_object((socket.gethostname(), describe()))
    first, expected = ranks[0]
    for rank, (host, found) in enumerate(ranks):
        for noun, value in found.items():
            if value == expected[noun]:
                continue
            names = f"rank {rank} ({host})", f"rank 0 ({first})"
            if value.isdecimal():
                reason = f"{names[0]} has {value} {noun}, {names[1]} has {expected[noun]}"
            else:
                reason = f"{names[0]} has different {noun} than {names[1]}"
            raise UserError(key, reason)


def check_weights(key: str, model: nn.Module) -> None:
    """Raise UserError if the weights of a model on a rank are not those on rank 0."""
    check_data(key, lambda: {"weights": model_digest(model)})


def model_digest(model: nn.Module, description: str = "") -> str:
    """Return the SHA-256 of a text and of the state dict of a model: names, types, shapes and values."""
    digest = hashlib.sha256(description.encode())
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
