"""From a command line and YAML files to a typed configuration, or to one line that says what is wrong.

jsonargparse does the parsing; this module adds what it leaves to its caller: the file that a bad key stands
in, the nearest known key, and messages of one line.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import json
import logging
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import getitem
from pathlib import Path
from typing import Any, Generic, Literal, NoReturn, TypeVar

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from vil.config import ConfigError, printable
from vil.console import finish, say
from vil.plain_values import check_plain
from vil.runtime import files
from vil.yaml_files import read_yaml

set_parsing_settings(docstring_parse_attribute_docstrings=True)

Config = TypeVar("Config")

COMMAND_LINE = "command line"
"""The origin of a key that a word of the line sets."""


@dataclasses.dataclass
class CommandLine(Generic[Config]):
    """A parsed command line.

    Attributes:
        config: the resolved configuration.
        origins: for every key that a file or the line sets, the name of that file, or `command line`.
    """

    config: Config
    origins: dict[str, str]

    def sets(self, section: str) -> bool:
        """Whether a file or the line sets `section` or anything in it."""
        return any(key == section or key.startswith(f"{section}.") for key in self.origins)

    def locate(self, error: ConfigError) -> ConfigError:
        """The same error with the file, or `command line`, that set the option in front.

        An option of one stage is looked up as `model.stages[1].window`, as `model.window`, which sets it
        for all stages, and as `model.stages`.
        """
        shown_as = {error.key: error.key}
        for_all = re.sub(r"stages\[\d+\]\.", "", error.key)
        if for_all != error.key:
            shown_as |= {for_all: for_all, "model.stages": error.key}
        for key, shown in shown_as.items():
            if key in self.origins:
                return type(error)("", f"{self.origins[key]}: {shown}: {error.reason}")
        return error


def parse(
    config_class: type[Config],
    argv: Sequence[str],
    base_files: Mapping[str, Path] | None = None,
    base_values: Mapping[str, Any] | None = None,
    prog: str | None = None,
) -> CommandLine[Config]:
    """Parses a command line into a configuration.

    Args:
        config_class: a dataclass whose fields are options or sections (dataclasses).
        argv: the words of the line, without the program's name.
        base_files: for a section, the file that is loaded where the line names none.
        base_values: values under everything else, as nested mappings: a stored configuration.
        prog: the program's name, for its help.

    Raises:
        ConfigError: names the file and the key; its text is the one line to show.
        SystemExit: after --help or --print_config.
    """
    words = list(_completed(argv, config_class))
    for section, path in (base_files or {}).items():
        if not any(name == section for name, _ in _options(words)):
            words = [f"--{section}", str(path), *words]
    hints = _field_types(config_class)
    sections = {name for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    origins: dict[str, str] = {}
    for name, value in _options(words):
        if name == "config" or name in sections:
            content = _read(value, name)
            prefix = "" if name == "config" else f"{name}."
            hint = config_class if name == "config" else hints[name]
            origins.update((key, value) for key in _check(content, hint, prefix, value))
        else:
            origins[name] = COMMAND_LINE
    parser = ArgumentParser(
        prog=prog, description=(config_class.__doc__ or "").strip(), exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="Partial configuration file over all sections.")
    parser.add_class_arguments(config_class, None)
    if base_values:
        try:
            check_plain(base_values)
        except ConfigError as error:
            raise ConfigError("stored configuration", error.reason) from None
        keys = _check(base_values, config_class, "", "stored configuration")
        parser.set_defaults({key: functools.reduce(getitem, key.split("."), base_values) for key in keys})
    try:
        values = vars(parser.instantiate(parser.parse_args(words)))
    except ArgumentError as error:
        raise _explained(str(error), config_class, parser) from error
    values.pop("config", None)
    return CommandLine(config_class(**values), origins)


def without_print_config(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a line without --print_config, and --print_config itself.

    A program that parses its line several times, because the first time tells it what lies underneath, adds
    the latter to the last time.
    """
    printing = [word for word in words if word.partition("=")[0] == "--print_config"]
    return [word for word in words if word not in printing], printing


class OneRankError(ConfigError):
    """A ConfigError of which the other ranks may know nothing."""


@contextmanager
def reading_images() -> Iterator[None]:
    """Makes what is raised inside about the data an `OneRankError`: each rank reads images of its own."""
    try:
        yield
    except ConfigError as error:
        if error.key.startswith("data."):
            raise OneRankError(error.key, error.reason) from error
        raise


