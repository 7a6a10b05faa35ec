"""Command lines over YAML files over stored values: one tree, one validation, one configuration.

A line is parsed once (`Line`). It assigns values to keys, in its order: `--section FILE` assigns what a YAML
file holds to one section, `--config FILE` to all of them, `--section.field VALUE` sets one option. `resolve`
lays the assignments over default files or stored values and validates the result (`vil.schema`).
"""

from __future__ import annotations

import argparse
import ast
import copy
import dataclasses
import functools
import inspect
import re
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, NoReturn, TypeVar

import yaml

from vil.config import COMMAND_LINE, ConfigError
from vil.schema import STORED, as_tree, field_types, shown, suggestion, type_name, union_members, validate
from vil.yaml_files import parse_yaml, read_yaml

Config = TypeVar("Config")

COMMAND_LINE_KEYS: dict[str, Callable[[Any], bool]] = {
    "output": lambda value: value is None,
    "json": lambda value: value is None,
    "data.download": lambda value: value is False,
}
"""Options that write to a place or start a download, which no file may do, and what files may say of them."""


@dataclass(frozen=True)
class Assignment:
    """A value for a key.

    Attributes:
        key: dotted; empty for the whole tree.
        value: a plain value; for a section, a mapping, of which keys that are left out keep their values.
        origin: the file that it comes from, or `COMMAND_LINE`.
    """

    key: str
    value: Any
    origin: str


@dataclass(frozen=True)
class CommandLine(Generic[Config]):
    """A resolved command line.

    Attributes:
        config: the configuration.
        origins: key → the file that set it, or `COMMAND_LINE`; keys that keep their defaults are absent.
    """

    config: Config
    origins: Mapping[str, str]

    def sets(self, section: str) -> bool:
        """Return True if anything sets `section` or an option in it."""
        return any(key == section or key.startswith(f"{section}.") for key in self.origins)

    def locate(self, error: ConfigError) -> ConfigError:
        """Return the error with the origin of its key.

        An option of one stage is looked up as `model.stages[1].window`, as `model.window`, which sets it for
        all stages, and as `model.stages`.
        """
        return _locate(error, self.origins)


