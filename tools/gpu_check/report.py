"""Results of sections: rows of a JSON lines file while they are computed, a short table in the end."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tools.paper_tables import show_table

MAX_LINES = 40
"""Lines of the table, with everything above and below it."""


class NotApplicableError(Exception):
    """A section has nothing to do here; the text says why."""


Status = Literal["passed", "failed", "timed out", "skipped"]


@dataclass(frozen=True)
class Row:
    """One measurement or check.

    Attributes:
        name: what was measured.
        value: the number; None where there is none.
        unit: of the value, and of limit and target.
        limit: a value that it must not exceed, as text; for checks of correctness.
        passed: whether the check holds; None for what is measured only.
        target: a speed to compare with on an H100; missing it is no failure, as other GPUs exist.
        note: anything else that a reader wants to know, on one line.
        shown: in the table, as long as it has room.
    """

    name: str
    value: float | None = None
    unit: str = ""
    limit: str = ""
    passed: bool | None = None
    target: str = ""
    note: str = ""
    shown: bool = True


@dataclass
class Outcome:
    """Outcome of a section."""

    section: str
    status: Status
    seconds: float = 0.0
    reason: str = ""
    rows: list[Row] = field(default_factory=list)

    def as_json(self) -> str:
        """One line; numbers that JSON does not have (NaN, infinities) as text."""
        return json.dumps(_finite(asdict(self)), ensure_ascii=False)


class Report:
    """What a section writes its rows to. Each is in the file at once: a time limit loses none.

    Args:
        path: a file of JSON lines, which this section alone appends to.
        has_targets: False where speeds mean nothing; targets are then left out.
    """

    def __init__(self, path: Path, has_targets: bool = True) -> None:
        self.path, self.has_targets = path, has_targets

    def add(self, name: str, value: float | None = None, unit: str = "", **about: Any) -> None:
        """Append a row; see `Row` for what it may have."""
        row = Row(name, None if value is None else float(value), unit, **about)
        if not self.has_targets:
            row = replace(row, target="")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(asdict(row)), ensure_ascii=False) + "\n")

    def check(self, name: str, value: float, limit: float, unit: str = "", **about: Any) -> None:
        """Append a row that passes if `value` is `limit` at most. NaN does not pass."""
        self.add(name, value, unit, limit=f"≤ {limit:g}", passed=bool(value <= limit), **about)

    @property
    def failed(self) -> bool:
        """Return True if a check failed, in this process or another one that appends to the file."""
        return any(row.passed is False for row in read_rows(self.path))

    def expect(self, name: str, holds: bool, note: str = "", **about: Any) -> None:
        """Append a row that passes if `holds`."""
        self.add(name, passed=bool(holds), note=note, **about)


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a section, also of one that was stopped while it wrote."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                rows.append(Row(**json.loads(line)))
    return rows


def table(outcomes: Sequence[Outcome]) -> str:
    """Return at most `MAX_LINES` - 4 lines: every section's status, its failures, then what else has room."""
    lines: list[tuple[int, dict[str, str]]] = []  # how soon it is left out, and the cells
    for outcome in outcomes:
        failed = sum(row.passed is False for row in outcome.rows)
        checks = sum(row.passed is not None for row in outcome.rows)
        count = f"{checks - failed} of {checks} checks" if checks else ""
        note = "; ".join(filter(None, (count, outcome.reason)))
        lines.append((0, _cells(outcome.section, "", outcome.status, f"{outcome.seconds:.0f} s", "", note)))
        for row in outcome.rows:
            if row.passed is False or row.shown:
                mark = {None: "", True: "passed", False: "FAILED"}[row.passed]
                against = row.limit or (f"target {row.target}" if row.target else "")
                cells = _cells("", row.name, mark, _number(row), against, row.note)
                rank = 1 if row.passed is False else 2 if row.target else 3 if row.passed else 4
                lines.append((rank, cells))
    room = MAX_LINES - 6  # the table's own two lines, the two above and below, one for what was left out
    keep = sorted(range(len(lines)), key=lambda number: (lines[number][0], number))[:room]
    text = show_table([lines[number][1] for number in sorted(keep)])
    left = len(lines) - len(keep)
    return text + (f"\n{left} more in the JSON lines" if left > 0 else "")


def _cells(section: str, name: str, status: str, value: str, against: str, note: str) -> dict[str, str]:
    return {
        "section": section, "what": name[:44], "status": status, "value": value, "limit": against,
        "note": " ".join(note.split())[:90],
    }  # fmt: skip


def _number(row: Row) -> str:
    if row.value is None:
        return ""
    value = row.value if isinstance(row.value, float | int) else float(row.value)
    return f"{value:.4g} {row.unit}".strip()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
