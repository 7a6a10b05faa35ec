"""Sections `training` and `cifar10`: train.py itself, on this device."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vil
from tools.gpu_check.report import NotApplicableError, Report
from tools.gpu_check.runner import Options
from vil import checkpoint_files

ROOT = Path(__file__).resolve().parents[2]
FORK = get_context("fork")
PLANTED, QUIET = 12, range(5, 16)
"""The step whose gradient is made infinite, and those in which the host may not wait; counted from 1."""


def run(options: Options, report: Report) -> None:
    """Run train.py on the bundled digits in several ways, then DDP and logits in this process."""
    import train  # noqa: F401 (once, before processes are forked)

    parts: list[tuple[str, Callable[[Options, Report], None]]] = [
        ("resumed run equal to the bit", _check_resume),
        ("float16 with a planted infinity", _check_infinity),
    ]
    if options.device == "cuda":
        parts.append(("no wait of the host", _check_waits))
    # Forks, side by side: CUDA is not in use yet, and starting Python anew would take longer than the steps.
    forked = [
        FORK.Process(target=_report_error, args=(report, name, partial(part, options, report)))
        for name, part in parts
    ]
    for process in forked:
        process.start()
    for (name, _), process in zip(parts, forked):
        process.join()
        if process.exitcode:
            report.expect(name, False, f"exit status {process.exitcode}")
    _report_error(report, "DDP, a group of one", partial(_check_group_of_one, options, report))
    if options.device == "cuda":
        _report_error(report, "logits, GPU against CPU", partial(_compare_logits, options, report))


def _report_error(report: Report, name: str, part: Callable[[], None]) -> None:
    """Run a part; where it raises, this part fails and not those after it."""
    try:
        part()
    except Exception as error:
        traceback.print_exc()
        report.expect(name, False, f"{type(error).__name__}: {error}")


def _check_resume(options: Options, report: Report) -> None:
    steps = 4 if options.small else 50
    words = ("--config", _drawing(options))
    whole = _train(options, "whole", steps, *words)
    losses = [row["loss"] for row in _steps(whole)]
    fell = all(map(math.isfinite, losses)) and (options.small or losses[-1] < losses[0])
    report.expect(f"{steps} steps", fell, f"loss {losses[0]:.3f} → {losses[-1]:.3f}")
    half = _train(options, "resumed", steps // 2, *words)
    _train(options, "resumed", steps, *words)
    unequal = _differences(whole, half)
    note = ", ".join(unequal[:3]) if unequal else f"{steps // 2} + {steps - steps // 2} steps"
    report.expect("resumed run equal to the bit", not unequal, note)


def _check_infinity(options: Options, report: Report) -> None:
    steps = 5 if options.small else 20
    planted = min(PLANTED, steps - 1)
    rows = _steps(_train(options, "planted", steps, "--precision", "float16", wrap="planted"))
    at = next(row for row in rows if row["step"] == planted)
    is_right = at["skipped_steps"] == 1 and math.isfinite(rows[-1]["loss"])
    fate = "skipped" if at["skipped_steps"] else "taken"
    note = f"step {planted} {fate}, loss {rows[-1]['loss']:.3f} at the end"
    report.expect("float16 with a planted infinity", is_right, note)


def _check_waits(options: Options, report: Report) -> None:
    _train(options, "quiet", 20, wrap="quiet")  # PyTorch raises where the host waits
    report.expect("no wait of the host", True, f"steps {QUIET.start} to {QUIET.stop - 1}, waits are errors")


def _drawing(options: Options) -> str:
    """A configuration in which everything that draws at random does."""
    path = options.folder / "drawing.yaml"
    path.write_text(
        "model: {neighbors: random, drop_path: 0.2, dropout: 0.1}\n"
        "schedule: {ema_decay: 0.9, clip_grad: 1.0, "
        "augment: {mixup: 0.8, cutmix: 1.0, random_erasing: 0.25}}\n",
        encoding="utf-8",
    )
    return str(path)


def _train(options: Options, name: str, steps: int, *words: str, wrap: str = "") -> Path:
    """Run train.py for so many steps in the folder `name`, in a fork; return the folder.

    Raises:
        RuntimeError: it did not end with status 0; the text is its last line.
    """
    folder, log = options.folder / name, options.folder / f"train_{name}.log"
    batch = ["--schedule.batch_size", "8", "--data.images_per_class", "8"] if options.small else []
    argv = [
        "--output", str(folder), "--device", options.device, "--schedule.max_steps", str(steps),
        "--data.workers", "0", "--log_every", "1", "--tensorboard", "false", "--progress", "false",
        *batch, *words,
    ]  # fmt: skip
    process = FORK.Process(target=_run_train, args=(argv, wrap, log))
    process.start()
    process.join()
    if process.exitcode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1] if lines else "no output"
        raise RuntimeError(f"train.py, {name}: status {process.exitcode}: {last}")
    return folder


def _run_train(argv: Sequence[str], wrap: str, log: Path) -> None:
    """The process of one run of train.py; its output is appended to `log`."""
    import train
    from vil.command_line import main

    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if wrap:
        wrap_trainer(wrap)
    sys.argv = ["train.py", *argv]
    main(train.main)


def _steps(folder: Path) -> list[dict[str, Any]]:
    """Return the logged records of the steps."""
    return [row for row in _metrics(folder) if row["kind"] == "train"]


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _differences(first: Path, second: Path) -> list[str]:
    """Names of weights, averages and optimiser states that differ between two runs' last checkpoints."""
    states = []
    for folder in (first, second):
        path = checkpoint_files.step_files(folder)[0][1]
        states.append(torch.load(path, map_location="cpu", weights_only=True))
    found: list[str] = []

    def compare(name: str, a: Any, b: Any) -> None:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in a.keys() | b.keys():
                compare(f"{name}.{key}", a.get(key), b.get(key))
        elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            if not torch.equal(a, b):
                found.append(name)
        elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
            for number, (x, y) in enumerate(zip(a, b)):
                compare(f"{name}[{number}]", x, y)
        elif a != b:
            found.append(name)

    for key in ("model", "ema", "optimizer", "scaler", "step"):
        compare(key, states[0][key], states[1][key])
    return found