def main(program: Callable[[Sequence[str]], None]) -> NoReturn:
    """Runs `program` with the words of the command line, and ends the process as every program here does.

    Exit status 2 and one line on standard error for a ConfigError, 1 where the memory of the machine or of
    its GPU is not enough, 130 for Ctrl-C. Of several processes that torchrun starts on one machine, the first
    one speaks, and each one of what it alone may know. What the package logs meanwhile is printed.
    """
    status, line = 0, None
    rank, speaks = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0") == "0"
    screen, logger = _Screen(), logging.getLogger("vil")
    if rank == "0":
        logger.addHandler(screen)
        logger.setLevel(logging.INFO)
    try:
        program(sys.argv[1:])
    except SystemExit as ended:
        if not isinstance(ended.code, int):
            raise
        status = ended.code
    except ConfigError as error:
        status, line = 2, f"error: {error}"
        if isinstance(error, OneRankError) and rank != "0":
            speaks, line = True, f"[rank {rank}] {line}"
    except KeyboardInterrupt:
        status, line = 130, "interrupted"
    except Exception as error:
        reason = out_of_memory(error)
        if reason is not None:
            line = f"error: {reason}; smaller batches or images, or a smaller model, need less"
            if rank != "0":
                speaks, line = True, f"[rank {rank}] {line}"
        elif _has_process_group():
            traceback.print_exc()
        else:
            raise
        status = 1
    finally:
        logger.removeHandler(screen)
    if line is not None and speaks:
        say(" ".join(printable(line).split()), sys.stderr)
    finish()
    if _has_process_group():  # left after an error: it would wait for the other ranks, perhaps for ever
        os._exit(status)
    raise SystemExit(status)


def _has_process_group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def write_output(path: Path, content: str | bytes, option: str = "") -> None:
    """Write a result, and the folders above it; `path` holds the old content or all of the new.

    A device, a pipe and /dev/stdout are written to, and not replaced.

    Args:
        path: the file.
        content: text, written as UTF-8, or bytes.
        option: what to name in the error, where it was an option that named the file.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_output(path, content)
    except OSError as error:
        reason = f"cannot be written: {error.strerror or error}"
        raise ConfigError(*((option, f"{path} {reason}") if option else (str(path), reason))) from None


def out_of_memory(error: Exception) -> str | None:
    """What an error of Python, of PyTorch on a CPU or on a GPU says that had too little memory, on one line;
    None for any other."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    if isinstance(error, MemoryError) or any(some in str(error) for some in words):
        return f"out of memory: {(str(error).splitlines() or ['MemoryError'])[0]}"
    return None


class _Screen(logging.Handler):
    """Log records as lines on standard output, among those that a program prints itself."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


class ToolParser(argparse.ArgumentParser):
    """An argument parser of the standard library whose complaints are `ConfigError`s of one line."""

    def error(self, message: str) -> NoReturn:
        """Raises the complaint instead of printing it with the usage."""
        raise ConfigError(COMMAND_LINE, message)

    def add_checkpoint(self) -> None:
        """Adds the arguments of `vil.models.released.open_model`: which weights to read."""
        self.add_argument(
            "checkpoint", help="run folder, checkpoint of train.py, safetensors, or published checkpoint"
        )
        self.add_argument("--released-config", metavar="YAML", help="configuration of a published checkpoint")
        self.add_argument("--weights", choices=("auto", "raw", "ema"), default="auto",
                          help="which weights of a run; auto takes the kind that was best")  # fmt: skip
        self.add_argument("--which", choices=("best", "last"), default="best",
                          help="which checkpoint of a run's folder")  # fmt: skip


def _completed(words: Sequence[str], config_class: type) -> Iterator[str]:
    """The words as jsonargparse reads them.

    `--name a b` is a list of texts, a bare `--name` is true, and `--two-words` is the option `two_words`.
    """
    groups: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            groups.append([])
        groups[-1].append(word)
    for group in filter(None, groups):
        name, equals, value = group[0][2:].partition("=")
        values = [value, *group[1:]] if equals else group[1:]
        hint = _hint_of(config_class, name)
        underscored = name.replace("-", "_")
        if hint is None and _hint_of(config_class, underscored) is not None:
            name, hint = underscored, _hint_of(config_class, underscored)
            group[0] = f"--{name}{equals}{value}"
        if hint is bool and not values:
            yield f"--{name}=true"
        elif list[str] in (hint, *typing.get_args(hint)) and values and not values[0].startswith("["):
            yield f"--{name}={json.dumps(values)}"
        else:
            yield from group


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(name, value) of every --name value and --name=value; the value of a bare --name is empty."""
    for position, word in enumerate(words):
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            following = words[position + 1] if position + 1 < len(words) else ""
            yield name, value if equals else ("" if following.startswith("--") else following)


