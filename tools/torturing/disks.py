"""Disks: full for a while or for ever, files that may not grow, a folder that vanishes."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tools.torturing import evidence
from tools.torturing.lives import Life, Run
from tools.torturing.stage import Stage, check_end, check_files_unchanged, check_one_line, check_words, go_on
from tools.torturing.table import Row, Trial
from vil import checkpoint_files

FILE_SIZE = 0.5
"""Of a checkpoint's size, which is above that of everything else."""

_DISK = 90  # MB: the checkpoints of the run and some more

Undo = Callable[[], None]


def full_disk(stage: Stage) -> list[Row]:
    """A small tmpfs that a file fills up during the run, freed after the first warning, or never."""
    rows = [Row("full disk, then freed", 1)] + ([] if stage.short else [Row("full disk", 1)])
    for row, is_freed in zip(rows, (True, False)):
        place = stage.folder / "disk"
        with tmpfs(place) as is_mounted:
            if not is_mounted:
                row.note = "not tried: mounting is not allowed"
                continue
            with row.trial() as trial:
                run = _moved(stage.half("full"), place)
                suffer(trial, run, stage, lambda run, life: fill(run.folder.with_name("filler")), is_freed)
    return rows


def vanished_folder(stage: Stage) -> list[Row]:
    """The run's folder is renamed while it works, and renamed back after the first warning, or at the end."""
    rows = [Row("vanished folder, then back", 1)] + ([] if stage.short else [Row("vanished folder", 1)])
    for row, is_back in zip(rows, (True, False)):
        with row.trial() as trial:
            run = stage.half("vanished")
            suffer(trial, run, stage, lambda run, life: rename(run.folder), is_back)
    return rows


def file_size(stage: Stage) -> list[Row]:
    """RLIMIT_FSIZE below the size of a checkpoint: set during the run, and from the start."""
    row = Row("file-size limit", 1)
    with row.trial() as trial:
        suffer(trial, stage.half("file_size"), stage, lambda run, life: limit(life), False)
    if stage.short:
        return [row]
    from_start = Row("file-size limit from the start", 1)
    with from_start.trial() as trial:
        run = stage.run("file_size")
        life = run.finish("--save_every=null", file_size=_limit(stage.reference(run)))
        trial.expect_status(life.statuses(), 1)
        check_one_line(trial, life, "error: ", "File too large", "nothing was saved yet")
        trial.expect(not evidence.listing(run.folder), f"left behind: {sorted(evidence.listing(run.folder))}")
        go_on(trial, run, stage)
    return [row, from_start]


def suffer(
    trial: Trial, run: Run, stage: Stage, strike: Callable[[Run, Life], Undo], is_undone: bool
) -> None:
    """A run continues, and what it writes to is struck after a step.

    Undone after the first warning, it ends as if nothing had been; else it ends with status 1 and one line,
    the checkpoints are as they were, and later it goes on from them.
    """
    before = evidence.listing(run.folder)
    life = run.start("--tensorboard=true")
    life.until_step(1)
    undo = strike(run, life)
    try:
        warned = life.until(lambda: "the older ones stand, and training goes on" in life.said())
        trial.expect(warned, f"no warning: {life.tail()}")
        if is_undone:
            undo()
            check_end(trial, run, life, stage)
            return
        trial.expect_status(life.end(), 1)
        stands = "the last checkpoint is" if run.folder.exists() else "is gone"
    finally:
        undo()
    check_one_line(trial, life, "error: ", "cannot be written", stands)
    check_words(trial, life)
    check_files_unchanged(trial, run, before)
    go_on(trial, run, stage)


def fill(path: Path) -> Undo:
    """Fills the disk that `path` is on, to the last byte; the undoing removes it."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass
    return lambda: path.unlink(missing_ok=True)


def rename(folder: Path) -> Undo:
    """Renames a folder; the undoing does so again."""
    away = folder.with_name(folder.name + ".away")
    folder.rename(away)

    def back() -> None:
        if away.exists():
            away.rename(folder)

    return back


def limit(life: Life) -> Undo:
    """Limits the size of the files that a living process writes."""
    resource.prlimit(
        life.processes[0].pid, resource.RLIMIT_FSIZE, (_limit(life.run.folder), resource.RLIM_INFINITY)
    )
    return lambda: None


@contextmanager
def tmpfs(place: Path) -> Iterator[bool]:
    """A small file system in memory; False where this user may not mount one."""
    place.mkdir(exist_ok=True)
    mount = shutil.which("mount")
    words = ["-t", "tmpfs", "-o", f"size={_DISK}m", "tmpfs", str(place)]
    is_mounted = (
        mount is not None
        and os.geteuid() == 0
        and subprocess.run([mount, *words], capture_output=True).returncode == 0  # noqa: S603 (our own words)
    )
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run([shutil.which("umount") or "umount", "--lazy", str(place)], check=True)  # noqa: S603


def _limit(folder: Path) -> int:
    return int(FILE_SIZE * (folder / checkpoint_files.BEST).stat().st_size)


def _moved(run: Run, place: Path) -> Run:
    shutil.move(run.folder, place / "run")
    return Run(place / "run", run.words, run.logs, forked=run.forked)
