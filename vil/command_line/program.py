"""Run a program of this project: exit status, one line on standard error, results written durably."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from vil.config import COMMAND_LINE, ConfigError, printable
from vil.console import finish, say
from vil.runtime import files


class OneRankError(ConfigError):
    """A ConfigError of which the other ranks may know nothing."""


@contextmanager
def reading_images() -> Iterator[None]:
    """Makes what is raised inside about the data an `OneRankError`: each rank reads images of its own."""
    try:
        yield
    except ConfigError as error:
        if error.key.startswith("data."):
            raise OneRankError(error.key, error.reason, error.origin) from error
        raise


def main(program: Callable[[Sequence[str]], None]) -> NoReturn:
    """Runs `program` with the words of the command line, and ends the process as every program here does.

    Exit status 2 and one line on standard error for a ConfigError, 1 where the memory of the machine or of
    its GPU is not enough, 130 for Ctrl-C. Of several processes that torchrun starts on one machine, the first
    one speaks, and each one of what it alone may know. What the package logs meanwhile is printed.
    """
    status, line = 0, None
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what its encoding lacks is replaced: no line is lost
            stream.reconfigure(errors="replace")
    rank, speaks = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0") == "0"
    screen, logger = _Screen(), logging.getLogger("vil")
    if rank == "0":
        logger.addHandler(screen)
        logger.setLevel(logging.INFO)
    try:
        program(sys.argv[1:])
    except SystemExit as ended:
        if not isinstance(ended.code, int):
            raise
        status = ended.code
    except ConfigError as error:
        status, line = 2, f"error: {error}"
        if isinstance(error, OneRankError) and rank != "0":
            speaks, line = True, f"[rank {rank}] {line}"
    except KeyboardInterrupt:
        status, line = 130, "interrupted"
    except Exception as error:
        reason = out_of_memory(error)
        if reason is not None:
            line = f"error: {reason}; smaller batches or images, or a smaller model, need less"
            if rank != "0":
                speaks, line = True, f"[rank {rank}] {line}"
        elif _has_process_group():
            traceback.print_exc()
        else:
            raise
        status = 1
    finally:
        logger.removeHandler(screen)
    if line is not None and speaks:
        say(" ".join(printable(line).split()), sys.stderr)
    finish()
    if _has_process_group():  # left after an error: it would wait for the other ranks, perhaps for ever
        os._exit(status)
    raise SystemExit(status)


def _has_process_group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def write_output(path: Path, content: str | bytes, option: str = "") -> None:
    """Write a result, and the folders above it; `path` holds the old content or all of the new.

    A device, a pipe and /dev/stdout are written to, and not replaced.

    Args:
        path: the file.
        content: text, written as UTF-8, or bytes.
        option: what to name in the error, where it was an option that named the file.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_output(path, content)
    except OSError as error:
        reason = f"cannot be written: {error.strerror or error}"
        raise ConfigError(*((option, f"{path} {reason}") if option else (str(path), reason))) from None


def out_of_memory(error: Exception) -> str | None:
    """What an error of Python, of PyTorch on a CPU or on a GPU says that had too little memory, on one line;
    None for any other."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    if isinstance(error, MemoryError) or any(some in str(error) for some in words):
        return f"out of memory: {(str(error).splitlines() or ['MemoryError'])[0]}"
    return None


class _Screen(logging.Handler):
    """Log records as lines on standard output, among those that a program prints itself."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


class ToolParser(argparse.ArgumentParser):
    """An argument parser of the standard library whose complaints are `ConfigError`s of one line."""

    def error(self, message: str) -> NoReturn:
        """Raises the complaint instead of printing it with the usage."""
        raise ConfigError("", message, COMMAND_LINE)

    def add_checkpoint(self) -> None:
        """Adds the arguments of `vil.models.released.open_model`: which weights to read."""
        self.add_argument(
            "checkpoint", help="run folder, checkpoint of train.py, safetensors, or published checkpoint"
        )
        self.add_argument("--released-config", metavar="YAML", help="configuration of a published checkpoint")
        self.add_argument("--weights", choices=("auto", "raw", "ema"), default="auto",
                          help="which weights of a run; auto takes the kind that was best")  # fmt: skip
        self.add_argument("--which", choices=("best", "last"), default="best",
                          help="which checkpoint of a run's folder")  # fmt: skip
