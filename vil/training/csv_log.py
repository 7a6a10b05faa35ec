"""metrics.csv: the numbers of metrics.jsonl as a table, one row per record.

A failure after the start never ends the training.
"""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from vil.config import Tree
from vil.errors import error_reason
from vil.runtime.csv_text import csv_text
from vil.runtime.files import MAX_TEXT_BYTES, close_descriptor, open_for_appending, read_text, write_durably

_FIRST_COLUMNS = ("kind", "step", "epoch")
_logger = logging.getLogger(__name__)


class CsvLog:
    """Write metrics.csv anew from the records of a run, then append a row for each new record.

    A record with new keys adds columns. Texts and lists are left out.

    Args:
        path: the file.
        records: records of metrics.jsonl until now.

    Raises:
        OSError: the file cannot be written, or is a link.
    """

    def __init__(self, path: Path, records: Sequence[Tree]) -> None:
        self._path = path
        self._columns = list(_FIRST_COLUMNS)
        self._file: int | None = None
        os.close(open_for_appending(path))  # refuses a link
        self._rewrite([_cells(record) for record in records if is_number_record(record)])

    def add_record(self, record: Tree) -> None:
        """Append a row."""
        if self._file is None:
            return
        row = _cells(record)
        try:
            if row.keys() <= set(self._columns):
                os.write(self._file, self._text([row]).encode())
            else:
                self._rewrite([*self._read_rows(), row])
        except (OSError, csv.Error) as error:
            self.close()
            reason = error_reason(error)
            _logger.warning("warning: %s cannot be written: %s; no more is written", self._path, reason)

    def flush(self) -> None:
        """Do nothing: every row is written at once."""

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            close_descriptor(self._file)
            self._file = None

    def _read_rows(self) -> list[Tree]:
        """Return the rows of the file, with numbers as numbers; bytes that are not UTF-8 are replaced."""
        reader = csv.DictReader(io.StringIO(read_text(self._path, MAX_TEXT_BYTES, errors="replace")))
        # Cells beyond the columns have the key None.
        return [{key: _parse(cell) for key, cell in row.items() if key is not None} for row in reader]

    def _rewrite(self, rows: Sequence[Mapping[str, object]]) -> None:
        self.close()
        self._columns = list(dict.fromkeys([*self._columns, *(key for row in rows for key in row)]))
        write_durably(self._path, csv_text([self._columns]) + self._text(rows))
        self._file = open_for_appending(self._path)

    def _text(self, rows: Sequence[Mapping[str, object]]) -> str:
        return csv_text([row.get(column) for column in self._columns] for row in rows)


def is_number_record(record: Tree) -> bool:
    """Return True for a record of a step or an evaluation, False for a changed option."""
    return bool(record["kind"] != "options")


def _cells(record: Tree) -> Tree:
    return {k: v for k, v in record.items() if k == "kind" or isinstance(v, int | float)}


def _parse(cell: str | None) -> float | str | None:
    """Return a cell as a number if it is one: `csv_text` marks a text that begins with a minus sign."""
    for number_type in (int, float):
        with suppress(TypeError, ValueError):
            return number_type(cell)  # type: ignore[arg-type]
    return cell
