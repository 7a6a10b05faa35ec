"""Checkpoints that were damaged while nobody looked: bits that flipped, files that were cut, digests gone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tools.torturing import evidence
from tools.torturing.stage import Stage, check_end, check_files_unchanged, check_one_line
from tools.torturing.table import Row
from vil import checkpoint_files

Damage = Callable[[Path, np.random.Generator], None]


def flip(path: Path, draws: np.random.Generator) -> None:
    """Flips one bit."""
    content = bytearray(path.read_bytes())
    content[int(draws.integers(len(content)))] ^= 1 << int(draws.integers(8))
    path.write_bytes(content)


def cut(path: Path, draws: np.random.Generator) -> None:
    """Cuts the file at some length."""
    path.write_bytes(path.read_bytes()[: int(draws.integers(path.stat().st_size))])


def forget_digest(path: Path, draws: np.random.Generator) -> None:
    """Removes the digest."""
    checkpoint_files.digest_file(path).unlink()


def damage_digest(path: Path, draws: np.random.Generator) -> None:
    """Flips a bit of the digest."""
    flip(checkpoint_files.digest_file(path), draws)


KINDS: dict[str, Damage] = {
    "newest checkpoint with a flipped bit": flip,
    "newest checkpoint cut": cut,
    "newest checkpoint without its digest": forget_digest,
    "newest checkpoint with a damaged digest": damage_digest,
}


def newest(stage: Stage) -> list[Row]:
    """The newest checkpoint is damaged: passed over with a warning, kept, and the end is the same."""
    rows = []
    for number, (title, damage) in enumerate(KINDS.items()):
        row = Row(title, 1)
        with row.trial() as trial:
            run = stage.half("damaged")
            (logged, path), (older, _) = checkpoint_files.step_files(run.folder)[:2]
            damage(path, stage.random(20, number))
            with evidence.warnings_of_files() as warnings:
                step = evidence.chosen(run.folder)[0]
            trial.expect(step == older, f"{step} was chosen, not {older}")
            trial.expect(len(warnings) == 1 and str(path) in warnings[0], f"warnings: {warnings}")
            content = path.read_bytes()
            trial.lose(logged - older)
            life = run.finish()
            trial.expect(life.continued() == older, f"continued from {life.continued()}, not {older}")
            trial.expect(f"warning: passed over {path}" in life.said(), f"no warning: {life.tail()}")
            kept = [*path.parent.glob(f"{path.name}*"), *path.parent.glob("*.damaged")]
            is_kept = any(file.read_bytes() == content for file in kept)
            trial.expect(is_kept or damage is not flip, "the damaged file was deleted")
            check_end(trial, run, life, stage, allow_damaged=True)
        rows.append(row)
        if stage.short:
            break
    return rows


def every(stage: Stage) -> list[Row]:
    """Every checkpoint is damaged: status 2, one line, nothing is deleted."""
    row = Row("every checkpoint damaged", 1)
    draws = stage.random(21)
    with row.trial() as trial:
        run = stage.half("all_damaged")
        for number, path in enumerate(sorted((run.folder / checkpoint_files.FOLDER).glob("*.pt"))):
            (flip, cut)[number % 2](path, draws)
        before, steps = evidence.listing(run.folder), run.last_step()
        life = run.finish()
        trial.expect_status(life.statuses(), 2)
        check_one_line(trial, life, "error: ", "can be read")
        check_files_unchanged(trial, run, before)
        trial.expect(run.last_step() == steps, "metrics.jsonl was cut")
    return [row]


def best(stage: Stage) -> list[Row]:
    """best.pt is damaged: a warning, and the weights at the end are the same."""
    row = Row("best.pt damaged", 1)
    with row.trial() as trial:
        run = stage.half("best_damaged")
        path = run.folder / checkpoint_files.BEST
        flip(path, stage.random(22))
        life = run.finish()
        trial.expect("best.pt: damaged" in life.said(), f"no warning: {life.tail()}")
        check_end(trial, run, life, stage, allow_damaged=True)
    return [row]
