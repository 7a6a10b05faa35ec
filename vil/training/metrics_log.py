"""metrics.jsonl: one JSON object per logged step, evaluation, loss spike and changed option.

Each line is written at once. A line that a full disk refuses stays in memory, and is written before the next
one. On resume, the lines of steps after the checkpoint are removed.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from vil.config import Tree
from vil.runtime.files import open_for_appending, parse_json, read_lines, write_durably

TIMING_FIELDS = ("time", "step_time", "data_wait", "images_per_second", "seconds")
"""Fields that depend on the clock; all others are bit-identical between identical runs.

`time` is in seconds since 1970; `step_time` and `data_wait` in seconds per step, averaged since the last
logged step; `images_per_second` counts the global batch; `seconds` is the length of an evaluation.
"""

_logger = logging.getLogger(__name__)


class MetricsLog:
    """Append records to metrics.jsonl durably.

    Args:
        path: the file, after `cut_metrics`.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # Without a buffer, the number of bytes that a full disk accepts is known exactly.
        self._file = os.fdopen(open_for_appending(path), "ab", buffering=0)
        self._synced_bytes = self._file.tell()
        self._pending, self._unsynced = bytearray(), bytearray()
        self._lock = threading.Lock()  # the thread that writes a checkpoint flushes the log, too
        self._has_warned = False

    def write(self, record: Mapping[str, object]) -> None:
        """Append one line; keep it in memory if the disk refuses it."""
        # JSON has no NaN and no infinity, as of an overflow in float16: null.
        values = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        self._pending += (json.dumps(values, allow_nan=False) + "\n").encode()
        try:
            self._write_pending()
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                reason = f"{self._path} cannot be written: {error.strerror}"
                _logger.warning("warning: %s; its records stay in memory, training continues", reason)

    def flush(self) -> None:
        """Write and fsync all records.

        Raises:
            OSError: the disk refuses, or the file was replaced.
        """
        self._write_pending()
        with self._lock:
            self._sync()
        if os.stat(self._path).st_ino != os.fstat(self._file.fileno()).st_ino:
            raise OSError(errno.ENOENT, "the file was replaced")

    def finish(self) -> str | None:
        """Flush at the end of a run; return one line if records cannot be written."""
        try:
            self.flush()
        except OSError as error:
            return f"{self._path} cannot be written: {error.strerror}"
        return None

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # which `finish` reported
            self._write_pending()
        with suppress(OSError):
            self._file.close()

    def _write_pending(self) -> None:
        with self._lock:
            while self._pending:
                content = bytes(self._pending)  # the training thread may append a record at the same time
                count = self._file.write(content)
                self._unsynced += content[:count]
                del self._pending[:count]

    def _sync(self) -> None:
        """Run fsync; put records back that were written but cannot be stored (a quota of NFS)."""
        count = len(self._unsynced)
        try:
            os.fsync(self._file.fileno())
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file.fileno(), self._synced_bytes)
                self._pending[:0] = self._unsynced
                self._unsynced.clear()
            raise
        self._synced_bytes += count
        del self._unsynced[:count]


def cut_metrics(path: Path, step: int, is_evaluated: bool) -> list[Tree]:
    """Remove the records of later steps from metrics.jsonl, and a line that a crash cut; return the others.

    Args:
        path: the file; it need not exist.
        step: finished steps of the checkpoint that the run continues from.
        is_evaluated: False removes evaluations after `step` itself, which will be repeated.
    """
    # Options that a continued run changes are compared with those of the checkpoint, and written again.
    last_steps = {"validation": step if is_evaluated else step - 1, "options": step - 1}
    kept = []
    try:
        for line in read_lines(path):
            record = _parse_record(line)
            if record is None:
                continue
            kind = record["kind"].partition("/")[0]  # of validation/<set>, an evaluation too
            if 0 < record["step"] <= last_steps.get(kind, step):
                kept.append((line, record))
    except FileNotFoundError:
        return []
    write_durably(path, "".join(line for line, _ in kept))
    return [record for _, record in kept]


def _parse_record(line: str) -> Tree | None:
    """Parse a line of metrics.jsonl; return None for one that a crash cut."""
    try:
        record = parse_json(line) if line.endswith("\n") else None
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    return record if type(record.get("step")) is int else None
