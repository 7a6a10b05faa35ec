"""The files of results, and their place in a page of documentation."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from tools.ablating.grid import Grid
from tools.ablating.results import Row, as_csv, as_json, figure, legend, table
from vil.command_line import write_output
from vil.config import ConfigError
from vil.runtime.files import make_folders, read_text, write_durably


def command_of(words: Sequence[str]) -> str:
    """The line that runs a grid again, with DIR for the place of the images: pages are read elsewhere."""
    shown: list[str] = []
    for word in words:
        if shown and shown[-1] == "--data.root":
            word = "DIR"
        shown.append("--data.root=DIR" if word.startswith("--data.root=") else word)
    return f"python tools/ablate.py {shlex.join(word for word in shown if word != '--report')}"


def text_of(grid: Grid, rows: Sequence[Row], command: str) -> str:
    """Question, command, table and its legend, in Markdown."""
    head = [grid.question, ""] if grid.question else []
    return "\n".join([*head, "```sh", command, "```", "", table(rows), "", legend(grid, rows)])


def write_results(grid: Grid, rows: Sequence[Row], command: str) -> None:
    """Writes results.md, .csv, .json and .png into the grid's folder.

    Raises:
        ConfigError: one cannot be written.
    """
    text = f"# {grid.name}\n\n{text_of(grid, rows, command)}\n\n![results](results.png)\n"
    results: dict[str, str | bytes] = {
        "results.md": text,
        "results.csv": as_csv(rows),
        "results.json": as_json(grid, rows, command),
        "results.png": _png(grid, rows),
    }
    try:
        make_folders(grid.folder.parent, grid.folder.name)
        for name, content in results.items():
            write_durably(grid.folder / name, content)
    except OSError as error:
        raise ConfigError(str(grid.folder), f"cannot be written: {error.strerror or error}") from None


def insert(page: Path, grid: Grid, rows: Sequence[Row], command: str) -> None:
    """Writes the results between the page's two comments for this grid, and the figure beside the page.

    Raises:
        ConfigError: the page cannot be read or written, or lacks the comments.
    """
    content, (start, end) = _read(page), _place(page, grid.name)
    picture = Path("figures") / f"ablation_{grid.name}.png"
    text = f"\n\n{text_of(grid, rows, command)}\n\n![{grid.question or grid.name}]({picture})\n\n"
    write_output(page.parent / picture, _png(grid, rows))
    write_output(page, content[:start] + text + content[end:])


def check_page(page: Path, names: Iterable[str]) -> None:
    """Raises ConfigError, before the work, where the page lacks the comments of one of the grids."""
    for name in names:
        _place(page, name)


def _place(page: Path, name: str) -> tuple[int, int]:
    """Where the text between the two comments begins and ends."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    found = re.search(f"{re.escape(begin)}(.*?){re.escape(end)}", _read(page), re.DOTALL)
    if found is None:
        raise ConfigError(f"--markdown {page}", f"has no line {begin} with {end} after it")
    return found.span(1)


def _read(page: Path) -> str:
    try:
        return read_text(page)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is no text"
        raise ConfigError(f"--markdown {page}", f"cannot be read: {reason}") from None


def _png(grid: Grid, rows: Sequence[Row]) -> bytes:
    file = io.BytesIO()
    figure(grid, rows).savefig(file, dpi=110, format="png", facecolor="white", metadata={"Software": None})
    return file.getvalue()
