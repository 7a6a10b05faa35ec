"""Read a grid file: a base configuration, factors with their levels, and seeds."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge

from data import check_root
from vil.command_line import COMMAND_LINE_KEYS, resolve_train_command
from vil.config import TrainConfig
from vil.errors import COMMAND_LINE, UserError, errors_in_section
from vil.models.zoo import model_from_config
from vil.runtime.yaml_files import read_yaml
from vil.validation import check_timm_options, validate

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = ("model", "schedule", "data")
GRID_OPTIONS = ("output", "seed", "resume", "progress")
"""Options of train.py that the grid sets."""

_OPTION_NAME = re.compile(r"[a-z_0-9]+(\.[a-z_0-9]+)*")
_FOLDER_NAME = re.compile(r"\w[\w.+\-]*( [\w.+\-]+)*")

Option = tuple[str, tuple[str, ...]]
"""Name of an option of train.py, and its command-line arguments."""


@dataclass
class GridFile:
    """Content of a grid file; see docs/ablations.md."""

    factors: dict[str, dict[str, Any]]
    seeds: list[Annotated[int, Ge(0)]]
    question: str = ""
    base: Any = None
    compare: str | list[str] | None = None
    """Factors that are reset to their first level in the cell to compare with; None for all."""


@dataclass(frozen=True)
class Cell:
    """One level of every factor; `argv` are the arguments of train.py, without seed and output."""

    levels: Mapping[str, str]
    argv: tuple[str, ...]
    config: TrainConfig

    @property
    def name(self) -> str:
        """Name of the cell in tables: its levels."""
        return ", ".join(self.levels.values())

    @property
    def folder(self) -> str:
        """Name of the cell's folder."""
        return _folder_name(self.levels)


@dataclass(frozen=True)
class Run:
    """A cell with one seed: one call of train.py."""

    cell: Cell
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """Cell and seed, as messages name the run."""
        return f"{self.cell.name}, seed {self.seed}"

    @property
    def argv(self) -> list[str]:
        """Arguments of train.py."""
        return [*self.cell.argv, "--seed", str(self.seed), "--output", str(self.folder)]

    @property
    def config(self) -> TrainConfig:
        """Configuration that `argv` resolves to."""
        return dataclasses.replace(self.cell.config, seed=self.seed, output=str(self.folder))

    @property
    def epochs(self) -> int:
        """Length of the run."""
        return self.cell.config.schedule.total_epochs


@dataclass(frozen=True)
class Grid:
    """A comparison of training runs, one per cell and seed.

    Attributes:
        question: one line of text; may be empty.
        cells: all combinations of levels; the first one is the base.
        reference: cell name → the cell to compare with; the base refers to itself.
        folder: parent of the folders of the cells, and of the result files.
    """

    name: str
    question: str
    cells: tuple[Cell, ...]
    reference: Mapping[str, Cell]
    seeds: tuple[int, ...]
    folder: Path

    def runs(self) -> list[Run]:
        """Return all runs, ordered by seed, so that every cell gets its first result early."""
        pairs = itertools.product(self.seeds, self.cells)
        return [Run(cell, seed, self.folder / cell.folder / f"seed={seed}") for seed, cell in pairs]


def read_grid(
    path: str, output: Path, argv: Sequence[str] = (), seeds: list[int] | None = None, check_data: bool = True
) -> Grid:
    """Read a grid file and resolve the configuration of every cell as train.py does.

    `argv` (options of train.py) and `seeds` override those of the file. `output` is the parent of the grid's
    folder. With `check_data`, the folder of the data set must exist.
    """
    content = read_yaml(path)
    with _errors_in_file(path):
        if seeds is not None and isinstance(content, dict):
            content["seeds"] = seeds
        file = validate(GridFile, content)
        name = grid_name(path)
        factors = _factors(content["factors"])
        if "\n" in file.question.strip():
            raise UserError("question", f"expected one line of text, got {file.question!r}")
        if not file.seeds or len(set(file.seeds)) < len(file.seeds):
            raise UserError("seeds", f"expected one or more different seeds, got {file.seeds}")
        compared = _compared_factors(file.compare, list(factors))
        base, overrides = _options(file.base, "base"), list(_command_line_options(argv))
        cells = []
        for combination in itertools.product(*factors.values()):
            levels = dict(zip(factors, combination))
            options = {"base": base, COMMAND_LINE: overrides}
            options |= {f"factors.{f}.{level}": factors[f][level] for f, level in levels.items()}
            cells.append(_resolve_cell(levels, options, output / name / _folder_name(levels), check_data))
        _check_distinct(cells)
        reference = _references(cells, compared)
    return Grid(name, file.question.strip(), tuple(cells), reference, tuple(file.seeds), output / name)


