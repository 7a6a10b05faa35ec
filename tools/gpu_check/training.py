"""Sections `training` and `cifar10`: train.py on this device."""

from __future__ import annotations

import itertools
import math
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import data  # noqa: F401 (imported before the forks)
import vil
from tools.benchmarks.accuracy import MIN_GRADIENT_NORM, relative_error
from tools.benchmarks.timing import Missing, try_measure
from tools.dev.faults.checks import checkpoint_files, compare_checkpoints, read_metrics
from tools.gpu_check.report import NotApplicableError, Report
from tools.gpu_check.runner import Options, last_line, redirect_output
from vil.training import trainer  # noqa: F401 (imported before the forks)

ROOT = Path(__file__).resolve().parents[2]
FORK = get_context("fork")
INFINITE_STEP = 12
"""Step whose gradient is made infinite, at latest the last but one."""
SYNC_FREE_STEPS = range(5, 16)
"""Steps in which the host must not wait for the GPU; no logs are written in them."""
MAX_ERROR = 1e-4
"""Relative error of gradients and logits."""
RANDOM_OPTIONS = """
model: {neighbors: random, drop_path: 0.2, dropout: 0.1}
schedule:
  ema_decay: 0.9
  clip_grad: 1.0
  augment: {mixup: 0.8, cutmix: 1.0, random_erasing: 0.25}
"""
"""Configuration with all sources of randomness."""


