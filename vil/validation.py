"""Validation of plain data against the dataclasses of `vil.config`.

YAML files, stored configurations and command lines all become trees of plain values: mappings, lists, text,
numbers, true, false and null. `validate` is the only way from such a tree to a configuration. It compares
values with the annotated types; text stays text, and nothing that a value names is imported, called or
opened.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import logging
import os
import re
import types
import typing
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Gt, Le, Lt, Predicate
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from vil.config import RENAMED_OPTIONS, RENAMED_VALUES, Tree
from vil.errors import UserError

_logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
TypeHint = Any
"""A class, or a special form of typing as `int | None`."""

MAX_VALUES = 10_000
"""Values in a configuration, counted once per reference; ours have some hundred."""
MAX_DEPTH = 30
"""Nesting of mappings and lists."""
MAX_DIGITS = 18
"""Digits of an integer."""

STORED = "stored configuration"
"""Origin of a configuration that is stored with weights or in a run's folder."""

_TIMM_NUMBERS = """
always_partition attn_drop_rate avg_down base_width cardinality channels class_token conv_bias conv_mlp depth
depths dim dims downsamples drop_block_rate drop_path_rate drop_rate dynamic_img_pad dynamic_img_size
embed_dim embed_dims expand_ratio fc_norm final_norm fix_init head_dim head_init_scale head_norm_first
hidden_size img_size init_values kernel_size kernel_sizes layer_scale_init_value layers ls_init_value
mlp_ratio mlp_ratios no_embed_class norm_eps num_heads num_kv_heads output_stride patch_drop_rate patch_norm
patch_size pos_drop_rate pre_norm proj_bias proj_drop_rate qk_norm qkv_bias reg_tokens sr_ratios
stem_kernel_size stem_size stem_stride stem_width strict_img_size stride strides use_abs_pos_emb use_fc_norm
use_grn use_pos_embed use_post_norm use_rel_pos_bias use_rope use_shared_rel_pos_bias width widths
window_ratio window_size zero_init_last
"""
_TIMM_TEXTS = "act_layer global_pool norm_layer pad_type pool_type pos_embed stem_type weight_init"
TIMM_NUMBER_OPTIONS = frozenset(_TIMM_NUMBERS.split())
TIMM_TEXT_OPTIONS = frozenset(_TIMM_TEXTS.split())
"""Keyword arguments of timm's model classes that a file may set: numbers and flags; and those that may also
be the short name of a layer or a variant. None of them downloads, opens a file or names a path."""

TIMM_PREFIX, PRETRAINED = "timm/", "pretrained"
"""Beginning of the name of a model of timm, and the weights of a teacher that timm downloads."""
PATH_OPTIONS = {
    "data": ("root", "list_file", "val_list", "real_labels"),
    "model": ("init_from", "init_released_config"),
    "schedule": ("teacher", "teacher_weights", "teacher_released_config"),
}
"""Options that name a folder or a file to read, by section; a teacher may be `TIMM_PREFIX`<name> instead, and
its weights `PRETRAINED`."""
_TIMM_STARTS = "cache_dir checkpoint_path pretrained pretrained_cfg pretrained_cfg_overlay pretrained_strict"
TIMM_START_OPTIONS = frozenset(_TIMM_STARTS.split())
"""Keyword arguments of `timm.create_model` that initialize a new model. A run is started with them from the
command line; neither its continuation nor an evaluation needs them, so they are not stored."""


INITIALIZATION = ("init_from", "init_released_config", "new_head")
"""Options of a model section that only initialize a new model."""


def timm_start_options(options: object) -> set[str]:
    """Return the members of `TIMM_START_OPTIONS` that a mapping of timm's options sets."""
    return {key for key in TIMM_START_OPTIONS if isinstance(options, Mapping) and options.get(key)}


def without_start_options(model: Mapping[str, object]) -> Tree:
    """Return a model section, as a tree, without the options that only initialize a new model."""
    kept = {key: value for key, value in model.items() if key not in INITIALIZATION}
    return without_timm_start_options(kept)


def without_timm_start_options(model: Mapping[str, object]) -> Tree:
    """Return a model section, as a tree, without `TIMM_START_OPTIONS`; without any option left, with null."""
    options = model.get("timm_options")
    if not isinstance(options, Mapping):
        return dict(model)
    kept = {key: value for key, value in options.items() if key not in TIMM_START_OPTIONS}
    return {**model, "timm_options": kept or None}


