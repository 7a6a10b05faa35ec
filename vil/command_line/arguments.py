"""Parse the arguments of train.py and eval.py into assignments of values to keys.

The options are the fields of the dataclasses in `vil.config`: `--section.field VALUE`. `--section FILE` and
`--config FILE` load YAML files.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import functools
import inspect
import os
import textwrap
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import vil
from vil.config import RENAMED_OPTIONS, Tree
from vil.errors import COMMAND_LINE, UserError
from vil.runtime.yaml_files import parse_yaml, read_yaml
from vil.validation import TypeHint, field_types, shown, suggestion, type_name, union_members, without_range

OPTION_SYNONYMS = {
    "amp": "precision",
    "b": "schedule.batch_size",
    "data_dir": "data.root",
    "data_path": "data.root",
    "drop": "model.dropout",
    "img_size": "model.image_size",
    "input_size": "model.image_size",
    "model_ema_decay": "schedule.ema_decay",
    "opt": "schedule.optimizer",
    "sched": "schedule.scheduler",
    "smoothing": "schedule.label_smoothing",
}
"""Options of timm's and DeiT's training scripts -> options of this project, for error messages."""

CONFIGS = Path(__file__).parents[2] / "configs"
"""The configurations of this repository."""
CONFIG_FOLDERS = {"model": "models", "schedule": "schedules", "data": "data", "config": "ablations"}
"""Options that load a YAML file -> the folder of configs/ with such files."""


@dataclass(frozen=True)
class Assignment:
    """A value for a dotted key, or for the whole tree if that is empty.

    A section's value is a mapping: keys that it lacks keep their values. The origin is the file that contains
    the value, or `COMMAND_LINE`.
    """

    key: str
    value: Any
    origin: str


def file_origin(path: str | Path) -> str:
    """Return a file's name as an origin, which is never equal to `COMMAND_LINE`."""
    return f"./{path}" if str(path) == COMMAND_LINE else str(path)


def find_file(path: str, option: str) -> str:
    """Return the YAML file that `--option path` names.

    `configs/models/vil_tiny.yaml`, `vil_tiny.yaml` and `vil_tiny` are the file of this repository unless the
    working directory has one of this name. A path that does not exist is returned unchanged.
    """
    if os.path.exists(path) and not os.path.isdir(path):
        return path
    file = path
    if path and os.path.basename(path) == path:
        name = path if path.endswith(".yaml") else f"{path}.yaml"
        file = str(CONFIGS / CONFIG_FOLDERS.get(option, "") / name)
    elif os.path.normpath(path).startswith(f"configs{os.sep}"):
        file = str(CONFIGS.parent / path)
    return file if os.path.isfile(file) else path


def read_section(path: str | Path, option: str) -> Tree:
    """Return the mapping in the YAML file that `--option` names."""
    if not str(path):
        raise UserError(f"--{option}", "expected the path of a YAML file")
    try:
        content = read_yaml(path)
    except UserError as error:
        hint = _similar_file(str(path), option) if error.reason == "no such file" else ""
        raise UserError(str(path), f"{error.reason}{hint}", f"--{option}") from None
    if not isinstance(content, dict):
        prefix = "the file is empty; expected" if content is None else "expected"
        got = "" if content is None else f", got {shown(content)}"
        raise UserError(str(path), f"{prefix} a mapping of keys to values{got}")
    return content


def _similar_file(path: str, option: str) -> str:
    """Return the end of a message that names the file in configs/ that `path` probably means."""
    folder = Path("configs", CONFIG_FOLDERS.get(option, ""))
    names = [file.stem for file in (CONFIGS.parent / folder).glob("*.yaml")]
    close = difflib.get_close_matches(Path(path).stem, names, n=1)
    return f"; did you mean --{option} {folder / close[0]}.yaml?" if close else ""


