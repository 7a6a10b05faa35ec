"""Write one HTML page about one or several runs: curves, costs, mistakes and differences of configurations.

    python tools/report.py runs/digits                               report.html
    python tools/report.py runs/avg_* runs/cls_* --output pool.html  several runs side by side
    python tools/report.py runs/vil_small --no-predictions           without the data set; a second

The page is self-contained and opens without a network. Runs may be in progress. The best checkpoint of each
run is evaluated on the run's validation images for accuracy by class, confusions and the most confident
mistakes; if that fails, one line gives the reason and the rest of the page is complete.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from data import refuse_images_as_outputs
from tools.report_page.evaluation import Evaluation, count_cost, evaluate_run
from tools.report_page.page import render
from tools.report_page.runs import Run, open_runs
from vil.command_line import ToolParser, bounded_int, out_of_memory
from vil.errors import UserError, one_line
from vil.runtime import distributed
from vil.runtime.console import print_line
from vil.runtime.distributed import Process
from vil.runtime.files import check_writable, is_standard_output, refuse_input_as_output, write_output
from vil.training.trainer import lost_worker_reason


def main(argv: Sequence[str]) -> None:
    """Read the runs, evaluate them and write the page."""
    parser = ToolParser(prog="report.py", description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a run, finished or in progress")
    add("--output", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html")
    add("--title", help="heading of the page (default: the names of the runs)")
    add("--no-predictions", action="store_true", help="do not evaluate; needs no images")
    add("--mistakes", type=bounded_int(0), default=24, metavar="N", help="mistakes to show (default: 24)")
    add("--root", metavar="FOLDER", help="data folder, if it has moved since the training")
    add("--batch-size", type=bounded_int(1), default=128, metavar="N", help="default: 128")
    add("--device", default="auto", help="auto, cpu or cuda")
    arguments = parser.parse_args(argv)
    output = arguments.output
    refuse_input_as_output(output, arguments.runs, "--output")
    check_writable(output, "--output")
    runs = open_runs(arguments.runs)
    roots = [arguments.root, *(run.option("data", "root") for run in runs)]
    refuse_images_as_outputs({"--output": output}, [root for root in roots if isinstance(root, str)])
    results: list[Evaluation | str | None] = []
    with distributed.start(arguments.device) as process:
        for run in runs:
            count_cost(run)
            results.append(None if arguments.no_predictions else _evaluate(run, arguments, process))
    names = ", ".join(run.name for run in runs[:4]) + (", …" if len(runs) > 4 else "")
    write_output(output, render(runs, results, arguments.title or names), "--output")
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    line = f"{output}: {count}, {output.stat().st_size / 1e6:.1f} MB"
    print_line(line, sys.stderr if is_standard_output(output) else None)


def _evaluate(run: Run, arguments: Namespace, process: Process) -> Evaluation | str:
    """Evaluate a run; print and return the reason if that fails."""
    try:
        return evaluate_run(run, process, arguments.batch_size, arguments.mistakes, arguments.root)
    except UserError as error:
        reason = one_line(error)
    except (MemoryError, RuntimeError) as error:
        known_reason = out_of_memory(error) or lost_worker_reason(error)
        if known_reason is None:
            raise
        reason = known_reason
    print_line(f"{run.name} is not evaluated: {reason}")
    return reason
