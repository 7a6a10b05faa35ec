"""Command lines and YAML files → a validated configuration; errors → one line and an exit status."""

from vil.command_line.line import COMMAND_LINE_KEYS, CommandLine, Line, file_origin, parse
from vil.command_line.program import (
    OneRankError,
    ToolParser,
    main,
    out_of_memory,
    reading_images,
    write_output,
)
from vil.config import COMMAND_LINE

__all__ = [
    "COMMAND_LINE",
    "COMMAND_LINE_KEYS",
    "CommandLine",
    "Line",
    "OneRankError",
    "ToolParser",
    "file_origin",
    "main",
    "out_of_memory",
    "parse",
    "reading_images",
    "write_output",
]
