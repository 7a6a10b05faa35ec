"""Is the GPU fine, and is this project fast on it?

    python tools/check_gpu.py                                 everything, on the first GPU, in eight minutes
    python tools/check_gpu.py --sections machine kernels      some of it
    python tools/check_gpu.py --budget 300 --cifar10 /datasets/cifar10 --images /datasets/imagenet
    python tools/check_gpu.py --device cpu                    small shapes: does the check itself work?

Every section runs in a process of its own with a time limit, as a CUDA error lasts as long as its process,
and writes one JSON line when it ends. A table of at most 40 lines comes last. Exit status 1 if a section
fails or runs out of its time, 0 else; sections for which the budget has no time left are named as skipped.
Speeds that miss a target of an H100 are no failure. docs/gpu.md says what each section means.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import tempfile
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from tools.gpu_check.report import Outcome, table
from tools.gpu_check.runner import Options, RunningSection
from vil.command_line import COMMAND_LINE, ToolParser, main
from vil.config import ConfigError

DETACHED = "compile"
"""The section that runs in the background, beside the others, until kernels are needed."""


def check(words: Sequence[str]) -> None:
    """Run the sections that the line asks for, and print the table."""
    arguments = _parser().parse_args(words)
    if arguments.budget <= 0:
        raise ConfigError(COMMAND_LINE, f"--budget must be positive, got {arguments.budget:g}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            COMMAND_LINE, "PyTorch finds no GPU; --device cpu tries this program on small shapes"
        )
    for key in ("images", "cifar10"):
        folder = getattr(arguments, key)
        if folder is not None and not folder.is_dir():
            raise ConfigError(COMMAND_LINE, f"--{key}: {folder} is no folder")
    try:
        output = arguments.json.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(COMMAND_LINE, f"--json: {arguments.json}: {error.strerror}") from None
    _prepare_environment(arguments.device)
    with output, tempfile.TemporaryDirectory(prefix="check_gpu_") as scratch:
        folder = arguments.logs or Path(scratch)
        _make_empty(folder)
        options = Options(arguments.device, folder.resolve(), arguments.images, arguments.cifar10)
        outcomes = _run_all(arguments, options, output)
    print(f"\n{arguments.json}: every measurement\n\n{table(outcomes)}")
    if any(outcome.status in ("failed", "timed out") for outcome in outcomes):
        raise SystemExit(1)


def _run_all(arguments: Namespace, options: Options, output: object) -> list[Outcome]:
    """The outcomes in the order of the sections; each is written and printed as it comes."""
    from tools.gpu_check.sections import SECTIONS

    ends = time.time() + arguments.budget
    outcomes: dict[str, Outcome] = {}
    running: list[RunningSection] = []

    def start(name: str) -> RunningSection | None:
        section, left = SECTIONS[name], ends - time.time()
        if left < section.least:
            reason = f"needs {section.least:.0f} s, {max(0.0, left):.0f} s of the budget are left"
            finish(Outcome(name, "skipped", reason=reason))
            return None
        deadline = time.time() + min(section.limit, left)
        running.append(RunningSection(section, dataclasses.replace(options, deadline=deadline)))
        return running[-1]

    def finish(outcome: Outcome) -> None:
        outcomes[outcome.section] = outcome
        output.write(outcome.as_json() + "\n")  # type: ignore[attr-defined]
        output.flush()  # type: ignore[attr-defined]
        reason = f": {outcome.reason}" if outcome.reason else ""
        print(f"{outcome.section}: {outcome.status}, {outcome.seconds:.0f} s{reason}", flush=True)

    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not before sections are ended
    names = [name for name in SECTIONS if not arguments.sections or name in arguments.sections]
    try:
        background = start(DETACHED) if DETACHED in names else None
        for name in (name for name in names if name != DETACHED):
            if background is not None and name != "machine":
                finish(background.finish())
                background = None
            section = start(name)
            if section is not None:
                finish(section.finish())
        if background is not None:
            finish(background.finish())
    finally:
        for section in running:
            section.stop()
        signal.signal(signal.SIGTERM, before)
    return [outcomes[name] for name in names]


def _make_empty(folder: Path) -> None:
    """Make the folder. Raises ConfigError where it cannot be, or holds anything: runs would be continued."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_empty = not any(folder.iterdir())
    except OSError as error:
        raise ConfigError(COMMAND_LINE, f"--logs: {folder}: {error.strerror}") from None
    if not is_empty:
        raise ConfigError(COMMAND_LINE, f"--logs: {folder} is not empty")


def _prepare_environment(device: str) -> None:
    """Set what processes of sections need before they import PyTorch and Triton."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (sys.path[0], os.environ.get("PYTHONPATH"))))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms, where asked for
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train.py sets it
    if device == "cpu":
        os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    else:
        os.environ.pop("TRITON_INTERPRET", None)


def _parser() -> ToolParser:
    from tools.gpu_check.sections import SECTIONS

    lines = "\n".join(f"  {section.name:10} {section.about}" for section in SECTIONS.values())
    parser = ToolParser(
        prog="check_gpu.py", description=f"{__doc__}\nsections:\n{lines}",
        formatter_class=RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, metavar="SECTION", help="these alone")
    parser.add_argument("--budget", type=float, default=480.0, metavar="SECONDS", help="default: 480")
    parser.add_argument("--images", type=Path, metavar="DIR",
                        help="train/<class>/<image> for the loader; default: synthetic ones")  # fmt: skip
    parser.add_argument("--cifar10", type=Path, metavar="DIR",
                        help="train/<class> and test/<class>, or cifar-10-batches-py")  # fmt: skip
    parser.add_argument("--json", type=Path, default=Path("check_gpu.jsonl"), metavar="FILE",
                        help="a line for each section; default: check_gpu.jsonl")  # fmt: skip
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep the sections' output and files here")
    return parser


if __name__ == "__main__":
    main(check)
