"""Markdown tables that are also readable as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vil.runtime.console import pad, text_width


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return rows (heading → cell) as a Markdown table; all columns but the first are right-aligned."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(text_width, column)) for column in zip(*lines)]
    text = [
        "| " + " | ".join([pad(line[0], widths[0], is_left=True), *map(pad, line[1:], widths[1:])]) + " |"
        for line in lines
    ]
    rule = "|" + "|".join([":" + "-" * (widths[0] + 1), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([text[0], rule, *text[1:]])
