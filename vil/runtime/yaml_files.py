"""YAML files, read strictly: plain values only, no duplicate keys, and errors of one line."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from vil.errors import UserError, error_reason, one_line
from vil.runtime.files import open_regular
from vil.validation import MAX_VALUES, check_plain

MAX_NUMBER_LENGTH = 10_000
MAX_BYTES = 1_000_000
"""Size of a file that may be a configuration; ours have some thousand bytes."""


def read_yaml(path: str | Path) -> Any:
    """Return the content of a YAML file: mappings, lists and plain values that pass `check_plain`.

    Raises:
        UserError: the file cannot be used; names it and, if known, the line.
    """
    try:
        with open_regular(path) as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError("", f"larger than {MAX_BYTES:,} bytes")
        return parse_yaml(content.decode("utf-8"))
    except UserError as error:
        raise UserError(str(path), error.reason) from None
    except FileNotFoundError:
        raise UserError(str(path), "no such file") from None
    except OSError as error:
        raise UserError(str(path), f"cannot be read: {error_reason(error)}") from None
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(str(path), f"{where}not valid YAML: {one_line(error.problem)}") from None
    except Exception as error:  # PyYAML passes on any exception of its constructors
        raise UserError(str(path), f"not valid YAML: {error_reason(error)}") from None


def parse_yaml(text: str) -> Any:
    """Return the content of a YAML text. PyYAML raises any exception if it is not valid."""
    # A subclass of SafeLoader: no tag constructs anything but plain values.
    tree = yaml.load(text, Loader=_StrictLoader)  # noqa: S506
    check_plain(tree)
    return tree


def yaml_text(tree: object) -> str:
    """Return plain values as the text of a YAML file, from which `parse_yaml` reads the same values."""
    return yaml.dump(tree, Dumper=_StrictDumper, sort_keys=False, allow_unicode=True)


class _StrictDumper(yaml.SafeDumper):
    """PyYAML's safe dumper, except that it quotes texts that `_StrictLoader` would read as numbers."""


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, except that a duplicate key is an error.

    Aliases, which take a few bytes each, are counted before anything is constructed from them.
    """

    def construct_number(self, node: yaml.ScalarNode) -> object:
        """Construct a number of YAML 1.2: 1:30 is text, not of base 60, and 010 is ten, not of base 8."""
        text = self.construct_scalar(node)
        if ":" in text:
            return text
        if decimal := re.fullmatch(r"([-+]?)0[0_]*([0-9][0-9_]*)", text):
            node = yaml.ScalarNode(node.tag, f"{decimal[1]}{decimal[2]}", node.start_mark, node.end_mark)
        if len(text) > MAX_NUMBER_LENGTH:
            raise yaml.constructor.ConstructorError(None, None, "a number that is too long", node.start_mark)
        is_float = node.tag.endswith(":float")
        return self.construct_yaml_float(node) if is_float else self.construct_yaml_int(node)

    def construct_document(self, node: yaml.Node) -> object:
        waiting, seen = [node], 0
        while waiting:
            inner = waiting.pop()
            seen += 1
            if seen > MAX_VALUES:
                raise UserError("", f"holds more than {MAX_VALUES:,} values, or circular references")
            if isinstance(inner, yaml.SequenceNode):
                waiting += inner.value
            elif isinstance(inner, yaml.MappingNode):
                waiting += [part for pair in inner.value for part in pair]
        return super().construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        keys = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # refused below, with its line
            if key in keys:
                reason = f"given twice in the mapping that begins on line {node.start_mark.line + 1}"
                raise UserError("", f"{one_line(key)}: {reason}")
            keys.add(key)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, UserError, RecursionError):
            raise
        except Exception as error:  # of any kind, e.g. IndexError for `!!int ""`
            problem = f"{one_line(repr(node.value))} is not a value of {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


for _class in (_StrictLoader, _StrictDumper):
    # YAML 1.1, which PyYAML reads, parses 1e-3 as text: it requires a point and a sign, YAML 1.2 does not.
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d[\d_]*(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )
    # 08 is no octal number: YAML 1.1 has it as text, 1.2 as a decimal number.
    _class.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?0[0-9]*[89][0-9]*$"), list("-+0"))

for _kind in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _StrictLoader.construct_number)