def grid_name(path: str) -> str:
    """Return the name of a grid's folder: the name of the file without its suffix."""
    name = Path(path).stem
    if not _FOLDER_NAME.fullmatch(name):
        raise UserError(path, f"{name!r} cannot name a folder of results; rename the file")
    return name


@contextmanager
def _errors_in_file(path: str) -> Iterator[None]:
    """Prefix a UserError with the path of the grid, unless its origin is the command line."""
    try:
        yield
    except UserError as error:
        if str(error).startswith(COMMAND_LINE):
            raise
        raise UserError(path, str(error)) from error


def _factors(content: Mapping[Any, Mapping[Any, Any]]) -> dict[str, dict[str, list[Option]]]:
    """Return factor → level → options."""
    if not content:
        raise UserError("factors", "expected one or more factors")
    factors: dict[str, dict[str, list[Option]]] = {}
    for factor, levels in content.items():
        key = f"factors.{_checked_name(factor, 'factors')}"
        named = {_checked_name(level, key): options for level, options in levels.items()}
        if len(named) < len(levels):
            raise UserError(key, "two levels have the same name")
        if len(named) < 2:
            raise UserError(key, "expected two or more levels")
        factors[str(factor)] = {level: _options(value, f"{key}.{level}") for level, value in named.items()}
    return factors


def _checked_name(name: Any, key: str) -> str:
    """Return the name of a factor or level, which becomes a part of the name of a folder."""
    if isinstance(name, bool) or name is None or not _FOLDER_NAME.fullmatch(str(name)):
        reason = "use letters, digits, single spaces and _ . + -, and quote words like no"
        raise UserError(key, f"{name!r} is not a valid name; {reason}")
    return str(name)


def _folder_name(levels: Mapping[str, str]) -> str:
    return ",".join(f"{factor}={level}" for factor, level in levels.items()).replace(" ", "_")


def _options(content: Any, key: str) -> list[Option]:
    """Return the options of a base or level: a partial configuration file, or options of train.py by name."""
    if content is None:
        return []
    if isinstance(content, str):
        content = {"config": content}
    if not isinstance(content, dict):
        raise UserError(key, f"expected a YAML file, or options of train.py, got {content!r}")
    return [_option(str(name), value, f"{key}.{name}") for name, value in content.items()]


def _option(name: str, value: Any, key: str) -> Option:
    _refuse_grid_option(name, key)
    if not _OPTION_NAME.fullmatch(name) or name in ("print_config", "help", "h"):
        raise UserError(key, "unknown option; a grid sets options of train.py by their names")
    if name in (*SECTIONS, "config"):
        if not isinstance(value, str):
            example = f"; write {name}.NAME: value for an option" if name in SECTIONS else ""
            raise UserError(key, f"expected the path of a YAML file, got {value!r}{example}")
        value = _find_file(value, key)
    if name in COMMAND_LINE_KEYS and not COMMAND_LINE_KEYS[name](value):
        raise UserError(key, "can be set on the command line only, not in a file")
    if name == "model.timm_options" and isinstance(value, dict):
        check_timm_options(key, value)
    return name, (f"--{name}={value if isinstance(value, str) else json.dumps(value)}",)


