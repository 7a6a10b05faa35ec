"""Inject faults into training runs and check that the runs survive: kills, signals, full disks, lost ranks.

    python -m tools.dev.inject_faults                            all scenarios, 50 kills; an hour on two cores
    python -m tools.dev.inject_faults --only kill --kills 10     some of them
    python -m tools.dev.inject_faults --markdown table.md        also write the table

Each fault is injected into real processes of train.py, alone or under torchrun, that train a small model
on the bundled digits with everything that draws random numbers. The run is then continued to its end and
compared with a fault-free one: weights, their average, the optimizer's state and metrics.jsonl must be
bit-identical, fields of time aside. After each kill, all checkpoints must match their digests, and the run
must continue from the newest one. Exit status 1 if a fault was not survived; the runs are then kept. Linux.
"""

from __future__ import annotations

import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools.dev.faults.experiment import Experiment
from tools.dev.faults.job import kill_all
from tools.dev.faults.scenarios import SCENARIOS
from vil import command_line
from vil.command_line import ToolParser, bounded_int
from vil.errors import UserError
from vil.runtime.console import print_text
from vil.runtime.files import write_output


def main(argv: Sequence[str]) -> None:
    """Run the scenarios and print the table."""
    arguments = _parser().parse_args(argv)
    if not sys.platform.startswith("linux"):
        raise UserError("", "fault injection needs Linux")
    folder = Path(tempfile.mkdtemp(prefix="inject_faults_"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    experiment = Experiment(folder, arguments.seed, arguments.kills)
    try:
        for name in arguments.only or SCENARIOS:
            SCENARIOS[name](experiment)
    finally:
        kill_all()
    report = experiment.report
    print_text(f"\n{report.table()}\n")
    for name, reason in report.skipped.items():
        print_text(f"skipped {name}: {reason}")
    if arguments.markdown:
        command = shlex.join(["python", "-m", "tools.dev.inject_faults", *argv])
        write_output(arguments.markdown, f"{report.table()}\n\nFrom `{command}`.\n", "--markdown")
    if report.has_survived:
        shutil.rmtree(folder, ignore_errors=True)
        return
    print_text(f"runs and their output: {folder}")
    raise SystemExit(1)


def _parser() -> ToolParser:
    parser = ToolParser(
        prog="python -m tools.dev.inject_faults",
        description=__doc__,
        allow_abbrev=False,
        epilog=f"scenarios: {', '.join(SCENARIOS)}",
    )
    add = parser.add_argument
    kills_help = "kills of one run; a tenth of it, at least 4, with float16; default: 50"
    add("--kills", type=bounded_int(1), default=50, metavar="N", help=kills_help)
    add("--only", nargs="+", choices=list(SCENARIOS), metavar="NAME", help="these scenarios")
    add("--seed", type=bounded_int(0), default=0, metavar="N", help="seed of all random moments; default: 0")
    add("--markdown", type=Path, metavar="FILE", help="write the table to this file")
    return parser


if __name__ == "__main__":
    command_line.main(main)