def _read(path: str, option: str) -> dict[str, Any]:
    """The mapping in a YAML file that `option` names."""
    if not path:
        raise ConfigError(f"--{option}", "expected the path of a YAML file")
    try:
        content = read_yaml(path)
    except ConfigError as error:
        raise ConfigError("", f"--{option} {error}") from None
    if content is None:
        raise ConfigError(path, "the file is empty; expected a mapping of keys to values")
    if not isinstance(content, dict):
        raise ConfigError(path, f"expected a mapping of keys to values, got {_shown(content)}")
    return content


def _check(value: Any, hint: Any, prefix: str, path: str) -> Iterator[str]:
    """Yields the full keys that a mapping from `path` sets; raises ConfigError for a bad key or value."""
    fields = _field_types(hint)
    for key, inner in value.items():
        name = f"{prefix}{key}"
        if key not in fields:
            raise ConfigError(path, f"{name}: unknown key{_nearest(str(key), fields, prefix)}")
        inner_hint = fields[key]
        if dataclasses.is_dataclass(inner_hint):
            if not isinstance(inner, dict):
                raise ConfigError(path, f"{name}: expected a mapping of keys to values, got {_shown(inner)}")
            yield from _check(inner, inner_hint, f"{name}.", path)
            continue
        element = _element_dataclass(inner_hint)
        if element is not None and isinstance(inner, list):
            for position, item in enumerate(inner):
                place = f"{name}[{position}]"
                if not isinstance(item, dict):
                    reason = f"{place}: expected a mapping of keys to values, got {_shown(item)}"
                    raise ConfigError(path, reason)
                list(_check(item, element, f"{place}.", path))
        if not _accepts(inner_hint, inner):
            raise ConfigError(path, f"{name}: expected {_type_name(inner_hint)}, got {_shown(inner)}")
        yield name


def _accepts(hint: Any, value: Any) -> bool:
    if value is None:  # which jsonargparse takes for every option that has no default
        return hint is type(None) or type(None) in typing.get_args(hint)
    checker = ArgumentParser(exit_on_error=False)
    checker.add_argument("--value", type=hint)
    try:
        checker.parse_object({"value": value})
    except ArgumentError:
        return False
    return True


def _explained(message: str, config_class: type, parser: ArgumentParser) -> ConfigError:
    """One line for an error that jsonargparse found on the line itself; files are checked before."""
    if match := re.match(r'Parser key "([^"]+)"', message):
        key = match[1]
        hint = _hint_of(config_class, key)
        given = re.search(r"(?:Given value|Got value): (.*)", message)
        if hint is not None and given:
            return ConfigError(
                f"command line: --{key}", f"expected {_type_name(hint)}, got {given[1].strip()}"
            )
        return ConfigError(f"command line: --{key}", message.splitlines()[-1].strip(" -"))
    if match := re.match(r"[Uu]nrecognized arguments: (\S+)", message):
        word = match[1].partition("=")[0]
        known = [option for action in parser._actions for option in action.option_strings]
        return ConfigError(f"command line: {word}", f"unknown option{_nearest(word, known, '')}")
    if match := re.match(r"argument (\S+): (.*)", message):
        option = match[1].partition("/")[0]  # a list is also known as --name+
        return ConfigError(f"command line: {option}", match[2].replace("one argument", "a value"))
    return ConfigError("command line", message.splitlines()[0])


def _nearest(key: str, known: Sequence[str] | Mapping[str, Any], prefix: str) -> str:
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    return f"; known are {', '.join(sorted(known))}" if len(known) <= 40 else "; --help lists all"


def _field_types(config_class: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(config_class)
    return {f.name: hints[f.name] for f in dataclasses.fields(config_class)}


def _hint_of(config_class: Any, key: str) -> Any:
    """The type of a dotted key, or None where there is none."""
    for part in key.split("."):
        config_class = (
            _field_types(config_class).get(part) if dataclasses.is_dataclass(config_class) else None
        )
    return config_class


def _element_dataclass(hint: Any) -> Any:
    """The dataclass X of list[X] or list[X] | None, else None."""
    for option in (hint, *typing.get_args(hint)):
        if typing.get_origin(option) is list and dataclasses.is_dataclass(typing.get_args(option)[0]):
            return typing.get_args(option)[0]
    return None


def _type_name(hint: Any) -> str:
    """A type as a user writes its values: `an integer or null`, `avg, cls or null`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "null"
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in arguments)
    if origin is typing.Union or isinstance(hint, types.UnionType):
        return " or ".join(_type_name(a) for a in arguments)
    if origin is tuple:
        return "a list " + (
            "of integers, as [1, 2]" if arguments[-1] is ... else f"of {len(arguments)} numbers"
        )
    if origin is list:
        return f"a list of {'stages' if dataclasses.is_dataclass(arguments[0]) else _type_name(arguments[0])}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a mapping"
    return {int: "an integer", float: "a number", bool: "true or false", str: "text"}.get(hint, str(hint))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