class Line(Generic[Config]):
    """A parsed command line.

    Args:
        config_class: a dataclass whose fields are options or sections (dataclasses).
        argv: the words of the line, without the program's name.
        prog: the program's name, for its help.

    Attributes:
        assignments: what the line assigns, in its order.
        print_config: `all` or `skip_default` if the line asks for its configuration, else None.

    Raises:
        ConfigError: an unknown option, a file that cannot be read.
        SystemExit: after --help.
    """

    def __init__(self, config_class: type[Config], argv: Sequence[str], prog: str | None = None) -> None:
        self._config_class = config_class
        parser = _Parser(config_class, prog)
        self.assignments, self.print_config = parser.parse(argv)

    def files(self) -> list[str]:
        """Return all YAML files that the line names, in its order."""
        return list(dict.fromkeys(a.origin for a in self.assignments if a.origin != COMMAND_LINE))

    def assigns(self, *keys: str) -> bool:
        """Return True if the line sets one of these options itself, or names a file for such a section."""
        return any(a.key in keys for a in self.assignments)

    def with_file(self, section: str, path: str) -> Line[Config]:
        """Return the line with a YAML file for a section, over the last one that it names for that."""
        index = max((i + 1 for i, a in enumerate(self.assignments) if a.key == section), default=0)
        changed = copy.copy(self)
        changed.assignments = [*self.assignments]
        changed.assignments.insert(
            index, Assignment(section, _read_section(path, section), file_origin(path))
        )
        return changed

    def with_values(self, values: Mapping[str, Any], origin: str = COMMAND_LINE) -> Line[Config]:
        """Return the line with further values, by dotted key, over everything that it holds."""
        changed = copy.copy(self)
        further = [Assignment(key, value, origin) for key, value in values.items()]
        changed.assignments = [*self.assignments, *further]
        return changed

    def resolve(
        self,
        base_files: Mapping[str, Path] | None = None,
        base_values: Mapping[str, Any] | None = None,
        base_origin: str = STORED,
    ) -> CommandLine[Config]:
        """Return the configuration that the line amounts to.

        Args:
            base_files: for a section, the file that lies under the line unless it names one itself.
            base_values: values under everything else, as nested mappings: a stored configuration. What only
                the command line may set is left out.
            base_origin: what to call them in errors.

        Raises:
            ConfigError: names the file, or the command line, and the key.
        """
        base_origin = file_origin(base_origin)
        stored = [] if base_values is None else [Assignment("", base_values, base_origin)]
        files = [
            Assignment(section, _read_section(str(path), section), file_origin(path))
            for section, path in (base_files or {}).items()
            if not self.assigns(section)
        ]
        tree: dict[str, Any] = {}
        origins: dict[str, str] = {}
        for assignment in (*stored, *files, *self.assignments):
            _assign(tree, origins, self._config_class, assignment)
        for key, is_harmless in COMMAND_LINE_KEYS.items():
            origin = origins.get(key, COMMAND_LINE)
            if origin == COMMAND_LINE:
                continue
            *sections, name = key.split(".")
            section = functools.reduce(lambda inner, part: inner[part], sections, tree)
            if origin == base_origin and base_values is not None:
                del section[name], origins[key]
            elif not is_harmless(section[name]):
                reason = (
                    f"is taken from the command line alone, not from a file: add --{key}, or delete it there"
                )
                raise ConfigError(key, reason, origin)
        typed = [key for key, origin in origins.items() if origin == COMMAND_LINE]
        try:
            return CommandLine(validate(self._config_class, tree, typed), origins)
        except ConfigError as error:
            raise _locate(error, origins) from None

    def finish(self, command: CommandLine[Config]) -> None:
        """Print the configuration and exit if the line asks for that.

        Raises:
            SystemExit: after printing, with status 0.
        """
        if self.print_config is None:
            return
        tree = as_tree(command.config)
        if self.print_config == "skip_default":
            tree = _without_defaults(tree, as_tree(self._config_class()))
        print(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), end="")
        raise SystemExit(0)


def file_origin(path: str | Path) -> str:
    """Return the origin of what a file holds: its name, which never is `COMMAND_LINE`."""
    return f"./{path}" if str(path) == COMMAND_LINE else str(path)


def parse(
    config_class: type[Config],
    argv: Sequence[str],
    base_files: Mapping[str, Path] | None = None,
    base_values: Mapping[str, Any] | None = None,
    prog: str | None = None,
) -> CommandLine[Config]:
    """Parse and resolve a command line; see `Line` and `Line.resolve`."""
    line = Line(config_class, argv, prog)
    command = line.resolve(base_files, base_values)
    line.finish(command)
    return command


