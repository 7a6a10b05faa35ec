"""YAML files, read strictly: plain values only, no key twice, and one line for whatever is wrong."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from vil.config import ConfigError
from vil.runtime.files import open_regular
from vil.schema import MAX_VALUES, check_plain

MAX_NUMBER_LENGTH = 10_000
MAX_BYTES = 1_000_000
"""Size of a file that may be a configuration; ours have some thousand bytes."""


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file: mappings, lists and plain values.

    Raises:
        ConfigError: the file cannot be read, is no valid YAML, gives a key twice, or holds what no
            configuration does (`vil.schema.check_plain`); names the file, and the line where it is known.
    """
    try:
        with open_regular(path) as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError("", f"more than {MAX_BYTES:,} bytes, which no configuration has")
        return parse_yaml(content.decode("utf-8"))
    except ConfigError as error:
        raise ConfigError(str(path), error.reason) from None
    except FileNotFoundError:
        raise ConfigError(str(path), "no such file") from None
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror or error}") from None
    except _RepeatedKeyError as error:
        raise ConfigError(str(path), str(error)) from None
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(str(path), f"{where}not valid YAML: {_one_line(error.problem)}") from None
    except Exception as error:  # PyYAML lets through whatever its constructors come upon
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(str(path), f"not valid YAML: {_one_line(reason)}") from None


def parse_yaml(text: str) -> Any:
    """Return what a YAML text holds.

    Raises:
        ConfigError: it holds too much (`vil.schema.check_plain`).
        Exception: of PyYAML, if it is not valid.
    """
    # A subclass of SafeLoader: no tag constructs anything but plain values.
    tree = yaml.load(text, Loader=_StrictLoader)  # noqa: S506
    check_plain(tree)
    return tree


class _RepeatedKeyError(Exception):
    """A key that a mapping has twice."""


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, except that a key given twice is an error and not a silent choice.

    Aliases, which cost a stranger a few bytes each, are counted before anything is made of them.
    """

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        """Construct a number of YAML 1.2: 1:30 is text there, and no number of base 60."""
        text = self.construct_scalar(node)
        if ":" in text:
            return text
        if len(text) > MAX_NUMBER_LENGTH:
            raise yaml.constructor.ConstructorError(None, None, "a number that is too long", node.start_mark)
        is_float = node.tag.endswith(":float")
        return self.construct_yaml_float(node) if is_float else self.construct_yaml_int(node)

    def construct_document(self, node: yaml.Node) -> Any:
        waiting, seen = [node], 0
        while waiting:
            inner = waiting.pop()
            seen += 1
            if seen > MAX_VALUES:
                reason = f"holds more than {MAX_VALUES:,} values, or values inside of themselves"
                raise ConfigError("", reason)
            if isinstance(inner, yaml.SequenceNode):
                waiting += inner.value
            elif isinstance(inner, yaml.MappingNode):
                waiting += [part for pair in inner.value for part in pair]
        return super().construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # refused below, with its line
            if key in keys:
                line = node.start_mark.line + 1
                raise _RepeatedKeyError(
                    f"{_one_line(key)}: given twice in the mapping that begins on line {line}"
                )
            keys.add(key)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, _RepeatedKeyError, RecursionError):
            raise
        except (
            Exception
        ) as error:  # of any kind: IndexError for `!!int ""`, AttributeError for `!!timestamp x`
            problem = f"{_one_line(repr(node.value))} is no value of {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


# YAML 1.1, which PyYAML reads, takes 1e-3 for text: a point and a sign are needed there, in YAML 1.2 neither.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


for _kind in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _StrictLoader.construct_number)


def _one_line(value: Any, most: int = 200) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= most else text[: most - 3] + "..."
