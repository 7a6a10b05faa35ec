"""A grid file: a base, factors with their levels, seeds; and the runs that they stand for."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import train
from vil.command_line import COMMAND_LINE, COMMAND_LINE_KEYS
from vil.config import ConfigError, TrainConfig, in_section
from vil.models.zoo import model_from_config
from vil.schema import check_timm_options
from vil.training.limits import check_limits
from vil.yaml_files import read_yaml

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = ("model", "schedule", "data")
KEYS = ("question", "base", "factors", "compare", "seeds")
OWN = ("output", "seed", "resume", "progress")
"""Options of train.py that the grid itself decides."""

_OPTION = re.compile(r"[a-z_0-9]+(\.[a-z_0-9]+)*")
"""Spelling of an option, which the command line then reads in no other way."""

Setting = tuple[str, tuple[str, ...]]
"""An option's name and the words of train.py's line that give it."""


@dataclass(frozen=True)
class Cell:
    """One level of every factor.

    Attributes:
        levels: factor → level.
        words: the words of train.py's line for this cell, without seed and output.
        config: what these words amount to.
    """

    levels: Mapping[str, str]
    words: tuple[str, ...]
    config: TrainConfig

    @property
    def name(self) -> str:
        """The levels, as tables name the cell."""
        return ", ".join(self.levels.values())

    @property
    def folder(self) -> str:
        """Name of the cell's folder."""
        return _folder(self.levels)


@dataclass(frozen=True)
class Run:
    """A cell with one seed: one call of train.py."""

    cell: Cell
    seed: int
    folder: Path

    @property
    def words(self) -> list[str]:
        """The words of train.py's line."""
        return [*self.cell.words, "--seed", str(self.seed), "--output", str(self.folder)]

    @property
    def config(self) -> TrainConfig:
        """What these words amount to."""
        return dataclasses.replace(self.cell.config, seed=self.seed, output=str(self.folder))


@dataclass(frozen=True)
class Grid:
    """A comparison.

    Attributes:
        name: the file's name without its ending.
        question: what is asked, in a line; may be empty.
        cells: by their levels; the first one is the base.
        reference: for every cell the one that it is compared with; the base has itself.
        seeds: of the runs of every cell.
        folder: where the runs and the results go.
    """

    name: str
    question: str
    cells: tuple[Cell, ...]
    reference: Mapping[str, Cell]
    seeds: tuple[int, ...]
    folder: Path

    def runs(self) -> list[Run]:
        """All runs: the first seed of every cell, then the second, so that a table fills evenly."""
        return [
            Run(cell, seed, self.folder / cell.folder / f"seed={seed}")
            for seed in self.seeds
            for cell in self.cells
        ]


def read_grid(
    path: str,
    output: Path,
    words: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    needs_images: bool = True,
) -> Grid:
    """Reads a grid and resolves the configuration of every cell as train.py would.

    Args:
        path: the YAML file.
        output: the grid's folder is made in this one.
        words: options of train.py that go over the base.
        seeds: in the place of the file's.
        needs_images: whether the folder of the images must be there.

    Raises:
        ConfigError: names the file and the key; nothing was started or written.
    """
    content = read_yaml(path)
    with _of_file(path):
        _check_keys(content)
        name = grid_name(path)
        base, line = _settings(content.get("base"), "base"), list(_line_settings(words))
        factors = _factors(content.get("factors"))
        chosen = _seeds(content.get("seeds") if seeds is None else list(seeds))
        compare = _compare(content.get("compare"), list(factors))
        question = content.get("question", "")
        if not isinstance(question, str) or "\n" in question.strip():
            raise ConfigError("question", f"expected one line of text, got {question!r}")
        folder = output / name
        combinations = [dict(zip(factors, levels)) for levels in itertools.product(*factors.values())]
        cells = tuple(_cell(levels, factors, base, line, folder, needs_images) for levels in combinations)
        _check_differ(cells)
    return Grid(name, question.strip(), cells, _references(cells, compare), chosen, folder)


def grid_name(path: str) -> str:
    """Return the name of a grid's folder: that of the file, without its ending.

    Raises:
        ConfigError: it is no name of a folder below another, as that of `...yaml` or `.hidden.yaml`.
    """
    name = Path(path).stem
    if not re.fullmatch(r"\w[\w.+\-]*( [\w.+\-]+)*", name):
        raise ConfigError(path, f"{name!r} cannot name a folder of results; rename the file")
    return name