def _without_defaults(tree: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for key, value in tree.items():
        if value == defaults[key]:
            continue
        is_section = isinstance(value, dict) and isinstance(defaults[key], dict)
        changed[key] = _without_defaults(value, defaults[key]) if is_section else value
    return changed


def _assign(tree: dict[str, Any], origins: dict[str, str], config_class: Any, new: Assignment) -> None:
    """Merge one assignment into a tree, and note the origin of every option that it sets."""
    *sections, name = new.key.split(".") if new.key else [""]
    for section in sections:
        tree, config_class = tree.setdefault(section, {}), field_types(config_class)[section]
    prefix = "".join(f"{section}." for section in sections)
    content = {name: new.value} if new.key else new.value
    _merge(tree, origins, config_class, content, prefix, new.origin)


def _merge(
    tree: dict[str, Any],
    origins: dict[str, str],
    config_class: Any,
    content: Mapping[Any, Any],
    prefix: str,
    origin: str,
) -> None:
    types = field_types(config_class)
    for name, value in content.items():
        key = f"{prefix}{name}"
        if dataclasses.is_dataclass(types.get(name)):
            if not isinstance(value, Mapping):
                reason = f"expected {type_name(types[name])}, got {shown(value)}"
                raise ConfigError(key, reason, origin)
            _merge(tree.setdefault(name, {}), origins, types[name], value, f"{key}.", origin)
        elif not (key in COMMAND_LINE_KEYS and origins.get(key) == COMMAND_LINE != origin):
            tree[name] = value
            origins[key] = origin


def _locate(error: ConfigError, origins: Mapping[str, str]) -> ConfigError:
    shown_as = {error.key: error.key}
    for_all = re.sub(r"stages\[\d+\]\.", "", error.key)
    if for_all != error.key:
        shown_as |= {for_all: for_all, "model.stages": error.key}
    elif "[" in error.key:
        shown_as[error.key.partition("[")[0]] = error.key
    else:  # an item of an option that is a mapping
        shown_as[error.key.rpartition(".")[0]] = error.key
    for key, shown_key in shown_as.items():
        if key in origins and not error.origin:
            located = copy.copy(error)
            located.key, located.origin = shown_key, origins[key]
            return located
    return error


def _read_section(path: str, option: str) -> dict[str, Any]:
    """Return the mapping in a YAML file that `--option` names."""
    if not path:
        raise ConfigError(f"--{option}", "expected the path of a YAML file")
    try:
        content = read_yaml(path)
    except ConfigError as error:
        raise ConfigError("", f"--{option} {error}") from None
    if content is None:
        raise ConfigError(path, "the file is empty; expected a mapping of keys to values")
    if not isinstance(content, dict):
        raise ConfigError(path, f"expected a mapping of keys to values, got {shown(content)}")
    return content


class _Parser(argparse.ArgumentParser):
    """argparse over the fields of a dataclass; values stay text until their option's type reads them."""

    def __init__(self, config_class: Any, prog: str | None) -> None:
        description = inspect.cleandoc(config_class.__doc__ or "")
        super().__init__(
            prog=prog,
            usage="%(prog)s [OPTION ...]",
            description=description,
            exit_on_error=False,
            allow_abbrev=False,
        )
        self._types: dict[str, Any] = {}
        self.add_argument("--config", metavar="YAML", action=_Record, nargs="?",
                          help="partial configuration over all sections")  # fmt: skip
        self.add_argument("--print_config", nargs="?", const="all", choices=("all", "skip_default"),
                          help="print the configuration that the line amounts to, and exit")  # fmt: skip
        self._add_options(config_class, "", self)
        self._config_class = config_class

    def parse(self, argv: Sequence[str]) -> tuple[list[Assignment], Literal["all", "skip_default"] | None]:
        """Return the assignments of a line, and the value of --print_config."""
        words = [self._underscored(word) for word in argv]
        namespace = argparse.Namespace(recorded=[])
        try:
            namespace, unknown = self.parse_known_args(words, namespace)
        except argparse.ArgumentError as error:
            option = (error.argument_name or "").partition("/")[0]
            reason = error.message.replace("one argument", "a value").replace("at least a value", "a value")
            raise ConfigError(option, reason, COMMAND_LINE) from None
        if unknown:
            word = next((word for word in unknown if word.startswith("--")), unknown[0]).partition("=")[0]
            hint = suggestion(word, self._option_string_actions)
            raise ConfigError(word, f"unknown option{hint}", COMMAND_LINE)
        assignments = [self._assignment(key, texts) for key, texts in namespace.recorded]
        return assignments, namespace.print_config

    def error(self, message: str) -> NoReturn:
        """Raise the complaint instead of printing it with the usage."""
        raise ConfigError("", message, COMMAND_LINE)

    def _add_options(self, config_class: Any, prefix: str, group: Any) -> None:
        help_texts, defaults = _attribute_docstrings(config_class), _defaults(config_class)
        for name, hint in field_types(config_class).items():
            key = f"{prefix}{name}"
            help_text = help_texts.get(name, "").replace("%", "%%")
            if dataclasses.is_dataclass(hint):
                section = self.add_argument_group(key, help_text or inspect.cleandoc(hint.__doc__ or ""))
                if not prefix:
                    section.add_argument(f"--{key}", metavar="YAML", action=_Record, nargs="?",
                                         help=f"YAML file of the section {key}")  # fmt: skip
                self._add_options(hint, f"{key}.", section)
                continue
            self._types[key] = hint
            default = "null" if defaults[name] is None else str(defaults[name]).replace("%", "%%")
            group.add_argument(
                f"--{key}",
                action=_Record,
                metavar="VALUE",
                help=f"{help_text} ({type_name(hint)}; default: {default})",
                **_count(hint),
            )

    def _underscored(self, word: str) -> str:
        """Return `--two-words` as `--two_words` where that is an option."""
        name, equals, value = word.partition("=")
        other = f"--{name[2:].replace('-', '_')}"
        is_other = word.startswith("--") and name not in self._option_string_actions
        return f"{other}{equals}{value}" if is_other and other in self._option_string_actions else word

    def _assignment(self, key: str, texts: str | list[str] | None) -> Assignment:
        if key not in self._types:
            path = str(texts or "")
            return Assignment("" if key == "config" else key, _read_section(path, key), file_origin(path))
        return Assignment(key, _value(texts, self._types[key]), COMMAND_LINE)


class _Record(argparse.Action):
    """Appends (option, text or list of texts) to the list `recorded`, which keeps the order of the line."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        namespace.recorded.append((self.option_strings[0][2:], values))


def _count(hint: Any) -> dict[str, Any]:
    """Return argparse's arguments for how many words an option takes."""
    if hint is bool:
        return {"nargs": "?", "const": "true"}
    is_list = any(typing.get_origin(member) in (list, tuple) for member in union_members(hint))
    return {"nargs": "+"} if is_list else {}


def _value(texts: str | list[str] | None, hint: Any) -> Any:
    """Return the plain value that the words of an option stand for.

    Several words, or a single one where nothing but a list of text is possible, are a list; otherwise a word
    is read as YAML, unless the option takes text.
    """
    members = union_members(hint)
    elements = [
        arg for m in members if typing.get_origin(m) in (list, tuple) for arg in typing.get_args(m)[:1]
    ]
    if isinstance(texts, list):
        takes_one = any(typing.get_origin(m) not in (list, tuple) and m is not type(None) for m in members)
        is_text = elements[0] is str or typing.get_origin(elements[0]) is Literal
        if len(texts) > 1 or (is_text and not takes_one and texts[0] != "null" and texts[0][:1] != "["):
            return [_value(text, elements[0]) for text in texts]
        texts = texts[0]
    text = texts or ""
    if str in members:
        return None if text == "null" and type(None) in members else text
    if any(text in typing.get_args(member) for member in members if typing.get_origin(member) is Literal):
        return text
    try:
        return parse_yaml(text)
    except Exception:  # whatever it is, it is no value of this option: validation names what is expected
        return text


def _defaults(config_class: Any) -> dict[str, Any]:
    """Return the default of each field of a dataclass, by name; None for fields without one."""
    defaults = {}
    for field in dataclasses.fields(config_class):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        defaults[field.name] = None if default is dataclasses.MISSING else default
    return defaults


@functools.cache
def _attribute_docstrings(config_class: Any) -> dict[str, str]:
    """Return the text that follows each field in the source of a dataclass, by the field's name."""
    body: Iterator[ast.stmt] = iter(
        ast.parse(textwrap.dedent(inspect.getsource(config_class))).body[0].body  # type: ignore[attr-defined]
    )
    texts, field = {}, None
    for statement in body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            field = statement.target.id
        elif field and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            texts[field] = " ".join(str(statement.value.value).split())
            field = None
    return texts
