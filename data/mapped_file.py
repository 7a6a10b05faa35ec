"""Arrays in a file that is mapped into memory.

Forked processes share the mapping. Processes that are started otherwise, as data workers are from Python
3.14 on, get an open file in place of the arrays' bytes, and map it as well.
"""

from __future__ import annotations

import mmap
import os
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np

from vil.runtime.files import close_descriptor


class MappedFile:
    """The content of a file, mapped into memory, also after the file is replaced or removed.

    Args:
        descriptor: of the open file, which is not empty; duplicated.

    Raises:
        OSError, ValueError: it cannot be mapped.
    """

    def __init__(self, descriptor: int) -> None:
        self.content = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        self._descriptor = os.dup(descriptor)

    def array(self, dtype: np.dtype[Any], count: int, start: int) -> np.ndarray:
        """Return `count` numbers from byte `start` on, as a view."""
        array = np.frombuffer(self.content, dtype, count, start).view(_MappedArray)
        array.source = self, dtype, count, start
        return array

    def __reduce__(self) -> tuple[Any, ...]:
        return _map_received, (DupFd(self._descriptor),)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            close_descriptor(self._descriptor)


class _MappedArray(np.ndarray):
    """An array in a `MappedFile`; arrays computed from it are not, unless they are the same array."""

    source: tuple[MappedFile, np.dtype[Any], int, int] | None = None

    def __reduce__(self) -> Any:
        if self.source is None or get_spawning_popen() is None:
            return np.asarray(self).__reduce__()
        file, *position = self.source
        return file.array, tuple(position)


def _map_received(received: Any) -> MappedFile:
    descriptor = received.detach()
    try:
        return MappedFile(descriptor)
    finally:
        close_descriptor(descriptor)
