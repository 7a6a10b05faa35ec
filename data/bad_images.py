"""The training images that could not be read: listed once each, and not too many."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from pathlib import Path

from vil.config import ConfigError
from vil.runtime.files import MAX_TEXT_BYTES, open_for_appending

FILE = "bad_images.txt"
_logger = logging.getLogger("vil.data")  # a child of vil, whose records are shown


def allowed_bad_images(share: float, num_images: int) -> int:
    """Return how many images may be unreadable: a share of them, and one at least unless the share is 0."""
    return max(1, int(share * num_images + 1e-9)) if share > 0 else 0


class BadImages:
    """Keeps the list of a run, which all its ranks and all its continuations share.

    Args:
        num_images: size of the training set.
        most: the largest share of it that may be unreadable; one image at least, unless it is 0.
        folder: the run's; the list is its bad_images.txt, one image a line. None keeps it in memory.

    Raises:
        ConfigError: `most` is no share.
    """

    def __init__(self, num_images: int, most: float, folder: Path | None) -> None:
        if not 0 <= most <= 1:
            raise ConfigError("data.max_bad", f"expected a share of the images in [0, 1], got {most}")
        self._num_images = num_images
        self._most = most
        self._path = None if folder is None else folder / FILE
        self.images: set[str] = set()
        """Those known to this rank."""

    def add(self, image: str, reason: str) -> None:
        """Notes an image that was skipped.

        Raises:
            ConfigError: there are too many by now, or the list cannot be written.
        """
        name = image.replace("\n", "\\n").replace("\r", "\\r")
        if name in self.images:
            return
        _logger.warning("skipping %s, which cannot be read: %s", name, reason)
        self.images.add(name)
        if self._path is not None:
            self._share(name)
        if len(self.images) > allowed_bad_images(self._most, self._num_images):
            listed = f", listed in {self._path}" if self._path else f", the last is {name}"
            raise ConfigError(
                "data.max_bad",
                f"{len(self.images)} of {self._num_images} training images cannot be read{listed}: "
                f"more than the share of {self._most:g} that is allowed",
            )

    def _share(self, name: str) -> None:
        """Takes over what others have listed, and adds the name if it is not among it."""
        assert self._path is not None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = open_for_appending(self._path)
            with open(descriptor, "a+", encoding="utf-8", errors="surrogateescape") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if os.fstat(descriptor).st_size > MAX_TEXT_BYTES:
                    raise OSError(errno.EFBIG, f"is larger than {MAX_TEXT_BYTES:,} bytes")
                file.seek(0)
                listed = set(file.read().split("\n")) - {""}
                if name not in listed:
                    file.write(f"{name}\n")
        except OSError as error:
            raise ConfigError("output", f"{self._path} cannot be written: {error.strerror}") from None
        self.images |= listed