def as_tree(config: DataclassInstance) -> Tree:
    """Return a configuration as nested mappings, lists and scalars, as YAML and JSON have them."""
    tree: Tree = json.loads(json.dumps(dataclasses.asdict(config)))
    return tree


def stored_tree(config: DataclassInstance) -> Tree:
    """Return a configuration as a run stores it: `with_absolute_paths`, without `TIMM_START_OPTIONS`."""
    tree = with_absolute_paths(as_tree(config))
    return {**tree, "model": without_timm_start_options(tree["model"])}


def with_absolute_paths(tree: Tree) -> Tree:
    """Return a copy of a configuration in which the paths of `PATH_OPTIONS` and `eval_sets` are absolute.

    The run can then be continued and evaluated from any folder.
    """
    changed: Tree = {}
    for name, options in PATH_OPTIONS.items():
        section = tree.get(name)
        if isinstance(section, Mapping):
            paths = {key: path for key in options if isinstance(path := section.get(key), str) and path}
            if name == "schedule":
                paths = {key: path for key, path in paths.items() if not _is_from_timm(path)}
            changed[name] = {**section, **{key: _absolute(path) for key, path in paths.items()}}
    eval_sets = tree.get("eval_sets")
    if isinstance(eval_sets, list):
        changed["eval_sets"] = [_absolute(path) for path in eval_sets if isinstance(path, str)]
    return {**tree, **changed}


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _is_from_timm(teacher: str) -> bool:
    return teacher.startswith(TIMM_PREFIX) or teacher == PRETRAINED


def flatten(tree: Mapping[str, object], prefix: str = "") -> Tree:
    """Return nested mappings as one, from dotted keys to values; mappings of options are one value.

    Raises:
        UserError: a value is given twice, by nested and by dotted keys.
    """
    flat: Tree = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and key not in ("timm_options", "optimizer_options"):
            values = flatten(value, f"{prefix}{key}.")
        else:
            values = {f"{prefix}{key}": value}
        for repeated in flat.keys() & values.keys():
            raise UserError(repeated, "is given twice, by nested and by dotted keys")
        flat |= values
    return flat


def validate(
    config_class: type[Config], tree: Mapping[str, object], command_line_keys: Iterable[str] = ()
) -> Config:
    """Return the configuration that a tree of plain values describes; other keys keep their defaults.

    All values but those of `command_line_keys` (dotted), which the user typed, are untrusted: see
    `check_timm_options`.

    Raises:
        UserError: an unknown or missing key, a value of another type, or an option that a file must not
            set. Its location is the full dotted key, e.g. `model.stages[0].heads`.
    """
    check_plain(tree)
    try:
        # JSON holds nothing but plain values, and represents tuples as lists.
        adapter = _adapter(typing.cast(Hashable, config_class))
        config: Config = adapter.validate_json(json.dumps([tree]))[0]
    except (TypeError, ValueError) as error:
        if isinstance(error, ValidationError):
            problems = [_config_error(config_class, tree, problem) for problem in error.errors()]
            # A misspelled key explains why another one is missing.
            raise min(problems, key=lambda problem: "unknown key" not in problem.reason) from None
        raise UserError(*_first_other_value(tree)) from None
    for key, options in _timm_options(config):
        if key not in set(command_line_keys):
            check_timm_options(key, options)
    return config


def check_timm_options(key: str, options: Mapping[str, object]) -> None:
    """Raise UserError for an option that only the command line may pass to `timm.create_model`."""
    known = TIMM_NUMBER_OPTIONS | TIMM_TEXT_OPTIONS
    for name, value in options.items():
        if name not in known:
            reason = "a file may set options of an architecture only; this one is for the command line"
            raise UserError(f"{key}.{name}", f"{reason}{suggestion(name, known, otherwise='')}")
        if isinstance(value, Mapping):
            raise UserError(f"{key}.{name}", f"expected a plain value, got {shown(value)}")
        is_text = name in TIMM_TEXT_OPTIONS and isinstance(value, str) and re.fullmatch(r"\w{0,40}", value)
        if not is_text and any(isinstance(inner, str) for inner in _scalars(value)):
            expected = "a name" if name in TIMM_TEXT_OPTIONS else "a number, a flag or a list of them"
            raise UserError(f"{key}.{name}", f"expected {expected}, got {shown(value)}")