def _find_file(path: str, key: str) -> str:
    """Return a path relative to the working folder or else to the repository."""
    for candidate in (Path(path), ROOT / path):
        if candidate.is_file():
            return str(candidate)
    raise UserError(key, f"{path}: no such file")


def _command_line_options(argv: Sequence[str]) -> Iterator[Option]:
    """Yield the options of train.py on the command line of this program."""
    groups: list[list[str]] = []
    for argument in argv:
        if argument.startswith("--"):
            groups.append([])
        elif not groups:
            raise UserError(COMMAND_LINE, f"{argument}: name the grids before the options")
        groups[-1].append(argument)
    for first, *values in groups:
        name = first[2:].partition("=")[0]
        _refuse_grid_option(name, f"{COMMAND_LINE}: --{name}")
        yield name, (first, *values)


def _refuse_grid_option(name: str, key: str) -> None:
    if name in GRID_OPTIONS:
        raise UserError(key, "is set by the grid for each run")


def _resolve_cell(
    levels: dict[str, str], options: Mapping[str, Sequence[Option]], folder: Path, check_data: bool
) -> Cell:
    """Resolve and check the configuration of a cell in its folder.

    `options` (key of the grid file, or COMMAND_LINE → options): later ones override earlier ones.
    """
    ordered = list(itertools.chain.from_iterable(options.values()))
    # The file of a level replaces the file of the base; options of the base still override it.
    files = {name: arguments for name, arguments in ordered if name in SECTIONS}
    others = [arguments for name, arguments in ordered if name not in SECTIONS]
    argv = tuple(itertools.chain(*files.values(), *others))
    try:
        command = resolve_train_command([*argv, "--output", str(folder)])
        try:
            _check_model(command.config)
            if check_data:
                check_root(command.config.data)
        except UserError as error:
            raise command.locate(error) from error
    except UserError as error:
        raise _locate(error, options, ", ".join(levels.values())) from error
    return Cell(levels, argv, command.config)


def _check_model(config: TrainConfig) -> None:
    """Raise UserError if the model cannot be built."""
    with errors_in_section("model"), torch.device("cpu" if config.model.name.startswith("timm/") else "meta"):
        model_from_config(config.model, num_classes=config.model.num_classes or 1000)


def _locate(error: UserError, options: Mapping[str, Sequence[Option]], cell: str) -> UserError:
    """Return the error with the key of the grid file that set the option, or else with the cell's name."""
    if error.origin != COMMAND_LINE:
        return UserError(f"cell {cell}", str(error))
    option = error.location.removeprefix("--")
    for key, group in reversed(list(options.items())):
        is_set_here = any(option == name or option.startswith((f"{name}.", f"{name}[")) for name, _ in group)
        if key != COMMAND_LINE and is_set_here:
            return UserError(f"{key}.{option}", error.reason)
    return error


def _check_distinct(cells: Sequence[Cell]) -> None:
    """Raise UserError if two cells have the same configuration or the same folder."""
    for first, second in itertools.combinations(cells, 2):
        is_same_config = dataclasses.replace(first.config, output=second.config.output) == second.config
        if is_same_config or first.folder == second.folder:
            shared = "configuration" if is_same_config else "folder"
            raise UserError("factors", f"the cells {first.name} and {second.name} have the same {shared}")


def _compared_factors(compare: str | list[str] | None, factors: list[str]) -> list[str]:
    names = factors if compare is None else [compare] if isinstance(compare, str) else compare
    for name in names or [""]:
        if name not in factors:
            raise UserError("compare", f"unknown factor {name!r}; expected one of {', '.join(factors)}")
    return names


def _references(cells: Sequence[Cell], compared: Sequence[str]) -> dict[str, Cell]:
    """Return cell name → the cell with the first level of the compared factors and else the same levels."""
    by_levels = {tuple(cell.levels.values()): cell for cell in cells}
    base = cells[0].levels
    return {
        cell.name: by_levels[tuple(base[f] if f in compared else level for f, level in cell.levels.items())]
        for cell in cells
    }
