"""Options of eval.py for tools, after their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vil.command_line import ParsedArguments
from vil.config import EvalConfig
from vil.errors import COMMAND_LINE, UserError
from vil.runtime import distributed
from vil.runtime.distributed import Process
from vil.runtime.precision import choose_precision, set_deterministic

EVALUATION_OPTIONS = frozenset(
    {"batch_size", "device", "precision", "deterministic", "progress", "channels_last"}
)
"""Options of eval.py that these tools have, with those of the section data."""


def parse_evaluation_options(
    argv: Sequence[str], prog: str, extra_options: frozenset[str] = frozenset()
) -> ParsedArguments[EvalConfig]:
    """Parse options of eval.py: `EVALUATION_OPTIONS`, those of the section data, and `extra_options`.

    Raises:
        UserError: another option.
    """
    args = ParsedArguments(EvalConfig, argv, prog)
    known = EVALUATION_OPTIONS | {"data"} | extra_options
    for assignment in args.assignments:
        if assignment.key not in known and assignment.key.partition(".")[0] not in known:
            name = assignment.key or "config"
            raise UserError(f"--{name}", f"is not an option of {prog}", COMMAND_LINE)
    return args


def check_order(argv: Sequence[str], checkpoints: Sequence[str], others: Sequence[str]) -> None:
    """Raise UserError if an option of eval.py precedes a checkpoint, which may be its value."""
    if others and any(argv.index(others[0]) < argv.index(path) for path in checkpoints):
        raise UserError(others[0], "options of eval.py follow the checkpoints", COMMAND_LINE)


@contextmanager
def start_single_process(config: EvalConfig) -> Iterator[Process]:
    """Yield the only process, with the precision and the algorithms of the configuration.

    Raises:
        UserError: torchrun has started several.
    """
    with distributed.start(config.device) as process:
        if process.world_size > 1:
            raise UserError("", "runs in a single process; start it without torchrun")
        choose_precision(config.precision, process.device)
        set_deterministic(config.deterministic)
        yield process