def wrap_trainer(kind: str) -> None:
    """Change the trainer of this process.

    Args:
        kind: `quiet`: CUDA calls for which the host waits are errors in the steps `QUIET`, each of which then
            is one that is not logged; `planted`: the gradient of step `PLANTED` (4 where there are few) is
            infinite.
    """
    from vil.training.trainer import _Trainer

    train_step: Callable[..., Any] = _Trainer.train_step
    accumulate: Callable[..., Any] = _Trainer.accumulate

    def quiet_step(self: Any, *arguments: Any) -> Any:
        quiet = self.step + 1 in QUIET
        self.config.log_every = 10**6 if quiet else 1
        torch.cuda.set_sync_debug_mode("error" if quiet else "default")
        try:
            return train_step(self, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def planting(self: Any, *arguments: Any) -> Any:
        loss = accumulate(self, *arguments)
        if self.step + 1 == min(PLANTED, self.last_step - 1):
            parameter = next(p for p in self.model.parameters() if p.grad is not None)
            parameter.grad.view(-1)[:1] = float("inf")
        return loss

    if kind == "quiet":
        _Trainer.train_step = quiet_step  # type: ignore[method-assign, assignment]
    else:
        _Trainer.accumulate = planting  # type: ignore[method-assign, assignment]


def _check_group_of_one(options: Options, report: Report) -> None:
    """Gradients through DDP in a process group of one are those of the model alone."""
    import torch.distributed as dist

    from vil.training.distributed import Process, data_parallel

    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    backend = "nccl" if options.device == "cuda" else "gloo"
    size = 32
    torch.manual_seed(0)
    images = torch.randn(4, 3, size, size, device=device)

    def gradients(parallel: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model: nn.Module = vil.create_model("vil_tiny", image_size=size, num_classes=10).to(device)
        process = Process(0, 0, 1, device)
        network = data_parallel(model, process, (3, size, size)) if parallel else model
        network(images).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        found, expected = gradients(True), gradients(False)
    finally:
        dist.destroy_process_group()
    error = max(((a - b).norm() / b.norm().clamp(min=1e-12)).item() for a, b in zip(found, expected))
    report.check(f"DDP with {backend}, a group of one", error, 1e-4)


def _compare_logits(_: Options, report: Report) -> None:
    """Logits of the same weights on the CPU and on the GPU, in float32."""
    from vil.training.precision import check_precision

    device = torch.device("cuda")
    check_precision("float32", device)
    torch.manual_seed(0)
    model = vil.create_model("vil_tiny").eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = model(images)
        found = model.to(device)(images.to(device)).cpu()
    error = ((found - expected).norm() / expected.norm()).item()
    tf32 = torch.backends.cudnn.allow_tf32
    report.check("logits, GPU against CPU, float32", error, 1e-4, note=f"convolutions in TF32: {tf32}")


def cifar10(options: Options, report: Report) -> None:
    """Train on CIFAR-10 for as many epochs as there is time; report the best Top-1."""
    root = options.cifar10
    if root is None:
        raise NotApplicableError("name the folder of CIFAR-10 with --cifar10")
    source = "torch/cifar10" if (root / "cifar-10-batches-py").exists() else "folder"
    folder = options.folder / "cifar10"
    seconds = options.seconds_left() - 15
    command = [
        sys.executable, str(ROOT / "train.py"), "--schedule", str(ROOT / "configs/schedules/cifar10.yaml"),
        "--data", str(ROOT / "configs/data/cifar10.yaml"), "--data.source", source, "--data.root", str(root),
        "--output", str(folder), "--device", options.device, "--schedule.epochs", str(_epochs(seconds)),
        "--schedule.warmup_epochs", "1", "--data.workers", str(max(1, (os.cpu_count() or 1) - 2)),
        "--tensorboard", "false", "--progress", "false",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT)  # noqa: S603
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # saves, and ends
        process.wait(10)
    found = [row for row in _metrics(folder) if row["kind"] == "validation"]
    best = max((max(row["top1"], row.get("ema_top1", 0.0)) for row in found), default=0.0)
    report.add(
        "CIFAR-10, best Top-1", best, "%", note=f"after {len(found)} epochs", target="93 after 100 epochs"
    )
    report.expect("better than guessing", best > 20, shown=False)


def _epochs(seconds: float) -> int:
    """Epochs that fit, at eight seconds each, the time to start left out."""
    return int(min(100, max(2, (seconds - 20) / 8)))
