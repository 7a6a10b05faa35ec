"""Numbers and digests of a data set, by which ranks compare what they have read."""

from __future__ import annotations

import hashlib
import os

import numpy as np

from data.sources import Source
from vil.runtime import consistency
from vil.runtime.distributed import Process

_CHUNK = 65_536


def check_same_images(key: str, sources: dict[str, Source], root: str | None, process: Process) -> None:
    """Raise UserError for the option `key` on every rank if a rank has read other images than rank 0.

    All ranks compare numbers, the first one of each machine digests; see `fingerprint_sources`.
    """
    has_digests = process.local_rank == 0
    consistency.check_data(key, lambda: fingerprint_sources(sources, root, has_digests))


def fingerprint_sources(sources: dict[str, Source], root: str | None, has_digests: bool) -> dict[str, str]:
    """Return number of images by noun, then SHA-256 of the class names, and of image names and targets.

    Args:
        sources: noun, such as "training images" → source.
        root: `data.root`, which is not a part of the names: it may differ between machines.
        has_digests: False for the numbers alone; names of a million images take a second.
    """
    found = {noun: str(len(source)) for noun, source in sources.items()}
    if has_digests:
        names = "\0".join(next(iter(sources.values())).class_names)
        found["class names"] = hashlib.sha256(names.encode("utf-8", "surrogatepass")).hexdigest()
        found |= {f"{noun} (names or classes)": _digest(source, root) for noun, source in sources.items()}
    return found


def _digest(source: Source, root: str | None) -> str:
    digest = hashlib.sha256()
    prefix = None if root is None else os.path.join(os.path.expanduser(root), "")
    for start in range(0, len(source), _CHUNK):
        names = "\0".join(source.name(index) for index in range(start, min(start + _CHUNK, len(source))))
        digest.update(
            (names if prefix is None else names.replace(prefix, "")).encode("utf-8", "surrogatepass")
        )
        digest.update(np.ascontiguousarray(source.targets[start : start + _CHUNK], dtype=np.int64).tobytes())
    return digest.hexdigest()
