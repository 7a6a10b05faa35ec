"""Breaks training runs on purpose, and shows what became of them: a table of faults.

    python tools/torture.py                          every fault; 50 kills of a run, with 1 and with 2 ranks
    python tools/torture.py --ranks 1 --kills 20     what concerns a single process
    python tools/torture.py --only kill full-disk    some of the faults
    python tools/torture.py --short                  most of them, once, in a minute or two, as the tests do

Each fault happens to real processes of train.py, alone or under torchrun, that train a small model on the
bundled digits with everything on that draws at random. Afterwards the run is continued to its end and
compared with an undisturbed one: weights, their average, the optimiser's state and metrics.jsonl agree to the
last bit, the fields of time aside, and no step is logged twice or missing. After every kill the checkpoints
are compared with their digests, and the run must go on from the newest one.

Exit status 0 if everything was survived, 1 if not, 2 for a bad command line. Needs Linux. The full version
takes about an hour on two cores; moments are drawn from --seed.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import tempfile
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # forks are train.py, which sets this for itself
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.torturing import damage, disks, kills, ranks, stops, table
from tools.torturing.lives import kill_all
from tools.torturing.stage import Stage
from tools.torturing.table import Row
from vil.command_line import COMMAND_LINE, ToolParser, main, write_output
from vil.config import ConfigError
from vil.evaluation.report import write_json


@dataclass(frozen=True)
class Fault:
    """Something that happens to a run.

    Attributes:
        ranks: the processes that it needs.
        try_it: tries it, and returns rows of the table.
        short: whether the short version has it.
        words: what it is, for the help.
    """

    ranks: int
    try_it: Callable[[Stage], list[Row]]
    short: bool
    words: str


FAULTS = {
    "kill": Fault(1, lambda s: kills.kill(s, 1), True, "kill -9 at random moments, a fifth in a save"),
    "kill-float16": Fault(1, lambda s: kills.kill_variant(s, "float16"), False, "the same with loss scaling"),
    "kill-zip": Fault(1, lambda s: kills.kill_variant(s, "zip"), False,
                      "the same with a zip archive, two data workers and TensorBoard"),
    "dead-worker": Fault(1, kills.dead_worker, False, "kill -9 of a process that loads images"),
    "sigterm": Fault(1, lambda s: stops.end_by(s, signal.SIGTERM, False), True, "SIGTERM: status 143"),
    "sigterm-group": Fault(1, lambda s: stops.end_by(s, signal.SIGTERM, True), False, "to the whole group"),
    "sigterm-start": Fault(1, stops.end_while_starting, False, "SIGTERM while the process starts"),
    "sigint": Fault(1, lambda s: stops.end_by(s, signal.SIGINT, True), False, "Ctrl-C: status 130"),
    "sigint-twice": Fault(1, stops.interrupt_twice, True, "Ctrl-C twice: the process ends at once"),
    "sigusr1": Fault(1, lambda s: stops.save_on_demand(s, 1), True, "SIGUSR1: a checkpoint of that step"),
    "two-runs": Fault(1, stops.two_runs, False, "a second run in the folder of one that works"),
    "full-disk": Fault(1, disks.full_disk, True, "a small tmpfs, filled up; needs the right to mount"),
    "file-size": Fault(1, disks.file_size, True, "RLIMIT_FSIZE below the size of a checkpoint"),
    "vanished-folder": Fault(1, disks.vanished_folder, False, "the run's folder is renamed while it works"),
    "damaged-newest": Fault(1, damage.newest, True, "the newest checkpoint or its digest is damaged"),
    "damaged-all": Fault(1, damage.every, True, "every checkpoint is damaged: status 2"),
    "damaged-best": Fault(1, damage.best, False, "best.pt is damaged"),
    "nan-for-ever": Fault(1, ranks.nan_for_ever, True, "images that are NaN from some step on: status 1"),
    "kill-ranks": Fault(2, lambda s: kills.kill(s, 2), False, "kill -9 of torchrun and all its processes"),
    "dead-rank": Fault(2, kills.dead_rank, False, "kill -9 of one rank"),
    "restarts": Fault(2, kills.restarts, False, "kill -9 of one rank under torchrun --max-restarts"),
    "sigterm-ranks": Fault(2, stops.end_ranks, False, "SIGTERM to one rank, and to torchrun"),
    "sigusr1-ranks": Fault(2, lambda s: stops.save_on_demand(s, 2), False, "SIGUSR1 to one of two ranks"),
    "nan": Fault(2, ranks.nan_on_one_rank, True, "images that are NaN on one rank in one step"),
    "hang": Fault(2, ranks.hang, False, "a rank that sleeps in a step"),
    "other-ranks": Fault(2, ranks.other_number, False, "continued with two ranks, then with one again"),
}  # fmt: skip


def torture(words: Sequence[str]) -> None:
    """Tries the faults, and shows the table."""
    arguments = _parser().parse_args(words)
    if arguments.kills < 1:
        raise ConfigError(COMMAND_LINE, f"--kills must be at least 1, got {arguments.kills}")
    if arguments.seed < 0:
        raise ConfigError(COMMAND_LINE, f"--seed must be 0 or more, got {arguments.seed}")
    if not sys.platform.startswith("linux"):
        raise ConfigError("", "the faults need Linux and its /proc")
    for path in filter(None, (arguments.json, arguments.markdown)):
        if not path.parent.is_dir():
            raise ConfigError(COMMAND_LINE, f"{path}: no such folder: {path.parent}")
    names = [name for name in FAULTS if is_chosen(name, arguments)]
    if not names:
        raise ConfigError(COMMAND_LINE, "none of the faults needs that number of ranks")
    folder = _folder(arguments.folder)
    signal.signal(signal.SIGTERM, _end)
    rows: list[Row] = []
    stage = Stage(
        folder,
        arguments.seed,
        arguments.short,
        min(2, arguments.kills) if arguments.short else arguments.kills,
    )
    if arguments.short:
        _import_all()
    try:
        for name in names:
            rows += FAULTS[name].try_it(stage)
    finally:
        kill_all()
        if rows:
            records = [row.record() for row in rows]
            print(f"\n{table.text(records)}\n", flush=True)
            write(arguments, records, words)
    survived = all(row.survived for row in rows)
    if survived and arguments.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        print(f"runs and what they said: {folder}")
    if not survived:
        raise SystemExit(1)


def is_chosen(name: str, arguments: Namespace) -> bool:
    """Whether the command line asks for a fault: by its name, else by the ranks and the version."""
    fault = FAULTS[name]
    if arguments.only:
        return name in arguments.only
    return fault.ranks in arguments.ranks and (fault.short or not arguments.short)


def write(arguments: Namespace, records: list[dict[str, Any]], words: Sequence[str]) -> None:
    """Writes the table where it is asked for."""
    if arguments.json:
        write_json(arguments.json, records)
    if arguments.markdown:
        command = shlex.join(["python", "tools/torture.py", *words])
        write_output(arguments.markdown, table.markdown(records, command), "--markdown")


def _folder(wanted: Path | None) -> Path:
    """An empty folder for all runs, absolute."""
    if wanted is None:
        return Path(tempfile.mkdtemp(prefix="torture_"))
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        if any(wanted.iterdir()):
            raise ConfigError(COMMAND_LINE, f"--folder {wanted} is not empty")
    except OSError as error:
        raise ConfigError(COMMAND_LINE, f"--folder {wanted} cannot be written: {error.strerror}") from None
    return wanted.resolve()


def _import_all() -> None:
    """What the forks need: once, not in each of them."""
    import sklearn.datasets  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

    import train  # noqa: F401


def _end(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)


def _parser() -> ToolParser:
    parser = ToolParser(
        prog="torture.py",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="faults (ranks):\n" + "\n".join(f"  {n:16} ({f.ranks}) {f.words}" for n, f in FAULTS.items()),
    )
    parser.add_argument("--kills", type=int, default=50, metavar="N",
                        help="kills of one run, with one rank and with two; a tenth of it, 4 or more, with "
                        "float16 and with a zip archive; default: 50")  # fmt: skip
    parser.add_argument("--ranks", type=int, nargs="+", choices=(1, 2), default=[1, 2],
                        help="only faults that need one process, or two; default: both")  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=list(FAULTS), metavar="FAULT",
                        help="these faults, whatever else is said; see below")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all moments; default: 0")
    parser.add_argument("--short", action="store_true",
                        help="two kills and one trial of the others, without those that show the same "
                        "another way; the model is smaller, processes are forks of this one, which has "
                        "imported train.py, and two ranks go without torchrun")  # fmt: skip
    parser.add_argument("--folder", type=Path, metavar="FOLDER",
                        help="where the runs are, and stay; default: a temporary folder, which is removed if "
                        "everything was survived")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there, one object per row")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there, as a page")
    return parser


if __name__ == "__main__":
    main(torture)
