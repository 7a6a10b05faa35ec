"""Makes one HTML page of one or several runs: curves, costs, mistakes, and how their configurations differ.

    python tools/report.py runs/digits                               report.html
    python tools/report.py runs/avg_* runs/cls_* --output pool.html  several runs beside each other
    python tools/report.py runs/vil_small --no-predictions           without its data; a second

The page holds everything it shows and opens without a network. Runs may be in progress: it shows what they
have logged so far. The best checkpoint of each run is evaluated on the run's validation images, for accuracy
by class, confusions and the most confident mistakes; where that cannot be done, one line says why and the
rest is there.
"""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vil.command_line import ToolParser, main, out_of_memory, write_output
from vil.config import ConfigError
from vil.evaluation.report import check_writable
from vil.runtime.files import refuse_input_as_output
from vil.training import distributed


def report(words: Sequence[str]) -> None:
    """Reads the runs, evaluates them, and writes the page."""
    parser = ToolParser(prog="report.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, finished or in progress")
    parser.add_argument("--output", default="report.html", metavar="FILE", help="default: report.html")
    parser.add_argument("--title", help="heading of the page; default: the names of the runs")
    parser.add_argument("--no-predictions", action="store_true", help="do not evaluate; needs no images")
    parser.add_argument("--mistakes", type=_whole(0), default=24, metavar="N",
                        help="how many of the most confident mistakes to show (24)")  # fmt: skip
    parser.add_argument(
        "--root", metavar="FOLDER", help="the images, where they are not where the run had them"
    )
    parser.add_argument("--batch-size", type=_whole(1), default=128, metavar="N",
                        help="images per forward pass (128)")  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    arguments = parser.parse_args(words)
    output = Path(arguments.output)
    refuse_input_as_output(output, arguments.runs, "--output")
    try:
        check_writable(output)
    except ConfigError as error:
        raise ConfigError("--output", error.reason) from None
    try:
        from tools.reporting import mistakes, page
    except ImportError as error:
        if error.name is None or not error.name.startswith("plotly"):
            raise
        raise ConfigError("", "report.py needs the package plotly, as requirements.txt has it") from None
    from tools.reporting.runs import open_runs
    from vil.training.trainer import lost_worker

    runs = open_runs(arguments.runs)
    results: list[page.Result] = []
    with distributed.start(arguments.device) as process:
        for run in runs:
            mistakes.count_cost(run)
            if arguments.no_predictions:
                results.append(None)
                continue
            try:
                result: page.Result = mistakes.evaluate_run(
                    run,
                    device=process.device,
                    batch_size=arguments.batch_size,
                    most_mistakes=arguments.mistakes,
                    root=arguments.root,
                    progress=sys.stderr.isatty(),
                )
            except ConfigError as error:
                result = " ".join(str(error).split())
            except (MemoryError, RuntimeError) as error:
                reason = out_of_memory(error) or lost_worker(error)
                if reason is None:
                    raise
                result = reason
            if isinstance(result, str):
                print(f"{run.name} is not evaluated: {result}")
            results.append(result)
    names = ", ".join(run.name for run in runs[:4]) + (", …" if len(runs) > 4 else "")
    text = page.render(runs, results, arguments.title or names)
    write_output(output, text, "--output")
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    print(f"{output}: {count}, {output.stat().st_size / 1e6:.1f} MB")


def _whole(least: int) -> Callable[[str], int]:
    """Reads a whole number of the line, for argparse."""

    def read(word: str) -> int:
        if not word.isdecimal() or int(word) < least:
            raise ArgumentTypeError(f"expected a whole number from {least} on, got {word!r}")
        return int(word)

    return read


if __name__ == "__main__":
    main(report)
