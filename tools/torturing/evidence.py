"""What a run left behind: whether its files are whole, and whether it is the undisturbed one's twin."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vil import checkpoint_files
from vil.config import ConfigError
from vil.training import checkpoint
from vil.training.logging import METRICS, TIMING_FIELDS

_OF_THE_FOLDER = ("config", "versions")
"""What checkpoints of identical runs in different folders may differ in."""


def records(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of metrics.jsonl without what depends on the clock, and what is wrong with lines."""
    found, problems = [], []
    try:
        lines = (folder / METRICS).read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError as error:
        return [], [f"{METRICS}: {error.strerror}"]
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line) if line.endswith("\n") else None
        except ValueError:
            record = None
        if not isinstance(record, dict):
            problems.append(f"{METRICS}, line {number} is not whole")
            continue
        found.append({key: value for key, value in record.items() if key not in TIMING_FIELDS})
    return found, problems


def check_steps(folder: Path, last: int, up_to: int | None = None) -> list[str]:
    """What is wrong with the steps 1 to `last`, all of which are logged: each must stand there once.

    Args:
        folder: the run's.
        last: the last step that must be there.
        up_to: what comes after this one is nobody's concern: the run was killed there, and will cut it off.
    """
    found, problems = records(folder)
    if up_to is not None:
        problems = []  # a line that a kill cut; all lines before it are looked at below
    steps = [r.get("step") for r in found if r.get("kind") == "train"]
    steps = [step for step in steps if up_to is None or step <= up_to]
    evaluations = [r.get("step") for r in found if r.get("kind") == "validation"]
    for name, numbers in (("step", steps), ("evaluation after step", evaluations)):
        twice = sorted({number for number in numbers if numbers.count(number) > 1})
        problems += [f"{name} {number} is logged twice" for number in twice]
    missing = sorted(set(range(1, last + 1)) - set(steps))
    if missing:
        problems.append(f"steps that are not logged: {', '.join(map(str, missing))}")
    if steps != sorted(steps):
        problems.append("the steps are not in order")
    if steps and max(steps) > last:
        problems.append(f"step {max(steps)} is logged, the last one is {last}")
    return problems


def check_files(folder: Path) -> list[str]:
    """Checkpoints that are not what the digest beside them says, found without the project's own reader."""
    problems = []
    for path in sorted((folder / checkpoint_files.FOLDER).glob("*.pt")):
        beside = path.with_name(path.name + ".sha256")
        try:
            known = re.findall("[0-9a-f]{64}", beside.read_text(encoding="ascii"))
        except OSError:
            problems.append(f"{path.name} has no digest")
            continue
        if hashlib.sha256(path.read_bytes()).hexdigest() not in known:
            problems.append(f"{path.name} does not fit its digest")
    return problems


def chosen(folder: Path) -> tuple[int, list[str]]:
    """The step of the checkpoint that a run here continues from, 0 for none, and what is wrong with it."""
    with warnings_of_files() as warnings:
        try:
            found = checkpoint_files.newest(folder, checkpoint.read)
        except ConfigError as error:
            return 0, [str(error)]
    if found is None:
        return 0, list(warnings)
    path, state = found
    problems = [problem for problem in check_files(folder) if problem.startswith(f"{path.name} ")]
    if path != checkpoint_files.step_file(folder, state["step"]):
        problems.append(f"{path.name} holds step {state['step']}")
    return state["step"], [f"chosen: {problem}" for problem in problems] + list(warnings)


@contextmanager
def warnings_of_files() -> Iterator[list[str]]:
    """What the reader of checkpoints warns of meanwhile."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(checkpoint_files.__name__)
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def compare(folder: Path, reference: Path) -> list[str]:
    """Where a finished run differs from the undisturbed one: checkpoints, metrics.jsonl, summary.json."""
    problems = []
    for name in (_last(reference), str(checkpoint_files.BEST)):
        try:
            own, other = (checkpoint.load(place / name) for place in (folder, reference))
        except ConfigError as error:
            problems.append(str(error))
            continue
        for key in checkpoint.KEYS:
            if key not in _OF_THE_FOLDER:
                problems += (f"{name}: {where}" for where in differences(own[key], other[key], key))
    own_records, broken = records(folder)
    other_records = records(reference)[0]
    problems += broken
    for mine, others in zip(own_records, other_records):
        if mine != others:
            keys = sorted(key for key in {*mine, *others} if mine.get(key) != others.get(key))
            problems.append(f"{METRICS}: {others['kind']} of step {others['step']}: other {', '.join(keys)}")
    if len(own_records) != len(other_records):
        problems.append(f"{METRICS} has {len(own_records)} lines, not {len(other_records)}")
    if _summary(folder) != _summary(reference):
        problems.append("summary.json: other accuracy")
    return problems


def differences(own: Any, other: Any, where: str) -> Iterator[str]:
    """The places where two nested values are not the same to the bit."""
    if isinstance(own, torch.Tensor) and isinstance(other, torch.Tensor):
        if own.dtype != other.dtype or own.shape != other.shape or _bytes(own) != _bytes(other):
            yield where
    elif isinstance(own, Mapping) and isinstance(other, Mapping):
        if own.keys() != other.keys():
            yield f"{where}: other keys"
        for key in (key for key in own if key in other):
            yield from differences(own[key], other[key], f"{where}.{key}")
    elif isinstance(own, list | tuple) and isinstance(other, list | tuple) and len(own) == len(other):
        for number, (mine, others) in enumerate(zip(own, other)):
            yield from differences(mine, others, f"{where}[{number}]")
    elif type(own) is not type(other) or repr(own) != repr(other):  # of floats, repr tells every bit
        yield where


def check_tensorboard(folder: Path, last: int) -> list[str]:
    """What is wrong with the steps in TensorBoard's events, as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every life
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    try:
        steps = [event.step for event in events.Scalars("train/loss")]
    except KeyError:
        return ["TensorBoard has no train/loss"]
    if steps == list(range(1, last + 1)):
        return []
    twice = sorted({step for step in steps if steps.count(step) > 1})
    missing = sorted(set(range(1, last + 1)) - set(steps))
    return [f"TensorBoard has the steps {twice} twice, and lacks {missing}"]


def listing(folder: Path) -> dict[str, str]:
    """Digests of all files of checkpoints, to see that nothing is lost or changed."""
    files = (folder / checkpoint_files.FOLDER).iterdir()
    return {path.name: checkpoint_files.digest_of(path) for path in sorted(files) if path.is_file()}


def _last(folder: Path) -> str:
    files = checkpoint_files.step_files(folder)
    return str(files[0][1].relative_to(folder)) if files else "checkpoints/step_00000000.pt"


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _summary(folder: Path) -> Any:
    try:
        results = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return [
            [result.get(key) for key in ("top1", "top5", "loss", "images", "params")] for result in results
        ]
    except (OSError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}"
