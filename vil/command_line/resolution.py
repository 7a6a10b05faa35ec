"""Merge a command line, YAML files and stored values into one tree, and validate it once."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

from vil.command_line.arguments import (
    CONFIGS,
    ArgumentParser,
    Assignment,
    file_origin,
    find_file,
    read_section,
)
from vil.config import TRACKER_PACKAGES, Tree
from vil.errors import COMMAND_LINE, UserError
from vil.runtime import console
from vil.runtime.yaml_files import yaml_text
from vil.validation import (
    PATH_OPTIONS,
    PRETRAINED,
    STORED,
    Config,
    TypeHint,
    as_tree,
    field_types,
    flatten,
    rename_options,
    shown,
    type_name,
    validate,
)


def _stays_on_this_machine(loggers: object) -> bool:
    names = loggers if isinstance(loggers, list) else [loggers]
    return not TRACKER_PACKAGES.keys() & set(map(str, names))


COMMAND_LINE_KEYS: dict[str, Callable[[object], bool]] = {
    "output": lambda value: value is None,
    "json": lambda value: value is None,
    "csv": lambda value: value is None,
    "per_class_csv": lambda value: value is None,
    "confusion_csv": lambda value: value is None,
    "data.download": lambda value: value is False,
    "data.index": lambda value: value in (None, "off"),
    "schedule.teacher_weights": lambda value: value != PRETRAINED,
    "loggers": _stays_on_this_machine,
}
"""Options that name an output or use the network, and the values of them that a file may contain."""


@dataclass(frozen=True)
class ResolvedConfig(Generic[Config]):
    """A resolved command line.

    Attributes:
        config: the configuration.
        origins: key → the file that set it, or `COMMAND_LINE`; keys with their default are absent.
        assigned: the keys that the command line itself assigns, `""` for --config.
        defaults: files that are used because the command line names none for their sections.
        files: all YAML files that were read, also those whose values others override.
    """

    config: Config
    origins: Mapping[str, str]
    assigned: frozenset[str] = frozenset()
    defaults: frozenset[str] = frozenset()
    files: tuple[str, ...] = ()

    def sets(self, section: str) -> bool:
        """Return True if anything sets `section` or an option in it."""
        return any(key == section or key.startswith(f"{section}.") for key in self.origins)

    def inputs(self) -> list[str]:
        """Return the files and the folders of runs that the command names and reads, without its images."""
        values = flatten(as_tree(self.config))
        keys = [f"{section}.{key}" for section, names in PATH_OPTIONS.items() for key in names]
        paths = [values.get(key) for key in (*keys, "released_config") if key != "data.root"]
        paths += values.get("checkpoint") or []
        sets = values.get("datasets") or values.get("eval_sets") or []
        paths += [path for path in sets if os.path.isfile(path)]
        origins = [origin for origin in self.origins.values() if origin != COMMAND_LINE]
        return list(dict.fromkeys([*self.files, *origins, *filter(None, paths)]))

    def describe_origin(self, section: str) -> str:
        """Return the origins of the options of a section, as `configs/models/vil_tiny.yaml, the default`."""
        found = dict.fromkeys(origin for key, origin in self.origins.items() if key.startswith(f"{section}."))
        names = []
        for origin in found:
            is_default = origin in self.defaults
            name = origin if origin == COMMAND_LINE else os.path.relpath(origin)
            if origin.startswith(f"{CONFIGS}{os.sep}"):
                name = os.path.relpath(origin, CONFIGS.parent)
            name = origin if name.startswith(os.pardir) else name
            names.append(f"{name}, the default" if is_default else name)
        return "; ".join(names) or "defaults"

    def locate(self, error: UserError) -> UserError:
        """Return the error with the origin of its option.

        `model.stages[1].window` has the origin of that key, else of `model.window`, which sets it for all
        stages, else of `model.stages`.
        """
        return _locate(error, self.origins)


class ParsedArguments(Generic[Config]):
    """A parsed command line.

    Attributes:
        assignments: the assignments, in order.
        print_config: the value of --print_config: `all`, `skip_default` or None.
    """

    def __init__(self, config_class: type[Config], argv: Sequence[str], prog: str | None = None) -> None:
        self._config_class = config_class
        self.assignments, self.print_config = ArgumentParser(config_class, prog).parse(argv)

    def files(self) -> list[str]:
        """Return the YAML files that the command line names, in order."""
        return list(dict.fromkeys(a.origin for a in self.assignments if a.origin != COMMAND_LINE))

    def assigns(self, *keys: str) -> bool:
        """Return True if the command line sets one of these options, or names a file for such a section."""
        return any(a.key in keys for a in self.assignments)

    def with_file(self, section: str, path: str) -> ParsedArguments[Config]:
        """Return a copy with one more YAML file for a section, right after the last such file."""
        index = max((i + 1 for i, a in enumerate(self.assignments) if a.key == section), default=0)
        changed = copy.copy(self)
        changed.assignments = list(self.assignments)
        changed.assignments.insert(index, _file_assignment(section, path))
        return changed

    def with_values(self, values: Tree, origin: str = COMMAND_LINE) -> ParsedArguments[Config]:
        """Return a copy with more values, by dotted key, which override all others."""
        changed = copy.copy(self)
        added = [Assignment(key, value, origin) for key, value in values.items()]
        changed.assignments = [*self.assignments, *added]
        return changed

    def resolve(
        self,
        base_files: Mapping[str, Path] | None = None,
        base_values: Mapping[str, object] | None = None,
        base_origin: str = STORED,
    ) -> ResolvedConfig[Config]:
        """Return the configuration.

        Args:
            base_files: section → file that is used unless the command line names a file for the section.
            base_values: a stored configuration (nested mappings), overridden by everything else. Options that
                only the command line may set are left out.
            base_origin: the origin of `base_values` in errors.
        """
        base_origin = file_origin(base_origin)
        stored = [] if base_values is None else [Assignment("", base_values, base_origin)]
        files = [_file_assignment(*item) for item in (base_files or {}).items() if not self.assigns(item[0])]
        tree: Tree = {}
        origins: dict[str, str] = {}
        for assignment in (*stored, *files, *self.assignments):
            _assign(tree, origins, self._config_class, assignment)
        for key, may_be_in_file in COMMAND_LINE_KEYS.items():
            origin = origins.get(key, COMMAND_LINE)
            if origin == COMMAND_LINE:
                continue
            *sections, name = key.split(".")
            section = functools.reduce(lambda inner, part: inner[part], sections, tree)
            if may_be_in_file(section[name]):
                continue
            is_stored, value = origin == base_origin and base_values is not None, section[name]
            if is_stored and key == "loggers" and isinstance(value, list):
                section[name] = [logger for logger in value if _stays_on_this_machine(logger)]
            elif is_stored:
                del section[name], origins[key]
            else:
                reason = f"a file cannot set this option; use --{key} on the command line, or delete it there"
                raise UserError(key, reason, origin)
        typed = [key for key, origin in origins.items() if origin == COMMAND_LINE]
        try:
            config = validate(self._config_class, tree, typed)
        except UserError as error:
            raise _locate(error, origins) from None
        assigned = frozenset(a.key for a in self.assignments)
        defaults = [a.origin for a in files]
        return ResolvedConfig(config, origins, assigned, frozenset(defaults), (*defaults, *self.files()))

    def finish(self, command: ResolvedConfig[Config]) -> None:
        """Print the configuration and exit with status 0 if the command line has --print_config."""
        if self.print_config is None:
            return
        tree = as_tree(command.config)
        if self.print_config == "skip_default":
            tree = _without_defaults(tree, as_tree(self._config_class()))
        console.write(yaml_text(tree))
        raise SystemExit(0)


def parse(
    config_class: type[Config],
    argv: Sequence[str],
    base_files: Mapping[str, Path] | None = None,
    base_values: Mapping[str, object] | None = None,
    prog: str | None = None,
) -> ResolvedConfig[Config]:
    """Parse and resolve a command line; see `ParsedArguments` and `ParsedArguments.resolve`."""
    args = ParsedArguments(config_class, argv, prog)
    command = args.resolve(base_files, base_values)
    args.finish(command)
    return command


def _file_assignment(section: str, path: str | Path) -> Assignment:
    path = find_file(str(path), section)
    return Assignment(section, read_section(path, section), file_origin(path))


def _without_defaults(tree: Tree, defaults: Tree) -> Tree:
    changed: Tree = {}
    for key, value in tree.items():
        if value != defaults[key]:
            is_section = isinstance(value, dict) and isinstance(defaults[key], dict)
            changed[key] = _without_defaults(value, defaults[key]) if is_section else value
    return changed


def _assign(tree: Tree, origins: dict[str, str], config_class: TypeHint, new: Assignment) -> None:
    """Merge an assignment into a tree, and record the origin of every option that it sets."""
    *sections, name = new.key.split(".") if new.key else [""]
    for section in sections:
        tree, config_class = tree.setdefault(section, {}), field_types(config_class)[section]
    prefix = "".join(f"{section}." for section in sections)
    content: Tree = {name: new.value} if new.key else new.value
    _merge(tree, origins, config_class, rename_options(content, new.origin, prefix), prefix, new.origin)


def _merge(
    tree: Tree,
    origins: dict[str, str],
    config_class: TypeHint,
    content: Mapping[str, object],
    prefix: str,
    origin: str,
) -> None:
    types = field_types(config_class)
    for name, value in content.items():
        key = f"{prefix}{name}"
        if dataclasses.is_dataclass(types.get(name)):
            if not isinstance(value, Mapping):
                raise UserError(key, f"expected {type_name(types[name])}, got {shown(value)}", origin)
            _merge(tree.setdefault(name, {}), origins, types[name], value, f"{key}.", origin)
        elif not (key in COMMAND_LINE_KEYS and origins.get(key) == COMMAND_LINE != origin):
            tree[name] = value
            origins[key] = origin


def _locate(error: UserError, origins: Mapping[str, str]) -> UserError:
    key = error.location
    shown_as = {key: key}  # key to look up → location to report
    for_all_stages = re.sub(r"stages\[\d+\]\.", "", key)
    if for_all_stages != key:
        shown_as |= {for_all_stages: for_all_stages, "model.stages": key}
    elif "[" in key:
        shown_as[key.partition("[")[0]] = key
    else:  # an item of an option that is a mapping
        shown_as[key.rpartition(".")[0]] = key
    for key, location in shown_as.items():
        if key in origins and not error.origin:
            located = copy.copy(error)
            located.location, located.origin = location, origins[key]
            return located
    return error
