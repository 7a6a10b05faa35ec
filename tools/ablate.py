"""Runs a grid of trainings and compares its cells: a table with uncertainties, and a figure.

    python tools/ablate.py configs/ablations/pooling_digits.yaml
    python tools/ablate.py configs/ablations/pooling.yaml --data.root /datasets/imagenet    one run per GPU
    python tools/ablate.py GRID --jobs 4 --seeds 0 1 --schedule.epochs 20    options of train.py for all cells
    python tools/ablate.py GRID --report                                     collects, and runs nothing
    python tools/ablate.py GRID --markdown docs/ablations.md                 results into a page, too

Every run is a call of train.py in a folder of its own, runs/ablations/GRID/CELL/seed=N. Called again, a grid
goes on where it was stopped; what is finished is not repeated. docs/ablations.md describes how a grid is
written and how to read its results. Exit status 1 if a run failed; the others are done all the same.
"""

from __future__ import annotations

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.ablating.grid import Run, grid_name, read_grid
from tools.ablating.pages import check_page, command_of, insert, text_of, write_results
from tools.ablating.processes import Stopped, execute, visible_gpus
from tools.ablating.progress import Progress
from tools.ablating.results import collect
from tools.ablating.runs import check_unchanged, outcome_of
from vil.command_line import COMMAND_LINE, ToolParser, main
from vil.config import ConfigError
from vil.console import say


def ablate(words: Sequence[str]) -> None:
    """Runs what is not finished, and shows and writes what was found."""
    arguments, options = _parser().parse_known_args(words)
    if arguments.jobs is not None and arguments.jobs < 1:
        raise ConfigError(COMMAND_LINE, f"--jobs must be at least 1, got {arguments.jobs}")
    names = [grid_name(path) for path in arguments.grids]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(COMMAND_LINE, f"two grids are called {name}; their runs would share a folder")
    if arguments.markdown:
        check_page(arguments.markdown, names)
    grids = [
        read_grid(path, arguments.output, options, arguments.seeds, needs_images=not arguments.report)
        for path in arguments.grids
    ]
    if not arguments.report:
        for grid in grids:
            check_unchanged(grid)
        run_all([run for grid in grids for run in grid.runs()], arguments.jobs)
    failed = False
    for grid in grids:
        rows, command = collect(grid), command_of(words)
        for line in ("", *text_of(grid, rows, command).splitlines(), ""):
            say(line)
        write_results(grid, rows, command)
        print(f"{grid.folder}: results.md, results.csv, results.json, results.png")
        if arguments.markdown:
            insert(arguments.markdown, grid, rows, command)
        failed |= any(outcome.failure for row in rows for outcome in row.outcomes.values())
    if failed:
        raise SystemExit(1)


def run_all(runs: Sequence[Run], jobs: int | None) -> None:
    """Runs what is not finished; where `jobs` is not given, one per GPU, or without GPUs one at a time."""
    missing = [run for run in runs if outcome_of(run).found is None]
    gpus = visible_gpus() if any(run.cell.config.device != "cpu" for run in missing) else []
    jobs = jobs or max(1, len(gpus))
    print(f"{len(runs)} runs, {len(runs) - len(missing)} of them finished; {jobs} at once")
    progress = Progress(missing)
    try:
        execute(missing, jobs, gpus, progress)
    except Stopped as stopped:
        progress.say("stopped; the same command goes on from here")
        raise SystemExit(128 + stopped.number) from None
    finally:
        progress.close()


def _parser() -> ToolParser:
    parser = ToolParser(
        prog="ablate.py",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Any other option is one of train.py and goes over the base of the grids.",
    )
    parser.add_argument("grids", nargs="+", metavar="GRID", help="YAML file; see configs/ablations")
    parser.add_argument("--output", type=Path, default=Path("runs/ablations"), metavar="FOLDER",
                        help="where each grid has its folder; default: runs/ablations")  # fmt: skip
    parser.add_argument("--jobs", type=int, metavar="N",
                        help="runs at once; default: one per GPU, one without")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="in the place of the grid's")
    parser.add_argument("--report", action="store_true", help="collect what there is, run nothing")
    parser.add_argument("--markdown", type=Path, metavar="FILE",
                        help="write the results into this page too, between its comments <!-- begin GRID --> "
                        "and <!-- end GRID -->, and the figure into figures/ beside it")  # fmt: skip
    return parser


if __name__ == "__main__":
    main(ablate)