@contextmanager
def _of_file(path: str) -> Iterator[None]:
    """Puts the file in front of an error that is raised inside, unless it is one of the tool's own line."""
    try:
        yield
    except ConfigError as error:
        if str(error).startswith(COMMAND_LINE):
            raise
        raise ConfigError(path, str(error)) from error


def _factors(content: Any) -> dict[str, dict[str, list[Setting]]]:
    """Factor → level → its settings."""
    if not isinstance(content, dict) or not content:
        raise ConfigError("factors", "expected a mapping of factors, each a mapping of its levels")
    factors: dict[str, dict[str, list[Setting]]] = {}
    for factor, levels in content.items():
        key = f"factors.{_name(factor, 'factors')}"
        if not isinstance(levels, dict) or len(levels) < 2:
            raise ConfigError(key, "expected a mapping of two or more levels")
        factors[str(factor)] = {
            _name(level, key): _settings(options, f"{key}.{level}") for level, options in levels.items()
        }
        if len(factors[str(factor)]) < len(levels):
            raise ConfigError(key, "two levels have the same name")
    return factors


def _name(name: Any, key: str) -> str:
    """The name of a factor or level, which is a part of a folder's name."""
    text = str(name)
    if isinstance(name, bool) or name is None or not re.fullmatch(r"\w[\w.+\-]*( [\w.+\-]+)*", text):
        reason = f'{name!r} is no name: letters, digits, _ . + - and single spaces; quote words like "no"'
        raise ConfigError(key, reason)
    return text


def _folder(levels: Mapping[str, str]) -> str:
    return ",".join(f"{factor}={level}" for factor, level in levels.items()).replace(" ", "_")


def _settings(content: Any, key: str) -> list[Setting]:
    """The settings of a base or level: a partial file, or options of train.py by their names."""
    if content is None:
        return []
    if isinstance(content, str):
        content = {"config": content}
    if not isinstance(content, dict):
        raise ConfigError(key, f"expected a YAML file, or options of train.py, got {content!r}")
    return [_setting(str(option), value, key) for option, value in content.items()]


def _setting(option: str, value: Any, key: str) -> Setting:
    _check_own(option, f"{key}.{option}")
    if not _OPTION.fullmatch(option) or option in ("print_config", "help", "h"):
        raise ConfigError(f"{key}.{option}", "unknown option; a grid sets options of train.py by their names")
    if option in (*SECTIONS, "config"):
        if not isinstance(value, str):
            example = f", as {option}.NAME: value for an option" if option in SECTIONS else ""
            raise ConfigError(f"{key}.{option}", f"expected the path of a YAML file{example}, got {value!r}")
        value = _found(value, f"{key}.{option}")
    if option in COMMAND_LINE_KEYS and not COMMAND_LINE_KEYS[option](value):
        raise ConfigError(f"{key}.{option}", "is taken from the command line alone, not from a file")
    if option == "model.timm_options" and isinstance(value, dict):
        check_timm_options(f"{key}.{option}", value)
    try:
        text = value if isinstance(value, str) else json.dumps(value)
    except (TypeError, ValueError):  # a date, say
        reason = f"expected a text, a number or a list, got {value!r}; quote what is meant as text"
        raise ConfigError(f"{key}.{option}", reason) from None
    return option, (f"--{option}={text}",)


def _found(path: str, key: str) -> str:
    """The path from the working folder, or else from the project's."""
    for candidate in (Path(path), ROOT / path):
        if candidate.is_file():
            return str(candidate)
    raise ConfigError(key, f"{path}: no such file")


def _line_settings(words: Sequence[str]) -> Iterator[Setting]:
    """The options of train.py on the tool's own line."""
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--"):
            groups.append([])
        elif not groups:
            raise ConfigError(COMMAND_LINE, f"{word}: grids come first, then options")
        groups[-1].append(word)
    for first, *rest in groups:
        option = first[2:].partition("=")[0]
        _check_own(option, f"{COMMAND_LINE}: --{option}")
        yield option, (first, *rest)


def _check_own(option: str, key: str) -> None:
    if option in OWN:
        raise ConfigError(key, "is decided by the grid: seeds are its own, and so are the folders")


