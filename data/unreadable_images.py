"""Record the training images that cannot be read, and limit their number to a fraction of all."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from pathlib import Path

from vil.config import UserError
from vil.runtime.files import MAX_TEXT_BYTES, open_for_appending
from vil.runtime.run_files import BAD_IMAGES

_logger = logging.getLogger("vil.data")


def max_unreadable_images(fraction: float, num_images: int) -> int:
    """Return how many of `num_images` may be unreadable: at least one, unless the fraction is 0."""
    return max(1, int(fraction * num_images + 1e-9)) if fraction > 0 else 0


class UnreadableImages:
    """The unreadable images of a run, shared by its ranks and by the runs that continue it.

    Args:
        num_images: size of the training set.
        max_fraction: largest fraction of it that may be unreadable.
        folder: the run's folder, whose bad_images.txt lists one image per line; None keeps the list in
            memory.

    Attributes:
        images: the images that this rank has found or read from the list.
    """

    def __init__(self, num_images: int, max_fraction: float, folder: Path | None) -> None:
        self._num_images = num_images
        self._max_fraction = max_fraction
        self._path = None if folder is None else folder / BAD_IMAGES
        self.images: set[str] = set()

    def add(self, image: str, reason: str) -> None:
        """Record an image that was skipped.

        Raises:
            UserError: too many images are unreadable, or the list cannot be written.
        """
        name = image.replace("\n", "\\n").replace("\r", "\\r")
        if name in self.images:
            return
        _logger.warning("skipping %s, which cannot be read: %s", name, reason)
        self.images.add(name)
        if self._path is not None:
            self.images |= _add_to_list(self._path, name)
        if len(self.images) > max_unreadable_images(self._max_fraction, self._num_images):
            listed = f", listed in {self._path}" if self._path else f", the last is {name}"
            raise UserError(
                "data.max_unreadable_fraction",
                f"{len(self.images)} of {self._num_images} training images cannot be read{listed}: "
                f"more than the allowed fraction of {self._max_fraction:g}",
            )


def _add_to_list(path: Path, name: str) -> set[str]:
    """Append a name to the list unless another process has, and return the names in it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = open_for_appending(path)
        with open(descriptor, "a+", encoding="utf-8", errors="surrogateescape") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_size > MAX_TEXT_BYTES:
                raise OSError(errno.EFBIG, f"is larger than {MAX_TEXT_BYTES:,} bytes")
            file.seek(0)
            listed = set(file.read().split("\n")) - {""}
            if name not in listed:
                file.write(f"{name}\n")
            return listed
    except OSError as error:
        raise UserError("output", f"{path} cannot be written: {error.strerror}") from None
