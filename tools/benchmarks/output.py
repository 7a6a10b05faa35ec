"""Markdown tables and CSV files of benchmark records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tools.markdown_table import markdown_table
from vil.runtime.csv_text import csv_text
from vil.runtime.files import write_output

Record = Mapping[str, Any]
"""Flat figures of one method. Missing figures are None, and explained by the key `note`."""


class Column(NamedTuple):
    """A column of a table."""

    heading: str
    key: str
    format: str = "{}"


@dataclass(frozen=True)
class Results:
    """Results of a benchmark.

    Attributes:
        notes: lines that describe how the figures were measured.
        tables: records of each table, by heading.
        columns: columns of the tables.
        has_failed: True for exit status 1.
    """

    notes: Sequence[str]
    tables: Mapping[str, Sequence[Record]] = field(default_factory=dict)
    columns: Sequence[Column] = ()
    has_failed: bool = False

    def __str__(self) -> str:
        parts = ["\n".join(self.notes)]
        for heading, records in self.tables.items():
            parts += [heading, table(records, self.columns)] if heading else [table(records, self.columns)]
        return "\n\n".join(parts)


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """Return the quotient; None if a number is missing or the denominator is 0."""
    return None if numerator is None or not denominator else numerator / denominator


def table(records: Sequence[Record], columns: Sequence[Column]) -> str:
    """Return a table of the records, followed by their notes."""

    def cell(record: Record, column: Column) -> str:
        return "n/a" if record[column.key] is None else column.format.format(record[column.key])

    rows = [{column.heading: cell(record, column) for column in columns} for record in records]
    notes = [f"- {record[columns[0].key]}: {record['note']}" for record in records if record["note"]]
    return "\n".join([markdown_table(rows), *([""] if notes else []), *notes])


def write_csv(path: str, results: Results) -> None:
    """Write a line per record; missing figures are empty."""
    records = [record for table_records in results.tables.values() for record in table_records]
    write_output(Path(path), csv_text([list(records[0]), *(record.values() for record in records)]), "--csv")