def _cell(
    levels: dict[str, str],
    factors: Mapping[str, Mapping[str, list[Setting]]],
    base: Sequence[Setting],
    line: Sequence[Setting],
    folder: Path,
    needs_images: bool,
) -> Cell:
    """The cell with these levels, whose configuration and model are known to be possible."""
    parts = {"base": base, COMMAND_LINE: line}
    parts |= {f"factors.{factor}.{level}": factors[factor][level] for factor, level in levels.items()}
    settings = list(itertools.chain.from_iterable(parts.values()))
    # A level may name another model: options over the base's go over that one too.
    files = {option: words for option, words in settings if option in SECTIONS}
    others = [words for option, words in settings if option not in SECTIONS]
    words = tuple(itertools.chain(*files.values(), *others))
    try:
        command = train.configure([*words, "--output", str(folder / _folder(levels))])
        try:
            check_limits(command.config)
            _check_model(command.config)
            if needs_images:
                _check_images(command.config)
        except ConfigError as error:
            raise command.locate(error) from error
    except ConfigError as error:
        raise _located(error, parts, ", ".join(levels.values())) from error
    return Cell(levels, words, command.config)


def _check_model(config: TrainConfig) -> None:
    """Raises ConfigError where there is no such model."""
    with in_section("model"), torch.device("cpu" if config.model.name.startswith("timm/") else "meta"):
        model_from_config(config.model, num_classes=config.model.num_classes or 1000)


def _check_images(config: TrainConfig) -> None:
    """Raises ConfigError where there is no such folder of images."""
    root = config.data.root
    if root is not None and not config.data.download and not Path(root).exists():
        raise ConfigError("data.root", f"{root}: no such folder")


def _located(error: ConfigError, parts: Mapping[str, Sequence[Setting]], name: str) -> ConfigError:
    """The error with the place in the grid that set the option, or else the name of the cell."""
    if error.origin == COMMAND_LINE:
        option = error.key.removeprefix("--")
        for place, settings in reversed(parts.items()):
            for name in dict(settings):
                if place != COMMAND_LINE and (option == name or option.startswith((f"{name}.", f"{name}["))):
                    return ConfigError(f"{place}.{option}", error.reason)
        return error
    return ConfigError(f"cell {name}", str(error))


def _check_differ(cells: Sequence[Cell]) -> None:
    """Raises ConfigError where two cells are the same, or would share a folder."""
    for first, second in itertools.combinations(cells, 2):
        configs = (dataclasses.replace(cell.config, output=None) for cell in (first, second))
        same = next(configs) == next(configs)
        if same or first.folder == second.folder:
            what = "the same configuration" if same else "the same folder"
            raise ConfigError("factors", f"the cells {first.name} and {second.name} have {what}")


def _seeds(content: Any) -> tuple[int, ...]:
    numbers = content if isinstance(content, list) else []
    if not numbers or any(type(seed) is not int or seed < 0 for seed in numbers):
        raise ConfigError("seeds", f"expected a list of seeds, as [0, 1, 2], got {content!r}")
    if len(set(numbers)) < len(numbers):
        raise ConfigError("seeds", f"a seed is given twice: {numbers}")
    return tuple(numbers)


def _compare(content: Any, factors: Sequence[str]) -> list[str]:
    """The factors that are set back to their first level in the cell to compare with."""
    if content is None:
        return list(factors)
    names = [content] if isinstance(content, str) else content
    if not isinstance(names, list) or not names:
        raise ConfigError("compare", f"expected the name of a factor, or a list of them, got {content!r}")
    for name in names:
        if name not in factors:
            raise ConfigError("compare", f"there is no factor {name!r}; known are {', '.join(factors)}")
    return names


def _references(cells: Sequence[Cell], compare: Sequence[str]) -> dict[str, Cell]:
    """Cell → the cell with the first level of the factors in `compare` and its own of the others."""
    by_levels = {tuple(cell.levels.values()): cell for cell in cells}
    base = cells[0].levels
    return {
        cell.name: by_levels[tuple(base[f] if f in compare else level for f, level in cell.levels.items())]
        for cell in cells
    }


def _check_keys(content: Any) -> None:
    if not isinstance(content, dict):
        raise ConfigError("", f"expected a mapping with {', '.join(KEYS)}, got {content!r}")
    for key in content:
        if key not in KEYS:
            close = difflib.get_close_matches(str(key), KEYS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(KEYS)}"
            raise ConfigError(str(key), f"unknown key; {hint}")
