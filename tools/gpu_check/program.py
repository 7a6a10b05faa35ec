"""The program `tools/check_gpu.py`."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import torch

from tools.benchmarks.options import positive
from tools.gpu_check import kernels, loading, machine, models, speed, training
from tools.gpu_check.report import Outcome, summary_table
from tools.gpu_check.runner import Options, RunningSection, Section
from vil.command_line import ToolParser, bounded_int
from vil.errors import COMMAND_LINE, UserError
from vil.runtime import console
from vil.runtime.launch import set_torch_environment

DESCRIPTION = """Check that everything of this project computes correctly on a GPU, and how fast.

    python tools/check_gpu.py                                 everything, on the first GPU, in eight minutes
    python tools/check_gpu.py --sections machine kernels      some sections
    python tools/check_gpu.py --budget 300 --cifar10 /datasets/cifar10 --images /datasets/imagenet
    python tools/check_gpu.py --device cpu                    test of the program itself, with small shapes

Every section runs in a separate process with a time limit, as a CUDA error persists until its process ends,
and writes one JSON line when it ends. A table of at most 40 lines follows. Exit status 1 if a section fails
or times out. Sections that the budget leaves no time for are skipped. Speeds below the targets of an H100 are
no failure. docs/gpu.md describes the sections.
"""

SECTIONS = {
    section.name: section
    for section in (
        Section("compile", kernels.compile_all, "compile all kernels, in the background", 150, 20),
        Section("machine", machine.run, "versions, memory, rates of copies and matrix products", 45, 8),
        Section("kernels", kernels.check_all, "kernels against float64; reproducibility", 170, 30),
        Section("speed", speed.compare, "stages 1 and 2 against other attention and the roofline", 90, 25),
        Section("training", training.run, "train.py: resume, synchronization, float16, DDP, logits", 130, 30),
        Section("models", models.run, "training images/s and memory of ViL, Swin and DeiT", 200, 45),
        Section("loading", loading.run, "loader and GPU in parallel; augmentation against Pillow", 60, 20),
        Section("tuning", speed.tune, "numbers of warps and pipeline stages of each kernel", 60, 20),
        Section("flex", speed.compare_flex, "FlexAttention, which compiles slowly", 75, 25),
        Section("cifar10", training.cifar10, "CIFAR-10 in the remaining time", 3600, 60),
    )
}
"""Sections in the order in which they run; `compile` and `machine` run in parallel."""


def check_gpu(argv: Sequence[str]) -> None:
    """Run the selected sections, and print the table; exit with status 1 if one fails or times out."""
    arguments = _parser().parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        reason = "PyTorch finds no GPU; --device cpu tests this program with small shapes"
        raise UserError(COMMAND_LINE, reason)
    for key in ("images", "cifar10"):
        folder = getattr(arguments, key)
        if folder is not None and not folder.is_dir():
            raise UserError(COMMAND_LINE, f"--{key}: {folder} is not a folder")
    try:
        output = arguments.json.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(COMMAND_LINE, f"--json: {arguments.json}: {error.strerror}") from None
    _set_environment(arguments.device)
    with output, tempfile.TemporaryDirectory(prefix="check_gpu_") as scratch:
        folder = arguments.logs or Path(scratch)
        _make_empty(folder)
        images, cifar10, seed = arguments.images, arguments.cifar10, arguments.seed
        options = Options(arguments.device, folder.resolve(), images, cifar10, seed=seed)
        outcomes = _run_sections(arguments, options, output)
    console.write(f"\n{arguments.json}: all measurements\n\n{summary_table(outcomes)}\n")
    if any(outcome.status in ("failed", "timed out") for outcome in outcomes):
        raise SystemExit(1)


def _run_sections(arguments: Namespace, options: Options, output: TextIO) -> list[Outcome]:
    """Run the sections, and write and print each outcome at once."""
    end = time.time() + arguments.budget
    names = [name for name in SECTIONS if name in (arguments.sections or SECTIONS)]
    outcomes: dict[str, Outcome] = {}
    running: dict[str, RunningSection] = {}

    def start(name: str) -> None:
        section, left = SECTIONS[name], end - time.time()
        if left < section.min_seconds:
            reason = f"needs {section.min_seconds:.0f} s, {max(0.0, left):.0f} s of the budget are left"
            record(Outcome(name, "skipped", reason=reason))
        else:
            running[name] = RunningSection(section, replace(options, deadline=end))

    def finish(name: str) -> None:
        if name in running and name not in outcomes:
            record(running[name].finish())

    def record(outcome: Outcome) -> None:
        outcomes[outcome.section] = outcome
        print(outcome.as_json(), file=output, flush=True)
        reason = f": {outcome.reason}" if outcome.reason else ""
        console.print_line(f"{outcome.section}: {outcome.status}, {outcome.seconds:.0f} s{reason}")

    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # runs the finally clause
    try:
        for name in names:
            if name not in ("compile", "machine"):
                finish("compile")
            start(name)
            if name != "compile":
                finish(name)
        finish("compile")
    finally:
        for section in running.values():
            section.stop()
        signal.signal(signal.SIGTERM, handler)
    return [outcomes[name] for name in names]


def _make_empty(folder: Path) -> None:
    """Make the folder. Raise UserError if that fails or if it is not empty: its runs would be resumed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_empty = not any(folder.iterdir())
    except OSError as error:
        raise UserError(COMMAND_LINE, f"--logs: {folder}: {error.strerror}") from None
    if not is_empty:
        raise UserError(COMMAND_LINE, f"--logs: {folder} is not empty")


def _set_environment(device: str) -> None:
    """Set variables that must be set before the processes of sections import PyTorch and Triton."""
    root = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic algorithms
    set_torch_environment()  # like train.py
    if device == "cpu":
        os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    else:
        os.environ.pop("TRITON_INTERPRET", None)


def _parser() -> ToolParser:
    sections = "\n".join(f"  {section.name:10} {section.description}" for section in SECTIONS.values())
    parser = ToolParser(prog="check_gpu.py", description=f"{DESCRIPTION}\nsections:\n{sections}")
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--sections", nargs="+", choices=SECTIONS, metavar="SECTION", help="run only these")
    add("--budget", type=positive, default=480.0, metavar="SECONDS", help="default: 480")
    images_help = "train/<class>/<image> for the loader; default: synthetic images"
    add("--images", type=Path, metavar="DIR", help=images_help)
    add("--cifar10", type=Path, metavar="DIR", help="train/<class> and test/<class>, or cifar-10-batches-py")
    json_help = "one line per section; default: check_gpu.jsonl"
    add("--json", type=Path, default=Path("check_gpu.jsonl"), metavar="FILE", help=json_help)
    add("--seed", type=bounded_int(0), default=0, help="of the random inputs of the section kernels")
    add("--logs", type=Path, metavar="DIR", help="keep output and files of the sections in this folder")
    return parser
