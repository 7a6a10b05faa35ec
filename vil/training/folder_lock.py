"""One run at a time in a folder."""

from __future__ import annotations

import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from vil.config import ConfigError
from vil.runtime.files import open_for_appending, read_bytes

try:
    import fcntl
except ImportError:  # a system without POSIX locks: nobody is kept out
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"

PATIENCE = 10.0
"""Seconds to wait for the process that holds the folder: one that was killed may still be ending."""


class FolderLock:
    """Holds a folder for this process, until `release` or until the process ends, however it ends.

    A POSIX record lock: the system gives it up when the process is killed, data workers do not inherit it,
    and NFS passes it on to other machines.

    Args:
        folder: made where it does not exist; removed again by `release`, while it holds nothing.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._descriptor: int | None = None
        self._made: list[Path] = []

    def acquire(self) -> None:
        """Takes the folder.

        Raises:
            ConfigError: another process has it, which is named, or the folder cannot be written.
        """
        folder = self._path.parent
        try:
            missing = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            self._made = missing
            deadline = time.monotonic() + PATIENCE
            while not self._try():
                if time.monotonic() > deadline:
                    raise ConfigError("output", f"{folder} is in use: {self._holder()}")
                time.sleep(0.1)
        except OSError as error:
            self.release(remove=True)
            reason = f"{error.filename or folder} cannot be written: {error.strerror}"
            raise ConfigError("output", reason) from None

    def release(self, remove: bool) -> None:
        """Gives the folder up; with `remove` also takes away what `acquire` made, as far as it is empty."""
        if remove and (self._descriptor is not None or fcntl is None):
            with suppress(OSError):
                self._path.unlink()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if remove:
            with suppress(OSError):
                for path in self._made:
                    path.rmdir()

    def _try(self) -> bool:
        descriptor = open_for_appending(self._path)  # what lies there is changed once it is held
        try:
            if fcntl is not None:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino != os.lstat(self._path).st_ino:  # removed by who had it before
                raise BlockingIOError
        except (BlockingIOError, PermissionError, FileNotFoundError):
            os.close(descriptor)
            return False
        except OSError:  # a file system without locks
            os.close(descriptor)
            return True
        words = f"{Path(sys.argv[0]).name}, process {os.getpid()} on {socket.gethostname()}"
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{words} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
        self._descriptor = descriptor
        return True

    def _holder(self) -> str:
        try:
            return read_bytes(self._path, 4096).decode("utf-8", "replace").strip() or "by another process"
        except OSError:
            return "by another process"
