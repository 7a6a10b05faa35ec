"""A model that cannot be: more weights than the machine has memory, or more layers than anyone builds."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn.modules import module as hooks

from vil.config import ConfigError

MOST_LAYERS = 100_000
"""Modules of a model; the largest of timm have some thousand."""
MOST = 1_000_000
"""The largest number that an option of an architecture may be."""


def memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextmanager
def buildable(key: str) -> Iterator[None]:
    """Stops the building of a model inside once it has outgrown the machine.

    Weights are counted as they are registered, which PyTorch's layers do before they are filled.

    Raises:
        ConfigError: of the option `key`: the model takes more memory, or more layers, than there can be.
    """
    limit, built, layers = memory(), 0, 0
    too_large = f"takes more memory for its weights than the {limit / 1e9:.0f} GB of this machine"

    def count_weights(module: Any, name: str, value: Tensor | None) -> None:
        nonlocal built
        built += 0 if value is None else value.numel() * value.element_size()
        if built > limit:
            raise ConfigError(key, too_large)

    def count_layers(module: Any, name: str, value: Any) -> None:
        nonlocal layers
        layers += 1
        if layers > MOST_LAYERS:
            raise ConfigError(key, f"has more than {MOST_LAYERS:,} layers")

    handles = [
        hooks.register_module_parameter_registration_hook(count_weights),
        hooks.register_module_buffer_registration_hook(count_weights),
        hooks.register_module_module_registration_hook(count_layers),
    ]
    try:
        yield
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
