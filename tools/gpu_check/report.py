"""Results of sections: rows in a JSON lines file while a section runs, and a table in the end."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tools.markdown_table import markdown_table

MAX_LINES = 40
"""Lines of the table, with the text above and below it."""


class NotApplicableError(Exception):
    """The section cannot run on this machine, or with these options."""


@dataclass(frozen=True)
class Row:
    """A measurement or check.

    Attributes:
        name: measured quantity or checked property.
        value: number, if there is one.
        unit: unit of the value, the limit and the target.
        limit: upper limit of the value, for checks.
        passed: result of a check; None for a measurement.
        target: speed to expect of an H100. Missing it is not a failure.
        note: additional facts, on one line.
        shown: list the row in the table if there is room.
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
    status: Literal["passed", "failed", "timed out", "skipped"]
    seconds: float = 0.0
    reason: str = ""
    rows: list[Row] = field(default_factory=list)

    def as_json(self) -> str:
        """Return one line of JSON; NaN and infinities become text."""
        return json.dumps(_finite(asdict(self)), ensure_ascii=False)


class Report:
    """Writer of a section's rows. Each is in the file at once: none is lost if the section is stopped.

    Without `has_targets`, on a machine whose speed is irrelevant, targets are dropped.
    """

    def __init__(self, path: Path, has_targets: bool = True) -> None:
        self.path, self.has_targets = path, has_targets

    def add(
        self, name: str, value: float | None = None, unit: str = "", target: str = "", **fields: Any
    ) -> None:
        """Append a row; `fields` are those of `Row`."""
        value = None if value is None else float(value)
        row = Row(name, value, unit, target=target if self.has_targets else "", **fields)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(asdict(row)), ensure_ascii=False) + "\n")

    def check(self, name: str, value: float, limit: float, **fields: Any) -> None:
        """Append a row that passes if `value` ≤ `limit`; NaN does not pass."""
        self.add(name, value, limit=f"≤ {limit:g}", passed=bool(value <= limit), **fields)

    def expect(self, name: str, condition: bool, note: str = "", **fields: Any) -> None:
        """Append a row that passes if `condition` is true."""
        self.add(name, passed=bool(condition), note=note, **fields)

    @property
    def has_failed(self) -> bool:
        """True if a check failed."""
        return any(row.passed is False for row in read_rows(self.path))


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a section; a last line that was cut off is ignored."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                rows.append(Row(**json.loads(line)))
    return rows


def summary_table(outcomes: Sequence[Outcome]) -> str:
    """Return at most `MAX_LINES` - 4 lines: every status first, then failures, targets and other rows."""
    lines: list[tuple[int, dict[str, str]]] = []  # priority (low is kept), cells
    for outcome in outcomes:
        failed = sum(row.passed is False for row in outcome.rows)
        checks = sum(row.passed is not None for row in outcome.rows)
        count = f"{checks - failed} of {checks} checks" if checks else ""
        note = "; ".join(filter(None, (count, outcome.reason)))
        lines.append((0, _cells(outcome.section, "", outcome.status, f"{outcome.seconds:.0f} s", "", note)))
        for row in outcome.rows:
            if row.passed is False or row.shown:
                status = {None: "", True: "passed", False: "FAILED"}[row.passed]
                limit = row.limit or (f"target {row.target}" if row.target else "")
                value = "" if row.value is None else f"{float(row.value):.4g} {row.unit}".strip()
                priority = 1 if row.passed is False else 2 if row.target else 3 if row.passed else 4
                lines.append((priority, _cells("", row.name, status, value, limit, row.note)))
    room = MAX_LINES - 6  # header and rule of the table, two lines around it, the count of omitted rows
    kept = sorted(sorted(range(len(lines)), key=lambda index: (lines[index][0], index))[:room])
    text = markdown_table([lines[index][1] for index in kept])
    return text + (f"\n{len(lines) - len(kept)} more in the JSON lines" if len(kept) < len(lines) else "")


def _cells(section: str, name: str, status: str, value: str, limit: str, note: str) -> dict[str, str]:
    cells = (section, name[:44], status, value, limit, " ".join(note.split())[:90])
    return dict(zip(("section", "row", "status", "value", "limit", "note"), cells))


def _finite(value: Any) -> Any:
    """Return `value` with NaN and infinities, also those in containers, as text."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
