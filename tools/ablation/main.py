"""Run a grid of trainings and compare its cells: a table with confidence intervals, and a figure.

    python tools/ablate.py configs/ablations/pooling_digits.yaml
    python tools/ablate.py configs/ablations/pooling.yaml --data.root /datasets/imagenet    one run per GPU
    python tools/ablate.py GRID --jobs 4 --seeds 0 1 --schedule.epochs 20    options of train.py for all cells
    python tools/ablate.py GRID --report                                     collect results, run nothing
    python tools/ablate.py GRID --markdown docs/ablations.md                 insert the results into a page

Every run is a call of train.py with its own folder, runs/ablations/GRID/CELL/seed=N. The same command
continues an interrupted grid; finished runs are not repeated. docs/ablations.md describes the format of a
grid and how to read its results. Exit status 1 if a run failed; the other runs are completed nevertheless.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from tools.ablation import output
from tools.ablation.grid import Run, grid_name, read_grid
from tools.ablation.progress import Progress
from tools.ablation.results import CellResult, collect
from tools.ablation.run_status import check_unchanged, read_status
from tools.ablation.scheduler import Stopped, execute, visible_gpus
from vil.command_line import ToolParser, bounded_int
from vil.errors import COMMAND_LINE, UserError
from vil.runtime.console import print_line
from vil.runtime.files import refuse_input_as_output
from vil.runtime.launch import read_ranks


def main(argv: Sequence[str]) -> None:
    """Run the unfinished runs of the grids, print their tables and write their results."""
    arguments, train_options = _parser().parse_known_args(argv)
    if read_ranks().world_size > 1:
        reason = "tools/ablate.py starts the processes of its runs itself; run it without torchrun"
        raise UserError("WORLD_SIZE", reason, "environment")
    names = [grid_name(path) for path in arguments.grids]
    for name in names:
        if names.count(name) > 1:
            raise UserError(COMMAND_LINE, f"two grids are called {name}; their runs would share a folder")
    if arguments.markdown:
        refuse_input_as_output(arguments.markdown, arguments.grids, "--markdown")
        output.check_markers(arguments.markdown, names)
    grids = [
        read_grid(path, arguments.output, train_options, arguments.seeds, check_data=not arguments.report)
        for path in arguments.grids
    ]
    if not arguments.report:
        for grid in grids:
            check_unchanged(grid)
        run_unfinished([run for grid in grids for run in grid.runs()], arguments.jobs)
    command = output.reproducing_command(argv)
    has_failures = False
    for grid in grids:
        results = collect(grid)
        if arguments.report:
            check_comparable(results)
        for line in ("", *output.markdown(grid, results, command).splitlines(), ""):
            print_line(line)
        output.write_results(grid, results, command)
        print_line(f"{grid.folder}: results.md, results.csv, results.json, results.png")
        if arguments.markdown:
            output.insert_into_page(arguments.markdown, grid, results, command)
        has_failures |= any(result.failures for result in results)
    if has_failures:
        raise SystemExit(1)


def check_comparable(results: Sequence[CellResult]) -> None:
    """Raise UserError if runs had another configuration and none counts: their results would be replaced."""
    statuses = [status for result in results for status in result.statuses.values()]
    changed = [status for status in statuses if status.change is not None]
    if changed and not any(status.metrics for status in statuses):
        reason = f"was started with other options than --report has now ({changed[0].change})"
        others = f", and so were {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UserError(str(changed[0].run.folder), f"{reason}{others}; the results are left as they are")


def run_unfinished(runs: Sequence[Run], jobs: int | None) -> None:
    """Run the unfinished runs, `jobs` at a time; by default one per GPU, or one at a time without GPUs."""
    unfinished = [run for run in runs if read_status(run).metrics is None]
    gpus = visible_gpus() if any(run.cell.config.device != "cpu" for run in unfinished) else []
    jobs = jobs or max(1, len(gpus))
    print_line(f"{len(runs)} runs, {len(runs) - len(unfinished)} finished; running {jobs} at a time")
    progress = Progress(unfinished)
    try:
        execute(unfinished, jobs, gpus, progress)
    except Stopped as stopped:
        tqdm.write("stopped; run the same command again to continue")
        raise SystemExit(128 + stopped.signum) from None
    finally:
        progress.bar.close()


def _parser() -> ToolParser:
    parser = ToolParser(
        prog="ablate.py",
        description=__doc__,
        allow_abbrev=False,
        epilog="Any other option is passed to train.py and overrides the base of the grids.",
    )
    add = parser.add_argument
    add("grids", nargs="+", metavar="GRID", help="YAML file; see configs/ablations")
    folder = Path("runs/ablations")
    add("--output", type=Path, default=folder, metavar="FOLDER", help="default: runs/ablations")
    add("--jobs", type=bounded_int(1), metavar="N", help="concurrent runs (default: one per GPU, or one)")
    add("--seeds", type=bounded_int(0), nargs="+", metavar="N", help="override the seeds of the grids")
    add("--report", action="store_true", help="collect the available results, run nothing")
    page = "page of documentation with the comments <!-- begin GRID --> and <!-- end GRID -->"
    add("--markdown", type=Path, metavar="FILE", help=f"insert the results into a {page}")
    return parser
