"""The program `tools/benchmark.py`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from tools.benchmarks import attention, loader, models
from tools.benchmarks.options import positive
from tools.benchmarks.output import write_csv
from tools.benchmarks.timing import describe_machine
from vil.command_line import ToolParser, bounded_int
from vil.config import Precision
from vil.runtime import console, distributed
from vil.runtime.files import check_outputs, check_writable, write_output
from vil.runtime.precision import choose_precision

DESCRIPTION = """Time local attention, whole models, and data loaders.

    python tools/benchmark.py attention                              every backend and baseline, many maps
    python tools/benchmark.py attention --sides 56 --batch-size 8 --methods auto sliding_chunk full
    python tools/benchmark.py attention --device cuda --csv a.csv --markdown a.md
    python tools/benchmark.py attention --check --device cuda        compare with float64; status 1 if wrong
    python tools/benchmark.py model                                  training and inference of ViL, Swin, DeiT
    python tools/benchmark.py model --device cuda --compile
    python tools/benchmark.py loader --sources folder=/datasets/imagenet     images/s, compared with timm

Methods take turns in every round, so that noise affects all alike; medians are reported. Exit status 1 if a
backend of this project breaks down; a case that a method does not support is reported as n/a.
"""

BENCHMARKS = {
    "attention": (attention, "time and memory of every local attention, or --check of their results"),
    "model": (models, "images per second and memory of whole models"),
    "loader": (loader, "images per second of every data source and recipe"),
}


def benchmark(argv: Sequence[str]) -> None:
    """Run a benchmark, and print and write its results.

    Exit with status 1 if a backend breaks down or `--check` finds a wrong result.
    """
    arguments = parser().parse_args(argv)
    outputs = {"--csv": arguments.csv, "--markdown": arguments.markdown}
    check_outputs(outputs, ())
    for option, path in outputs.items():
        if path is not None:
            check_writable(Path(path), option)
    with distributed.start(arguments.device) as process:
        device = process.device
    is_loader = arguments.command == "loader"
    precision: Precision = "float32" if is_loader else choose_precision(arguments.precision, device)
    machine = describe_machine(device) + ("" if is_loader else f"; {precision}")
    results = BENCHMARKS[arguments.command][0].run(arguments, device, precision)
    text = f"- {machine}\n- `python tools/benchmark.py {shlex.join(argv)}`\n{results}"
    if arguments.csv:
        write_csv(arguments.csv, results)
    if arguments.markdown:
        write_output(Path(arguments.markdown), text + "\n", "--markdown")
    console.write(text + "\n")
    if results.has_failed:
        raise SystemExit(1)


def parser() -> ToolParser:
    """Return the parser of the command line."""
    root = ToolParser(prog="benchmark.py", description=DESCRIPTION)
    commands = root.add_subparsers(dest="command", required=True)
    for name, (module, description) in BENCHMARKS.items():
        command = commands.add_parser(name, help=description, description=description)
        module.add_options(command)
        add = command.add_argument
        add("--device", default="auto", help="auto, cpu or cuda")
        if name != "loader":
            precision_help = "default: bfloat16 on a GPU that supports it, else float32"
            add("--precision", choices=get_args(Precision), help=precision_help)
        add("--repeats", type=bounded_int(1), default=15, help="maximal number of rounds")
        add("--seconds", type=positive, default=10.0, help="maximal time of each method")
        add("--csv", metavar="FILE", help="write the figures to this file")
        add("--markdown", metavar="FILE", help="write the printed text to this file")
    return root
