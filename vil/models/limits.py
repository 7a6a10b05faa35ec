"""Limits of a model's size: the machine's memory, the size of the file that describes it, the layer count."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn.modules import module as hooks

from vil.config import ConfigError
from vil.weight_files import WeightsFile

MAX_GROWTH, MAX_EXTRA_BYTES = 4, 256_000_000
"""Factor and bytes by which the model that a file describes may exceed the weights in it."""
MOST_LAYERS = 100_000
"""Modules of a model; the largest of timm have some thousand."""
MOST = 1_000_000
"""The largest number that an option of an architecture may be."""


class _LimitExceeded(BaseException):
    """Ends the building of a model; no Exception, which timm's models would take for one of their own.

    Args:
        owner: the context whose limit it is.
        reason: what is exceeded.
    """

    def __init__(self, owner: object, reason: str) -> None:
        super().__init__(reason)
        self.owner, self.reason = owner, reason


def memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextmanager
def sized_for(file: WeightsFile) -> Iterator[None]:
    """Stop the building of a model inside once it is much larger than the weights that are to be loaded.

    A file of a kilobyte may describe a model of gigabytes; the weights that it holds could not fit that.
    Float16 weights, tables resized for other images and another head leave room up to
    `MAX_GROWTH` × the file's weights + `MAX_EXTRA_BYTES`.

    Raises:
        ConfigError: of the file: the model that it describes does not belong to its weights.
    """
    storages = [weight.untyped_storage() for weight in file.weights.values()]
    size = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    limit = MAX_GROWTH * size + MAX_EXTRA_BYTES
    reason = (
        f"describes a model of more than {limit / 1e6:,.0f} MB, and holds {size / 1e6:,.1f} MB of weights"
    )
    with buildable(file.path, limit, reason):
        yield


@contextmanager
def buildable(key: str, limit: int | None = None, too_large: str | None = None) -> Iterator[None]:
    """Stop the building of a model inside once it has outgrown the machine, or `limit`.

    Weights are counted as they are registered, which PyTorch's layers do before they are filled.

    Args:
        key: the option, or the file, that the error names.
        limit: bytes of weights; None is the memory of this machine.
        too_large: the reason to give.

    Raises:
        ConfigError: of `key`: the model takes more memory, or more layers, than there can be.
    """
    owner = object()
    limit, built, layers = limit if limit is not None else memory(), 0, 0
    too_large = (
        too_large or f"takes more memory for its weights than the {limit / 1e9:.0f} GB of this machine"
    )

    def count_weights(module: Any, name: str, value: Tensor | None) -> None:
        nonlocal built
        built += 0 if value is None else value.numel() * value.element_size()
        if built > limit:
            raise _LimitExceeded(owner, too_large)

    def count_layers(module: Any, name: str, value: Any) -> None:
        nonlocal layers
        layers += 1
        if layers > MOST_LAYERS:
            raise _LimitExceeded(owner, f"has more than {MOST_LAYERS:,} layers")

    handles = [
        hooks.register_module_parameter_registration_hook(count_weights),
        hooks.register_module_buffer_registration_hook(count_weights),
        hooks.register_module_module_registration_hook(count_layers),
    ]
    try:
        yield
    except _LimitExceeded as error:
        if error.owner is not owner:  # the limit of a context around this one
            raise
        raise ConfigError(key, error.reason) from None
    except MemoryError:
        raise ConfigError(key, too_large) from None
    except RuntimeError as error:
        if not any(words in str(error) for words in ("allocate", "enough memory", "overflow")):
            raise
        raise ConfigError(key, too_large) from None  # a single weight that is larger than the memory
    finally:
        for handle in handles:
            handle.remove()


def check_numbers(options: Mapping[str, Any]) -> None:
    """Raises ConfigError for an option that is, or holds, a number above `MOST` or none at all."""
    for key, option in options.items():
        waiting = [option]
        while waiting:
            value = waiting.pop()
            if isinstance(value, Mapping):
                waiting += value.values()
            elif isinstance(value, list | tuple):
                waiting += value
            elif dataclasses.is_dataclass(value):
                waiting += vars(value).values()
            elif isinstance(value, int | float) and not abs(value) <= MOST:  # as it is for nan
                raise ConfigError(key, f"numbers must be from -{MOST:,} to {MOST:,}, got {value}")
