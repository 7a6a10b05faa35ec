"""Times local attention against what else there is, whole models against each other, and loaders.

    python tools/benchmark.py attention                              every backend and baseline, many maps
    python tools/benchmark.py attention --sides 56 --batch 8 --methods auto sliding_chunk full
    python tools/benchmark.py attention --device cuda --csv a.csv --png a.png --markdown a.md
    python tools/benchmark.py attention --check --device cuda        correct? against float64; status 1 if not
    python tools/benchmark.py model                                  training and inference of ViL, Swin, DeiT
    python tools/benchmark.py model --device cuda --compile
    python tools/benchmark.py loader --sources folder=/datasets/imagenet     images/s beside timm's loader

Methods take turns, round after round, so that noise hits all alike; medians are shown, the tables last. Exit
status 1 where a backend of ours breaks down; that one cannot do something is no failure and noted as n/a.
"""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from tools.benchmarking import attention, loader, measure, models
from tools.benchmarking.check import check
from tools.benchmarking.methods import BASELINE
from tools.benchmarking.output import Figure, check_writable, write_csv, write_png
from vil.attention.local import BACKENDS
from vil.command_line import COMMAND_LINE, ToolParser, main, write_output
from vil.config import ConfigError, Precision
from vil.training import distributed
from vil.training.precision import check_precision


def benchmark(words: Sequence[str]) -> None:
    """Measures, prints and writes what the line asks for."""
    arguments = _parser().parse_args([_underscored(word) for word in words])
    for key in ("repeats", "seconds"):
        if getattr(arguments, key) <= 0:
            raise ConfigError(COMMAND_LINE, f"--{key} must be positive, got {getattr(arguments, key)}")
    check_writable(csv=arguments.csv, png=arguments.png, markdown=arguments.markdown)
    with distributed.start(arguments.device) as process:
        device = process.device
    if arguments.what == "loader":
        of_loaders(arguments, device, header(words, device))
        return
    precision = check_precision(arguments.precision, device)
    head = header(words, device, precision)
    if arguments.what == "model":
        of_models(arguments, device, precision, head)
    elif arguments.check:
        check(arguments, device, getattr(torch, precision), head)
    else:
        of_attention(arguments, device, precision, head)


def of_attention(arguments: Namespace, device: torch.device, precision: Precision, head: str) -> None:
    """The first program."""
    memory = "peak of a step" if device.type == "cuda" else "kept for backward"
    rows, rates = attention.run(arguments, device, getattr(torch, precision))
    kernels = " Kernels alone, replayed from CUDA graphs." if arguments.cuda_graphs else ""
    head += (
        f"\n- Measured on this machine: {rates.bytes / 1e9:.0f} GB/s for a copy, "
        f"{rates.multiply_adds / 1e9:.0f} G multiply-adds/s for a product of matrices in {precision}.\n"
        f"- ×: how many times better than {BASELINE}. roofline: the least time, of bytes moved once and of "
        f"multiply-adds at these rates, as a share of the time.\n"
        "- forward: without gradients; forward+backward: with all gradients, of biases too. "
        f"{_rounds(arguments).capitalize()}; caches are not flushed in between.{kernels}\n"
        "- full: attention to all tokens, no bias; natten: another window, without bias. "
        "flex: tokens stand chunk by chunk beforehand."
    )
    found = attention.records(rows, memory)
    _write(arguments, head, attention.tables(rows, memory), found, attention.figures(rows, memory))
    broken = [row for row in rows if row.method in (*BACKENDS, "auto") and row.failed]
    if broken:
        raise SystemExit(1)


