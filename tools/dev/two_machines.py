"""Start jobs on two machines that differ or cannot connect, and check how they end.

    python -m tools.dev.two_machines                              all scenarios; ten minutes on two cores
    python -m tools.dev.two_machines --only slurm cut-network     some of them
    python -m tools.dev.two_machines --markdown table.md          also write the table

The machines are namespaces of this system, with their own network, host name, processes and /etc/hosts, and
a veth pair between them; the second one may see other files. Each scenario starts torchrun on both, with one
rank each on the CPU. The namespaces end with this program, also if it is killed. Exit status 1 if a scenario
does not end as expected; the output is then kept. Needs Linux and root.
"""

from __future__ import annotations

import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools.dev.machines.scenarios import SCENARIOS, ScenarioRunner
from tools.markdown_table import markdown_table
from vil import command_line
from vil.command_line import ToolParser, bounded_int
from vil.runtime.console import print_text
from vil.runtime.files import write_output

ROOT = Path(__file__).resolve().parents[2]


def main(argv: Sequence[str]) -> None:
    """Run the scenarios and print the table."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = Path(tempfile.mkdtemp(prefix="two_machines_"))
    has_failed = True
    outcomes = []
    try:
        runner = ScenarioRunner(folder, arguments.repository.resolve(), arguments.timeout)
        for name in arguments.only or SCENARIOS:
            outcomes.append(runner.run(name))
            print_text(markdown_table([outcomes[-1].row()]).splitlines()[-1])
        has_failed = any(outcome.problems for outcome in outcomes)
    finally:
        if outcomes and has_failed:
            print_text(f"output: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    table = markdown_table([outcome.row() for outcome in outcomes])
    print_text(f"\n{table}\n")
    if arguments.markdown:
        command = shlex.join(["python", "-m", "tools.dev.two_machines", *argv])
        write_output(arguments.markdown, f"{table}\n\nFrom `{command}`.\n", "--markdown")
    if has_failed:
        raise SystemExit(1)


def _parser() -> ToolParser:
    parser = ToolParser(
        prog="python -m tools.dev.two_machines",
        description=__doc__,
        allow_abbrev=False,
        epilog=f"scenarios: {', '.join(SCENARIOS)}",
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=list(SCENARIOS), metavar="NAME", help="these scenarios")
    add("--timeout", type=bounded_int(1), default=120, metavar="S", help="seconds per scenario; default: 120")
    add("--repository", type=Path, default=ROOT, metavar="FOLDER", help="checkout whose programs are run")
    add("--markdown", type=Path, metavar="FILE", help="write the table to this file")
    return parser


if __name__ == "__main__":
    command_line.main(main)
