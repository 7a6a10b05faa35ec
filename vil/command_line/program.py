"""Run a program of this project: exit status, one line on standard error, atomic results."""

from __future__ import annotations

import argparse
import errno
import io
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal, NoReturn, ParamSpec, TypeVar

import vil
from vil.errors import COMMAND_LINE, UserError, error_reason, printable
from vil.runtime import launch
from vil.runtime.console import flush_streams, open_standard_streams, print_line
from vil.validation import MAX_DIGITS

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


MACHINE_LOGGER = "vil.data.index"
"""Logger whose records concern one machine: each may wait for its own index of the images."""


class OneRankError(UserError):
    """A UserError that may concern one rank alone."""


@contextmanager
def errors_of_one_rank() -> Iterator[None]:
    """Turn an error about the data into `OneRankError`: each rank reads other images."""
    try:
        yield
    except UserError as error:
        if error.location.startswith("data.") or error.location == "eval_sets":
            raise OneRankError(error.location, error.reason, error.origin) from error
        raise


def run_program(
    program: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
) -> Result:
    """Call a program and return its result; end the process if it raises.

    Exit status 2 and one line on standard error for a UserError, `exit_status` of an exception that has one,
    1 if the machine or its GPU is out of memory or too many files are open, 130 for Ctrl-C. Of the processes
    that torchrun starts on one machine the first one prints the line, and for a `OneRankError` the one that
    raised it; an error that repeats after a restart by torchrun is not printed again. Other ranks that wait
    for this one get the line.
    Log records of the package are printed by rank 0, and those of `MACHINE_LOGGER` by the first process of
    each machine.
    """
    open_standard_streams()
    status, line = 0, None
    more_lines: list[str] = []
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that the encoding lacks are replaced
            stream.reconfigure(errors="replace")
    rank, prints = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0") == "0"
    handler, logger = _ConsoleHandler(), logging.getLogger("vil" if rank == "0" else MACHINE_LOGGER)
    if rank == "0" or prints:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        return program(*args, **kwargs)
    except SystemExit as ended:
        if not isinstance(ended.code, int):
            raise
        status = ended.code
    except UserError as error:
        status, line = 2, f"error: {error}"
        more_lines = [f"error: {text}" for text in getattr(error, "lines", [])[1:]]
        if isinstance(error, OneRankError) and rank != "0":
            prints, line = True, f"[rank {rank}] {line}"
    except KeyboardInterrupt:
        status, line = 130, "interrupted"
    except Exception as error:
        status = 1
        if isinstance(exit_status := getattr(error, "exit_status", None), int):
            status, line = exit_status, str(error) if exit_status > 128 else f"error: {error}"
        elif reason := out_of_memory(error):
            line = f"error: {reason}; smaller batches or images, or a smaller model, need less"
            if rank != "0":
                prints, line = True, f"[rank {rank}] {line}"
        elif getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
            line = f"error: {error_reason(error)}; raise the limit (ulimit -n), or use fewer worker processes"
        elif _has_process_group():
            traceback.print_exc()
        else:
            raise
    finally:
        logger.removeHandler(handler)
    if line is not None:
        line = " ".join(printable(line).split())
        if prints and not _is_repeated_failure(line):
            for text in (line, *more_lines):
                print_line(text, sys.stderr)
        flush_streams()
        _report_failure(line, status)
    flush_streams()
    if _has_process_group():  # left after an error: destroying it could wait for the other ranks forever
        os._exit(status)
    raise SystemExit(status)


def main(program: Callable[[list[str]], object]) -> NoReturn:
    """Run a program with the arguments of the command line, then end the process with status 0."""
    run_program(program, sys.argv[1:])
    flush_streams()
    raise SystemExit(0)


def _has_process_group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _is_repeated_failure(line: str) -> bool:
    """Return True if torchrun has restarted this process after it ended with this line."""
    with suppress(UserError):  # of the environment
        if launch.restart_count() > 0:
            from vil.runtime.rendezvous import is_repeated_failure

            return is_repeated_failure(line)
    return False


def _report_failure(line: str, status: int) -> None:
    """Tell the other ranks of the job, which may wait for this one, and later restarts of it."""
    with suppress(UserError):  # of the environment
        if launch.must_report_failure(status):
            from vil.runtime.rendezvous import report_failure

            report_failure(line, status)


def out_of_memory(error: Exception) -> str | None:
    """Return one line about an out-of-memory error of Python or PyTorch; None for other errors."""
    texts = ("out of memory", "can't allocate memory", "not enough memory")
    if isinstance(error, MemoryError) or any(text in str(error) for text in texts):
        return f"out of memory: {error_reason(error)}"
    return None


class _ConsoleHandler(logging.Handler):
    """Print log records on standard output."""

    def emit(self, record: logging.LogRecord) -> None:
        print_line(self.format(record))


def bounded_int(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """Return an argparse type for integers from `minimum` to `maximum`, both included and not negative.

    They have at most `MAX_DIGITS` digits, as in configurations.
    """
    limits = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"

    def parse(text: str) -> int:
        if text.isdecimal() and len(text) > MAX_DIGITS:
            raise argparse.ArgumentTypeError(f"expected an integer {limits}, of at most {MAX_DIGITS} digits")
        if not text.isdecimal() or int(text) < minimum or (maximum is not None and int(text) > maximum):
            raise argparse.ArgumentTypeError(f"expected an integer {limits}, got {text!r}")
        return int(text)

    return parse


class ToolParser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` with --version that keeps the line ends of its description.

    Its errors are `UserError`s.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.add_argument("--version", action="version", version=f"vil {vil.__version__}")

    def error(self, message: str) -> NoReturn:
        """Raise the error instead of printing it with the usage."""
        raise UserError("", message, COMMAND_LINE)

    def add_checkpoint(self, nargs: Literal["?", "+"] | None = None) -> None:
        """Add the arguments that select weights: those of `vil.checkpoints.open_weights`.

        The checkpoint is optional with `?`, and one of several with `+`.
        """
        self.add_argument(
            "checkpoint",
            nargs=nargs,
            help="run folder, checkpoint of train.py, safetensors, or published checkpoint",
        )
        self.add_argument("--released-config", metavar="YAML", help="configuration of a published checkpoint")
        self.add_argument(
            "--weights",
            choices=("auto", "raw", "ema"),
            default="auto",
            help="raw weights of a run or their moving average; auto is the better one in evaluation",
        )
        self.add_argument(
            "--run-checkpoint", choices=("best", "last"), default="best", help="checkpoint of a run's folder"
        )