def of_models(arguments: Namespace, device: torch.device, precision: Precision, head: str) -> None:
    """The second program."""
    memory = "peak of a step" if device.type == "cuda" else "kept for backward"
    rows = models.run(arguments, device, precision)
    compiled = "with torch.compile" if arguments.compile else "without torch.compile"
    head += (
        f"\n- {arguments.image_size}² pixels, {compiled}, autocast to {precision}. training: forward, loss, "
        f"backward, AdamW; {_rounds(arguments)}.\n"
        f"- ×: how many times better than the model with +{BASELINE}. MB: 10⁶ bytes, without weights, their "
        "gradients and the optimiser's state"
        + ("." if device.type == "cuda" else "; counted without torch.compile.")
    )
    found = models.records(rows, memory, precision)
    _write(arguments, head, models.table(found, memory), found, models.figures(found, memory))


def of_loaders(arguments: Namespace, device: torch.device, head: str) -> None:
    """The third program."""
    rows = loader.run(arguments, device)
    folders = [
        root for source, _, root in (s.partition("=") for s in arguments.sources) if source == "folder"
    ]
    head += "".join(f"\n- folder: {loader.mean_size(root)} on average." for root in folders)
    head += (
        f"\n- {arguments.workers} workers, batches of {arguments.batch}, {arguments.image_size}² pixels; "
        f"{_rounds(arguments)}, of an epoch each.\n"
        "- crop: random-resized crop, flip; full: and rand-m9-mstd0.5-inc1, random erasing 0.25.\n"
        "- decoding: libjpeg-turbo alone, all pixels of the JPEGs as stored, from memory, in as many threads."
    )
    found = loader.records(rows)
    _write(arguments, head, loader.tables(found), found, loader.figures(found))
    if any(isinstance(row.seconds, measure.Missing) and row.seconds.failed for row in rows):
        raise SystemExit(1)


def _rounds(arguments: Namespace) -> str:
    return f"{'the fastest' if arguments.fastest else 'medians'} of up to {arguments.repeats} rounds"


def header(words: Sequence[str], device: torch.device, precision: Precision | None = None) -> str:
    """What the figures depend on: machine, versions, precision and command."""
    of_precision = f"; {precision}" if precision else ""
    return (
        f"- {measure.machine(device)}; {measure.versions()}{of_precision}\n"
        f"- `python tools/benchmark.py {shlex.join(words)}`"
    )


def _write(
    arguments: Namespace,
    head: str,
    tables: str,
    records: Sequence[Mapping[str, Any]],
    figures: Sequence[Figure],
) -> None:
    text = f"{head}\n\n{tables}"
    if arguments.csv:
        write_csv(arguments.csv, records)
    if arguments.png:
        write_png(arguments.png, figures, head.split("\n")[0].lstrip("- "))
    if arguments.markdown:
        write_output(Path(arguments.markdown), text + "\n", "--markdown")
    print(text)


def _parser() -> ToolParser:
    parser = ToolParser(prog="benchmark.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    programs = parser.add_subparsers(dest="what", required=True)
    for name, add_options, about in (
        ("attention", attention.add_options, "local attention: time and memory of every method, or --check"),
        ("model", models.add_options, "whole models: images per second and memory"),
        ("loader", loader.add_options, "loaders: images per second of every source and recipe"),
    ):
        program = programs.add_parser(name, help=about, description=about)
        add_options(program)
        program.add_argument("--device", default="auto", help="auto, cpu or cuda")
        if name != "loader":
            program.add_argument("--precision", choices=get_args(Precision),
                                 help="default: bfloat16 on a GPU that has it, else float32")  # fmt: skip
        program.add_argument("--repeats", type=int, default=15, help="rounds at most")
        program.add_argument("--seconds", type=float, default=10.0,
                             help="time after which a method takes no further part")  # fmt: skip
        program.add_argument("--fastest", action="store_true",
                             help="the fastest round in place of the median, for a busy machine")  # fmt: skip
        program.add_argument("--csv", metavar="FILE", help="write the figures to this file")
        program.add_argument("--png", metavar="FILE", help="draw them into this file")
        program.add_argument("--markdown", metavar="FILE", help="write what is printed to this file")
    return parser


def _underscored(word: str) -> str:
    """--two-words=x → --two_words=x."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}"


if __name__ == "__main__":
    main(benchmark)