def _scalars(value: object) -> Iterator[object]:
    for inner in value if isinstance(value, list) else [value]:
        yield from _scalars(inner) if isinstance(inner, list) else (inner,)


def check_plain(tree: object) -> None:
    """Raise UserError, without a location, for a tree that is too large to visit or to print.

    A value that is repeated by reference can expand to more values than a computer could visit; numbers of
    thousands of digits cannot be printed.
    """
    waiting, seen = [(tree, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if seen > MAX_VALUES:
            raise UserError("", f"holds more than {MAX_VALUES:,} values, or circular references")
        if depth > MAX_DEPTH:
            raise UserError("", f"values are nested more than {MAX_DEPTH} levels deep")
        if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:
            raise UserError("", f"holds a number of more than {MAX_DIGITS} digits")
        if isinstance(value, Mapping):
            waiting += [(key, depth + 1) for key in value]
            waiting += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += [(inner, depth + 1) for inner in value]


@functools.cache
def field_types(config_class: TypeHint) -> Tree:
    """Return the type of each field of a dataclass, by name, ranges (`Annotated`) included."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def union_members(hint: TypeHint) -> tuple[TypeHint, ...]:
    """Return the types that a union joins, nested ones included; any other type is its only member."""
    if typing.get_origin(hint) is typing.Union or isinstance(hint, types.UnionType):
        return tuple(inner for member in typing.get_args(hint) for inner in union_members(member))
    return (hint,)


def rename_options(tree: Mapping[str, object], origin: str = "", prefix: str = "") -> Tree:
    """Return a tree in which options of earlier versions have their current names (`RENAMED_OPTIONS`).

    Keys have the prefix `prefix`, e.g. `data.`. Renamed options are logged if `origin` names their file.
    """
    renamed = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        new_key = RENAMED_OPTIONS.get(key)
        if new_key is not None and new_key.rpartition(".")[2] not in tree:
            if origin:
                _logger.info("%s: %s is now called %s", origin, key, new_key)
            if isinstance(value, bool):
                value = RENAMED_VALUES.get(key, {}).get(value, value)
            name = new_key.rpartition(".")[2]
        renamed[name] = rename_options(value, origin, f"{key}.") if isinstance(value, Mapping) else value
    return renamed


def without_range(hint: TypeHint) -> TypeHint:
    """Return the type X of Annotated[X, ...], any other type unchanged."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def type_name(hint: TypeHint) -> str:
    """Return a type and its range in words: `an integer of at least 1, or null`, `one of avg, cls`."""
    members = union_members(hint)
    if len(members) > 1:
        return " or ".join(type_name(member) for member in members)
    if typing.get_origin(hint) is Annotated:
        base, *bounds = typing.get_args(hint)
        return f"{type_name(base)}{_range_name(bounds)}"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "null"
    if origin is Literal:
        return "one of " + ", ".join(str(argument) for argument in arguments)
    if origin in (list, tuple):
        element = arguments[0]
        if dataclasses.is_dataclass(element):
            return "a list of stages"
        if all(typing.get_origin(member) is tuple for member in union_members(element)):
            return "a list of pairs, e.g. [[0, 160], [0.6, 224]]"
        bounds = list(typing.get_args(element)[1:]) if typing.get_origin(element) is Annotated else []
        kind = {int: "integers", float: "numbers", str: "texts"}.get(without_range(element))
        count = f"{len(arguments)} " if origin is tuple and arguments[-1] is not ... else ""
        example = ", e.g. [1, 2]" if kind == "integers" and not count else ""
        return f"a list of {count}{kind or type_name(element)}{_range_name(bounds)}{example}"
    if origin is dict:
        return "a mapping of names to plain values"
    if dataclasses.is_dataclass(hint):
        return "a mapping of keys to values"
    return {int: "an integer", float: "a number", bool: "true or false", str: "text"}.get(hint, str(hint))


def _range_name(bounds: Sequence[TypeHint]) -> str:
    """Return the metadata of an annotated number or list in words."""
    texts: dict[type, str] = {}
    for bound in bounds:
        if isinstance(bound, Predicate):
            text = (bound.func.__doc__ or "").rstrip(".")
            if not text:  # python -OO removes it
                return ""
            return f", {text[0].lower()}{text[1:]}"
        texts |= {type(bound): f"{value:,}" for value in dataclasses.astuple(bound)}
    low, above, high, below = (texts.get(kind) for kind in (Ge, Gt, Le, Lt))
    if low and (high or below):
        return f" from {low} to {high or f'below {below}'}"
    if above and below:
        return f" between {above} and {below}, both excluded"
    if above:
        return f" above {above}, up to {high}" if high else f" above {above}"
    return f" of at least {low}" if low else ""


def suggestion(key: str, known: Iterable[str], prefix: str = "", otherwise: str | None = None) -> str:
    """Return the end of a message about an unknown name: the nearest known one with `prefix`.

    If none is near, return `otherwise`, by default all known names if they are few.
    """
    known = list(known)
    if close := difflib.get_close_matches(key, known, n=1):
        return f"; did you mean {prefix}{close[0]}?"
    if otherwise is not None:
        return otherwise
    return f"; expected one of {', '.join(sorted(known))}" if len(known) <= 40 else "; --help lists all"


def shown(value: object, max_length: int = 60) -> str:
    """Return the repr of a value, shortened."""
    text = repr(value)
    return text if len(text) <= max_length else f"{text[: max_length - 3]}..."


@functools.cache
def _adapter(config_class: TypeHint) -> TypeAdapter[Any]:
    # A tuple around the dataclass: pydantic accepts a `config` for it, but not for a plain dataclass.
    wrapped: TypeHint = tuple[config_class]
    return TypeAdapter(wrapped, config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))


def _config_error(config_class: TypeHint, tree: Any, problem: ErrorDetails) -> UserError:
    """Translate an error of pydantic, whose `loc` is the path of a value, also within unions and lists."""
    if problem["type"] == "json_invalid":
        return UserError("", "holds text that is not valid Unicode")
    hint: TypeHint = config_class
    key, value = "", tree
    for part in problem["loc"][1:]:
        if isinstance(part, str) and dataclasses.is_dataclass(hint):
            prefix = f"{key}." if key else ""
            fields, key = field_types(typing.cast(Hashable, hint)), f"{prefix}{part}"
            if part not in fields:
                return UserError(key, f"unknown key{suggestion(part, fields, prefix)}")
            if part not in value:
                return UserError(key, f"is missing; expected {type_name(fields[part])}")
            hint, value = fields[part], value[part]
        elif isinstance(part, int) and (element := _element_dataclass(hint)) is not None:
            key, hint, value = f"{key}[{part}]", element, value[part]
        else:  # within an option: the error names the option
            break
    return UserError(key, f"expected {type_name(hint)}, got {shown(value)}")


def _element_dataclass(hint: TypeHint) -> TypeHint:
    """Return the dataclass X of list[X] or list[X] | None, else None."""
    for member in union_members(hint):
        if typing.get_origin(member) is list and dataclasses.is_dataclass(typing.get_args(member)[0]):
            return typing.get_args(member)[0]
    return None


def _first_other_value(tree: object) -> tuple[str, str]:
    """Return the key of the first value that JSON cannot represent, and the reason."""

    def values(value: object, key: str) -> Iterator[tuple[str, object]]:
        yield key, value
        if isinstance(value, Mapping):
            for name, inner in value.items():
                yield f"{key}.{name}" if key else str(name), name
                yield from values(inner, f"{key}.{name}" if key else str(name))
        elif isinstance(value, list | tuple):
            for index, inner in enumerate(value):
                yield from values(inner, f"{key}[{index}]")

    for key, value in values(tree, ""):
        if type(value) not in (dict, list, tuple, str, int, float, bool, type(None)):
            return key, f"expected text, a number or a list, got {shown(value)}"
    return "", "contains values of an unsupported type"


def _timm_options(config: DataclassInstance, prefix: str = "") -> Iterator[tuple[str, Mapping[str, object]]]:
    """Yield every option `timm_options` that is set, with its dotted key."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "timm_options" and value is not None:
            yield f"{prefix}{field.name}", value
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from _timm_options(value, f"{prefix}{field.name}.")
