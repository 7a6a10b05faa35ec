"""CSV without formulas: a spreadsheet reads every text as text."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

_FORMULA_STARTS = tuple("=+-@\t\r\n＝＋－＠")
"""Source: OWASP, CSV Injection, https://owasp.org/www-community/attacks/CSV_Injection."""


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Return the rows as CSV, each with a line feed at its end.

    An apostrophe is added to texts that a spreadsheet would evaluate, such as `=HYPERLINK(…)`. None is
    an empty cell.
    """
    return "".join(_line([_cell(value) for value in row]) for row in rows)


def _line(row: list[object]) -> str:
    line = io.StringIO()
    # Before Python 3.13 only the characters of the line terminator are quoted, and a lone \r begins a row.
    csv.writer(line, lineterminator="\r\n").writerow(row)
    return f"{line.getvalue().removesuffix(chr(13) + chr(10))}\n"


def _cell(value: object) -> object:
    is_formula = isinstance(value, str) and value.lstrip(" ").startswith(_FORMULA_STARTS)
    return f"'{value}" if is_formula else value
