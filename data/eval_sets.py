"""The data sets of `eval_sets`, which a run evaluates on in addition to its validation set."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data.sources.folder import class_folder_options
from vil.config import TRANSFORM_OPTIONS, DataConfig, EvalConfig
from vil.errors import UserError
from vil.runtime.class_names import match_classes
from vil.runtime.yaml_files import read_yaml
from vil.validation import as_tree, rename_options, validate

_logger = logging.getLogger("vil.data")


def eval_set_names(paths: Sequence[str]) -> list[str]:
    """Return names of data sets for logs: the ends of their paths that tell them apart, e.g. `imagenet/val`.

    Raises:
        UserError: a path occurs twice.
    """
    parts = [_path_parts(path) for path in paths]
    if duplicate := next((path for path, part in zip(paths, parts) if parts.count(part) > 1), None):
        raise UserError("eval_sets", f"{duplicate} occurs twice")
    return unique_ends(parts)


def unique_ends(paths: Sequence[Sequence[str]]) -> list[str]:
    """Return the shortest ends of different paths that tell them apart: a, b; or x/a, y/a."""
    lengths = range(1, max(map(len, paths), default=0) + 1)
    ends = (["/".join(parts[-length:]) for parts in paths] for length in lengths)
    return next((names for names in ends if len(set(names)) == len(names)), [])


def _path_parts(path: str) -> list[str]:
    absolute = Path(os.path.abspath(os.path.expanduser(path)))
    absolute = absolute.with_suffix("") if _is_yaml(path) else absolute
    return [re.sub(r"[^\w.-]+", "_", part) for part in absolute.parts[1:]] or ["root"]


def _is_yaml(path: str) -> bool:
    return path.endswith((".yaml", ".yml"))


@contextmanager
def errors_in_eval_set(path: str) -> Iterator[None]:
    """Name the data set in a UserError that is raised inside."""
    try:
        yield
    except UserError as error:
        raise UserError(error.location, error.reason, "" if error.location == path else path) from error


def eval_set_data(path: str, run: DataConfig) -> DataConfig:
    """Return the options of a data set: a folder of class folders, or a YAML file of the section data.

    The evaluation transform is that of the run, so are the number of workers and the index unless the file
    sets them. Unreadable images are skipped by default: they do not end a run.

    Raises:
        UserError: the path does not exist, or the file is invalid.
    """
    if not os.path.exists(os.path.expanduser(path)):
        raise UserError("", "no such file or folder")
    if _is_yaml(path):
        content = read_yaml(os.path.expanduser(path))
        if not isinstance(content, dict):
            raise UserError("", "expected a mapping of keys to values")
        content = rename_options(content, path, "data.")
    else:
        content = {key.partition(".")[2]: value for key, value in class_folder_options(path).items()}
    if content.get("download"):
        raise UserError("data.download", "a file cannot set this option; delete it there")
    if content.get("index") not in (None, "off"):
        raise UserError("data.index", "a file cannot name a folder; delete it there")
    base = {"workers": run.workers, "index": run.index, "unreadable_images": "skip"}
    transform = {key: as_tree(run)[key] for key in TRANSFORM_OPTIONS}
    for key, value in transform.items():
        if key in content and content[key] != value:
            _logger.info("data.%s: %s, required by the run, overrides %s", key, value, path)
    return validate(EvalConfig, {"data": {**base, **content, **transform}}).data


def match_eval_set(
    names: Sequence[str], trained_names: Sequence[str], num_logits: int | None
) -> list[int] | None:
    """Return the index of each class's logit, found by name: see `match_classes`."""
    try:
        return match_classes(names, trained_names, num_logits, hint="")  # a run has no --match_classes
    except UserError as error:
        raise UserError("", error.reason.replace("checkpoint", "run")) from None
