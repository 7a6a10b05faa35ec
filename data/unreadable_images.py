"""Record the training images that cannot be read, and limit their number to a fraction of all."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from vil.errors import UserError
from vil.runtime.files import MAX_TEXT_BYTES, open_for_appending
from vil.runtime.run_files import BAD_IMAGES

_logger = logging.getLogger("vil.data")


def max_unreadable_images(fraction: float, num_images: int) -> int:
    """Return how many of `num_images` may be unreadable: at least one, unless the fraction is 0."""
    return max(1, int(fraction * num_images + 1e-9)) if fraction > 0 else 0


@dataclass
class UnreadableImages:
    """The unreadable images of a run, shared by its ranks and by the runs that continue it.

    Attributes:
        num_images: size of the training set.
        max_fraction: largest fraction of it that may be unreadable.
        folder: the run's folder, whose bad_images.txt lists one image per line; None keeps the list in
            memory.
        images: the images that this rank has found or read from the list.
    """

    num_images: int
    max_fraction: float
    folder: Path | None
    images: set[str] = field(default_factory=set)

    def add(self, image: str, reason: str) -> None:
        """Record an image that was skipped. Raises UserError if there are too many."""
        name = image.replace("\n", "\\n").replace("\r", "\\r")
        if name in self.images:
            return
        _logger.warning("skipping %s, which cannot be read: %s", name, reason)
        self.images.add(name)
        listed = f", the last is {name}"
        if self.folder is not None:
            self.images |= _add_to_list(self.folder / BAD_IMAGES, name)
            listed = f", listed in {self.folder / BAD_IMAGES}"
        if len(self.images) > max_unreadable_images(self.max_fraction, self.num_images):
            reason = f"{len(self.images)} of {self.num_images} training images cannot be read{listed}"
            allowed = f"more than the allowed fraction of {self.max_fraction:g}"
            raise UserError("data.max_unreadable_fraction", f"{reason}: {allowed}")


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