class ArgumentParser(argparse.ArgumentParser):
    """argparse over the fields of a configuration; values stay text until their option's type parses them."""

    def __init__(self, config_class: TypeHint, prog: str | None) -> None:
        super().__init__(
            prog=prog,
            usage="%(prog)s [OPTION ...]",
            description=inspect.cleandoc(config_class.__doc__ or ""),
            exit_on_error=False,
            allow_abbrev=False,
        )
        self.add_argument("--version", action="version", version=f"vil {vil.__version__}")
        self._types: dict[str, TypeHint] = {}
        self._add_file_option(self, "config", "partial configuration over all sections")
        self.add_argument(
            "--print_config",
            nargs="?",
            const="all",
            choices=("all", "skip_default"),
            help="print the resolved configuration and exit",
        )
        self._add_options(config_class, "", self)

    def parse(self, argv: Sequence[str]) -> tuple[list[Assignment], Literal["all", "skip_default"] | None]:
        """Return the assignments in the order of the arguments, and the value of --print_config."""
        namespace = argparse.Namespace(recorded=[])
        try:
            namespace, unknown = self.parse_known_args(map(self._with_underscores, argv), namespace)
        except argparse.ArgumentError as error:
            option = (error.argument_name or "").partition("/")[0]
            reason = error.message.replace("one argument", "a value").replace("at least a value", "a value")
            raise UserError(option, reason, COMMAND_LINE) from None
        if unknown:
            word = next((word for word in unknown if word.startswith("--")), unknown[0]).partition("=")[0]
            raise UserError(word, f"unknown option{self._hint(word)}", COMMAND_LINE)
        return [self._assignment(key, texts) for key, texts in namespace.recorded], namespace.print_config

    def error(self, message: str) -> NoReturn:
        """Raise the error instead of printing it with the usage."""
        raise UserError("", message, COMMAND_LINE)

    def _add_options(self, config_class: TypeHint, prefix: str, group: argparse._ActionsContainer) -> None:
        help_texts, defaults = _attribute_docstrings(config_class), _defaults(config_class)
        for name, hint in field_types(config_class).items():
            key = f"{prefix}{name}"
            help_text = help_texts.get(name, "").replace("%", "%%")
            if dataclasses.is_dataclass(hint):
                section = self.add_argument_group(key, help_text or inspect.cleandoc(hint.__doc__ or ""))
                if not prefix:
                    self._add_file_option(section, key, f"YAML file of the section {key}")
                self._add_options(hint, f"{key}.", section)
                continue
            self._types[key] = hint
            default = "null" if defaults[name] is None else str(defaults[name]).replace("%", "%%")
            group.add_argument(
                f"--{key}",
                action=_Record,
                metavar="VALUE",
                help=f"{help_text} ({type_name(hint)}; default: {default})",
                **_nargs(hint),
            )

    def _add_file_option(self, group: argparse._ActionsContainer, key: str, help_text: str) -> None:
        group.add_argument(f"--{key}", metavar="YAML", action=_Record, nargs="?", help=help_text)

    def _with_underscores(self, word: str) -> str:
        """Return `--two-words` as `--two_words` if that is an option."""
        name, equals, value = word.partition("=")
        option = f"--{name[2:].replace('-', '_')}"
        is_option = word.startswith("--") and option in self._option_string_actions
        return f"{option}{equals}{value}" if is_option else word

    def _hint(self, word: str) -> str:
        """Return the end of a message about an unknown option: the option that was probably meant."""
        name = word.lstrip("-").replace("-", "_")
        if key := RENAMED_OPTIONS.get(name) or OPTION_SYNONYMS.get(name):
            known = [key] if key in self._types else []
        else:
            known = [key for key in self._types if key.rpartition(".")[2] == name]
        if not word.startswith("-") or not known:
            return suggestion(word, self._option_string_actions)
        return f"; did you mean {' or '.join(f'--{key}' for key in known)}?"

    def _assignment(self, key: str, texts: str | list[str] | None) -> Assignment:
        if key in self._types:
            return Assignment(key, _parse_value(texts, self._types[key]), COMMAND_LINE)
        path = find_file(str(texts or ""), key)
        return Assignment("" if key == "config" else key, read_section(path, key), file_origin(path))


class _Record(argparse.Action):
    """Append (option, text or list of texts) to the list `recorded`, in the order of the arguments."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        namespace.recorded.append((self.option_strings[0][2:], values))


def _nargs(hint: TypeHint) -> Tree:
    """Return argparse's arguments for the number of values of an option."""
    if hint is bool:
        return {"nargs": "?", "const": "true"}
    is_list = any(typing.get_origin(without_range(m)) in (list, tuple) for m in union_members(hint))
    return {"nargs": "+"} if is_list else {}


def _parse_value(texts: str | list[str] | None, hint: TypeHint) -> object:
    """Return the plain value of an option.

    Several texts, or a single one if only a list of any length is possible, are a list; any other text is
    parsed as YAML, unless the option takes text.
    """
    members = [without_range(member) for member in union_members(hint)]
    lists = [member for member in members if typing.get_origin(member) in (list, tuple)]
    if isinstance(texts, list):
        elements = [without_range(typing.get_args(member)[0]) for member in lists]
        takes_one = any(member not in (*lists, type(None)) for member in members)
        is_list = typing.get_origin(lists[0]) is list and typing.get_origin(elements[0]) is not tuple
        if len(texts) > 1 or (is_list and not takes_one and texts[0] != "null" and texts[0][:1] != "["):
            return [_parse_value(text, elements[0]) for text in texts]
        texts = texts[0]
    text = texts or ""
    if str in members:
        return None if text == "null" and type(None) in members else text
    if any(text in typing.get_args(member) for member in members if typing.get_origin(member) is Literal):
        return text
    try:
        return parse_yaml(text)
    except Exception:  # no value of this option: validation reports the expected type
        return text


def _defaults(config_class: TypeHint) -> dict[str, object]:
    """Return the default of each field of a dataclass, by name; None for fields without one."""
    missing, defaults = dataclasses.MISSING, {}
    for field in dataclasses.fields(config_class):
        default = field.default if field.default_factory is missing else field.default_factory()
        defaults[field.name] = None if default is missing else default
    return defaults


@functools.cache
def _attribute_docstrings(config_class: TypeHint) -> dict[str, str]:
    """Return the string literal after each field in the source of a dataclass, by the field's name."""
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
