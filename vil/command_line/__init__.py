"""Command lines and YAML files → a validated configuration; errors → one line and an exit status."""

from vil.command_line.arguments import file_origin
from vil.command_line.eval_command import resolve_eval_command
from vil.command_line.program import (
    ToolParser,
    bounded_int,
    errors_of_one_rank,
    main,
    out_of_memory,
    run_program,
)
from vil.command_line.resolution import COMMAND_LINE_KEYS, ParsedArguments, ResolvedConfig, parse
from vil.command_line.train_command import resolve_train_command

__all__ = [
    "COMMAND_LINE_KEYS",
    "ParsedArguments",
    "ResolvedConfig",
    "ToolParser",
    "bounded_int",
    "errors_of_one_rank",
    "file_origin",
    "main",
    "out_of_memory",
    "parse",
    "resolve_eval_command",
    "resolve_train_command",
    "run_program",
]
