"""Files of text that a configuration names: lists of images, labels."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def read_text(path: Path, errors: str = "strict") -> str:
    """Read the text of a file, or of a pipe, in UTF-8, without a byte order mark (BOM) at its start.

    Of a device, which may have no end, nothing is read.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not in UTF-8, and `errors`, as of `open`, is strict; or its name holds a null byte.
    """
    with path.open(encoding="utf-8-sig", errors=errors) as file:
        if stat.S_ISCHR(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "is a device, and no file of text")
        return file.read()
