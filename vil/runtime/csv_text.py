"""CSV that a spreadsheet reads as text, whatever is in it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from typing import Any

_FORMULA_STARTS = tuple("=+-@\t\r\n＝＋－＠")
"""Source: OWASP, CSV Injection, https://owasp.org/www-community/attacks/CSV_Injection."""


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Return the rows as CSV, with one line feed after each.

    A text that a spreadsheet could take for a formula, as `=HYPERLINK(…)`, gets an apostrophe in front.
    Numbers are written as they are, None as an empty cell.
    """
    return "".join(_line([_cell(value) for value in row]) for row in rows)


def _line(row: list[Any]) -> str:
    line = io.StringIO()
    # Before Python 3.13 only the characters of the line terminator are quoted, and a lone \r begins a row.
    csv.writer(line, lineterminator="\r\n").writerow(row)
    return f"{line.getvalue().removesuffix(chr(13) + chr(10))}\n"


def _cell(value: Any) -> Any:
    is_formula = isinstance(value, str) and value.lstrip(" ").startswith(_FORMULA_STARTS)
    return f"'{value}" if is_formula else value
