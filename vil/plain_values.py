"""What a stranger's configuration may be made of: plain values, not too many, and none that names code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vil.config import ConfigError

MOST_VALUES = 10_000
"""Values that a configuration may have, each counted as often as it is repeated; ours have some hundred."""
DEEPEST = 30
"""Levels that mappings and lists may be nested in."""
MOST_DIGITS = 18


def check_plain(tree: Any) -> None:
    """Refuses a tree of values that jsonargparse, or a message about it, could do harm with.

    A value that is repeated by reference can stand for more values than a computer could visit; `class_path`
    asks jsonargparse to import a module; numbers of thousands of digits cannot be printed.

    Raises:
        ConfigError: what is wrong, without a key.
    """
    waiting, seen = [(tree, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if seen > MOST_VALUES:
            raise ConfigError("", f"holds more than {MOST_VALUES:,} values, or values inside of themselves")
        if depth > DEEPEST:
            raise ConfigError("", f"values are nested more than {DEEPEST} levels deep")
        if isinstance(value, int) and abs(value) >= 10**MOST_DIGITS:
            raise ConfigError("", f"holds a number of more than {MOST_DIGITS} digits")
        if isinstance(value, Mapping):
            if "class_path" in value:
                raise ConfigError("", "class_path: unknown key; a configuration names no classes to import")
            waiting += [(key, depth + 1) for key in value]
            waiting += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += [(inner, depth + 1) for inner in value]