def run(options: Options, report: Report) -> None:
    """Train on the bundled digits in several ways; then check DDP and logits in this process."""
    path = options.folder / "random_options.yaml"
    path.write_text(RANDOM_OPTIONS, encoding="utf-8")
    steps, short = (4, 5) if options.is_small else (50, 20)
    infinite_step = min(INFINITE_STEP, short - 1)
    # Forks in parallel: CUDA is not initialized yet, and importing PyTorch again would outlast the steps.
    random_options = ("--config", str(path))
    exact = (*random_options, "--deterministic")  # without it, no two runs on a GPU are bit-identical
    full = TrainRun(options, "full", steps, *exact)
    half = TrainRun(options, "resumed", steps // 2, *exact)
    make_infinite = partial(make_gradient_infinite, infinite_step)
    infinite = TrainRun(options, "infinite", short, "--precision", "float16", patch=make_infinite)

    def check_loss() -> tuple[bool, str]:
        losses = [row["loss"] for row in full.finish()]
        is_lower = all(map(math.isfinite, losses)) and (options.is_small or losses[-1] < losses[0])
        return is_lower, f"loss {losses[0]:.3f} → {losses[-1]:.3f}"

    def check_resume() -> tuple[bool, str]:
        half.finish()
        TrainRun(options, "resumed", steps, *exact).finish()
        files = (checkpoint_files(folder, "step_*.pt")[-1] for folder in (half.folder, full.folder))
        names = compare_checkpoints(*files)
        return not names, ", ".join(names[:3]) or f"{steps // 2} + {steps - steps // 2} steps"

    def check_infinite_gradient() -> tuple[bool, str]:
        rows = infinite.finish()
        skipped = next(row["skipped_steps"] for row in rows if row["step"] == infinite_step)
        loss = rows[-1]["loss"]
        note = f"{skipped} skipped until step {infinite_step}, final loss {loss:.3f}"
        return skipped == 1 and math.isfinite(loss), note

    def check_synchronization() -> tuple[bool, str]:
        synchronizing.finish()  # PyTorch raises an error if the host waits
        return True, f"steps {SYNC_FREE_STEPS.start} to {SYNC_FREE_STEPS.stop - 1}"

    checks: dict[str, Callable[[], tuple[bool, str] | float]] = {
        f"{steps} steps": check_loss,
        "resumed run is bit-identical": check_resume,
        "infinite float16 gradient is skipped": check_infinite_gradient,
    }
    if options.device == "cuda":
        unlogged = (*random_options, "--log_every", "1000")
        synchronizing = TrainRun(options, "synchronizing", short, *unlogged, patch=forbid_synchronization)
        checks["no host synchronization"] = check_synchronization
        checks["logits, GPU against CPU, float32"] = _logits_error
    backend = "nccl" if options.device == "cuda" else "gloo"
    checks[f"gradients of DDP with {backend}, one rank"] = partial(_ddp_error, options.device, backend)
    for name, check in checks.items():
        result = try_measure(check, torch.device("cpu"))
        if isinstance(result, Missing):
            report.expect(name, False, result.reason)
        elif isinstance(result, float):
            report.check(name, result, MAX_ERROR)
        else:
            report.expect(name, *result)


class TrainRun:
    """A run of train.py in a forked process, in which `patch` is called first; an existing run is resumed."""

    def __init__(
        self,
        options: Options,
        name: str,
        steps: int,
        *arguments: str,
        patch: Callable[[], None] | None = None,
    ) -> None:
        self.folder, self.log = options.folder / name, options.folder / f"train_{name}.log"
        small = ("--schedule.batch_size", "8", "--data.images_per_class", "8")
        argv = [
            *("--output", str(self.folder), "--device", options.device, "--schedule.max_steps", str(steps)),
            *("--data.workers", "0", "--log_every", "1", "--loggers", "[]", "--progress", "false"),
            *(small if options.is_small else ()),
            *arguments,
        ]
        self.process = FORK.Process(target=_run_train, args=(argv, patch, self.log))
        self.process.start()

    def finish(self) -> list[dict[str, Any]]:
        """Wait for the run, and return the metrics of its steps; raise RuntimeError if it failed."""
        self.process.join()
        if self.process.exitcode:
            reason = f"train.py exited with {self.process.exitcode}: {last_line(self.log)}"
            raise RuntimeError(f"{self.folder.name}: {reason}")
        return _read_metrics(self.folder, "train")


def _run_train(argv: Sequence[str], patch: Callable[[], None] | None, log: Path) -> None:
    redirect_output(log)
    if patch is not None:
        patch()
    sys.argv = ["train.py", *argv]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def _read_metrics(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_metrics(folder) if record["kind"] == kind]


def make_gradient_infinite(step: int) -> None:
    """Make a scaled gradient infinite in an optimizer step of this process, counted from 1."""
    unscale, steps = torch.amp.GradScaler.unscale_, itertools.count(1)

    def patched(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
        if next(steps) == step:
            optimizer.param_groups[0]["params"][0].grad.view(-1)[:1] = float("inf")
        unscale(scaler, optimizer)

    torch.amp.GradScaler.unscale_ = patched  # type: ignore[method-assign, assignment]


def forbid_synchronization() -> None:
    """Make waiting for the GPU an error in the optimizer steps `SYNC_FREE_STEPS` of this process."""
    steps = itertools.count(1)

    def after_step(*_: Any) -> None:
        torch.cuda.set_sync_debug_mode("error" if next(steps) + 1 in SYNC_FREE_STEPS else "default")

    register_optimizer_step_post_hook(after_step)


def _ddp_error(device_type: str, backend: str) -> float:
    """Return the error of gradients of DDP, with one rank, against those of the model alone.

    It is relative to `MIN_GRADIENT_NORM` at least, like the errors of `compare_with_float64`: a gradient that
    cancels to nearly 0 differs between two passes on a GPU.
    """
    import torch.distributed as dist

    from vil.runtime.distributed import Process, data_parallel

    device = torch.device("cuda", 0) if device_type == "cuda" else torch.device("cpu")
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)

    def gradients(is_parallel: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model: nn.Module = vil.create_model("vil_tiny", image_size=32, num_classes=10).to(device)
        network = data_parallel(model, Process(0, 0, 1, device), (3, 32, 32)) if is_parallel else model
        network(images).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        pairs = list(zip(gradients(True), gradients(False)))
    finally:
        dist.destroy_process_group()
    min_norm = MIN_GRADIENT_NORM * max(expected.norm().item() for _, expected in pairs)
    return max(relative_error(actual, expected, min_norm) for actual, expected in pairs)


def _logits_error() -> float:
    """Return the error of logits on the GPU against those of the same weights on the CPU, in float32."""
    device = torch.device("cuda")
    torch.backends.cudnn.allow_tf32 = False  # as in training
    torch.manual_seed(0)
    model = vil.create_model("vil_tiny").eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = model(images)
        actual = model.to(device)(images.to(device)).cpu()
    return relative_error(actual, expected)


def cifar10(options: Options, report: Report) -> None:
    """Train on CIFAR-10 for as many epochs as there is time for; report the best Top-1."""
    root = options.cifar10
    if root is None:
        raise NotApplicableError("needs the folder of CIFAR-10: --cifar10")
    source = "torch/cifar10" if (root / "cifar-10-batches-py").exists() else "folder"
    folder, seconds = options.folder / "cifar10", options.seconds_left - 15
    epochs = int(min(100, max(2, (seconds - 20) / 8)))  # 8 s each, 20 s to start
    workers = max(1, (os.cpu_count() or 1) - 2)
    configs = ROOT / "configs"
    command = [
        *(sys.executable, str(ROOT / "train.py"), "--output", str(folder), "--device", options.device),
        *("--model", f"{configs}/models/vil_32.yaml"),
        *("--schedule", f"{configs}/schedules/cifar10.yaml", "--data", f"{configs}/data/cifar10.yaml"),
        *("--data.source", source, "--data.root", str(root), "--data.workers", str(workers)),
        *("--schedule.epochs", str(epochs), "--schedule.warmup_epochs", "1"),
        *("--loggers", "[]", "--progress", "false"),
    ]
    process = subprocess.Popen(command, cwd=ROOT)  # noqa: S603
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # saves and exits
        process.wait(10)
    rows = _read_metrics(folder, "validation")
    best = max((max(row["top1"], row.get("ema_top1", 0.0)) for row in rows), default=0.0)
    note = f"after {len(rows)} epochs"
    report.add("CIFAR-10, best Top-1", best, "%", note=note, target="93 after 100 epochs")
    report.expect("Top-1 above 20 %", best > 20, shown=False)
