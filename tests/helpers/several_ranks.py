"""The program of each rank in test_distributed.py; under torchrun: several_ranks.py FOLDER all|wide"""

import functools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from helpers.tiny_run import STEPS, TinyModel, TwoHeads, find_last, make_config, make_loaders, make_teacher
from vil.checkpoints.writer import CheckpointWriter
from vil.errors import UserError
from vil.evaluation.accuracy import EvaluationDataset, EvaluationOptions, evaluate
from vil.runtime import distributed
from vil.runtime.distributed import Process, call_on_main
from vil.runtime.signals import InterruptedEvaluation, InterruptedRun
from vil.training import trainer

RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "parts": {"accumulation": 4},
    "clip": {"clip_grad": 0.1},
    "weighted": {"class_weights": [1.0, 20.0, 0.1, 5.0]},
    "weighted_parts": {"class_weights": [1.0, 20.0, 0.1, 5.0], "accumulation": 4},
    "distilled": {"distillation": "soft", "accumulation": 2, "class_weights": [1.0, 20.0, 0.1, 5.0]},
}


def train(folder: Path, process: Process, model: nn.Module, **options: Any) -> nn.Module:
    config = make_config(folder, **options)
    if process.is_main:
        folder.mkdir(exist_ok=True)
    schedule = config.schedule
    loaders = make_loaders(schedule.batch_size, schedule.accumulation, process.rank, process.world_size)
    state = call_on_main(lambda: find_last(folder))
    teacher = None if schedule.distillation == "none" else make_teacher()
    trainer.fit(model, loaders, config, process, state=state, teacher=teacher)
    return model


class Faulty(TinyModel):
    """On rank 1, the loss of the second step is NaN, and the gradient of the fourth."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().forward(x)
        self.calls += self.training
        if not self.training or not dist.is_initialized() or dist.get_rank() == 0:
            return logits
        if self.calls == 4 + 1:  # one pass precedes the first step
            logits.register_hook(lambda gradient: gradient * torch.nan)
        return logits * (torch.nan if self.calls == 2 + 1 else 1)


class Signalled(TinyModel):
    """Send signals to the process of rank 1."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        if dist.is_initialized() and dist.get_rank() == 1:
            for call, signum in ((4 + 1, signal.SIGUSR1), (8 + 1, signal.SIGTERM)):
                if self.training and self.calls == call:
                    os.kill(os.getpid(), signum)
        return super().forward(x)


def stop(folder: Path, process: Process) -> dict[str, Any]:
    """Return how a run ends whose rank 1 receives signals, and when it saves."""
    saved, save = [], CheckpointWriter.save

    def recording(writer: CheckpointWriter, state: dict[str, Any], is_best: bool) -> None:
        saved.append(state["step"])
        save(writer, state, is_best)

    CheckpointWriter.save = recording
    try:
        train(folder, process, Signalled())
    except InterruptedRun as ended:
        return {"signum": ended.signum, "reason": str(ended), "saved": saved}
    finally:
        CheckpointWriter.save = save
    return {}


def end_evaluation(process: Process) -> str:
    """Evaluate with a stop on the last rank after the first batch."""
    loader = make_loaders(rank=process.rank, world_size=process.world_size).validation * 3
    is_last = process.rank == process.world_size - 1
    options = EvaluationOptions(process.device, "float32", should_stop=lambda: is_last)
    try:
        evaluate(TinyModel(), EvaluationDataset("three", loader), options)
    except InterruptedEvaluation:
        return "ended"
    return "finished"


class Wide(TinyModel):
    """A model of several buckets of gradients, whose layers are used in another order than registered."""

    def __init__(self) -> None:
        super().__init__(0.2)
        self.last, self.first = (nn.Sequential(*(nn.Linear(256, 256) for _ in range(4))) for _ in range(2))
        self.widen, self.narrow = nn.Linear(8, 256), nn.Linear(256, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.norm(self.stem(x) + self.position).relu()).mean((2, 3))
        return self.head(x + self.narrow(self.last(self.first(self.widen(x)))))


class Half(TinyModel):
    """A model with parameters that get no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(2, 2)


def reduced_numbers(process: Process, folder: Path, **options: Any) -> list[int]:
    """Return the numbers in each all-reduce of gradients in one step of four parts: one bucket holds all."""
    numbers = []
    original = DistributedDataParallel.__init__

    @functools.wraps(original)
    def counting(self: DistributedDataParallel, *arguments: Any, **keywords: Any) -> None:
        original(self, *arguments, **keywords)

        def hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            numbers.append(bucket.buffer().numel())
            average = bucket.buffer().div_(process.world_size)
            return dist.all_reduce(average, async_op=True).get_future().then(lambda f: f.value()[0])

        self.register_comm_hook(None, hook)

    DistributedDataParallel.__init__ = counting
    try:
        train(folder, process, TinyModel(), accumulation=4, max_steps=1, **options)
    finally:
        DistributedDataParallel.__init__ = original
    return numbers


def fail_on_main() -> None:
    raise UserError("data.root", "there is nothing")


def break_on_main() -> None:
    raise OSError(28, "No space left on device")


def continue_wide(folder: Path) -> None:
    """Train a run at once, and the same run in three parts."""
    torch.set_num_threads(1)
    with distributed.start("cpu") as process:
        for name, steps in (("full", [15]), ("continued", [7, 12, 15])):
            for last in steps:
                train(folder / name, process, Wide(), batch_size=18, ema_decay=0.5, max_steps=last)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with distributed.start("cpu") as process:
        found: dict[str, Any] = {"rank": process.rank, "world_size": process.world_size}
        for name, options in RUNS.items():
            train(folder / name, process, TinyModel(), **options)
        train(folder / "head", process, TinyModel(norm=nn.BatchNorm2d), trainable="head")
        train(folder / "idle", process, Half())
        train(folder / "token", process, TwoHeads(), distillation="hard")
        norm = train(folder / "norm", process, TinyModel(norm=nn.BatchNorm2d), ema_decay=0.5).norm
        found["running_mean"] = norm.running_mean.tolist()
        for name, steps in (("full", [15]), ("continued", [7, 12, 15])):
            for last in steps:  # parts of a run end within epochs
                train(folder / name, process, TinyModel(0.2, nn.BatchNorm2d), ema_decay=0.5, max_steps=last)
        train(folder / "moved", process, TinyModel())
        train(folder / "short", process, TinyModel(), max_steps=7)
        model = train(folder / "faulty", process, Faulty(), max_steps=STEPS + 1)
        found["faulty"] = torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()
        found["evaluation"] = end_evaluation(process)
        if process.world_size > 1:
            found["stop"] = stop(folder / "stop", process)
        found["reductions"] = reduced_numbers(process, folder / "reductions")
        found["head_reductions"] = reduced_numbers(process, folder / "head_reductions", trainable="head")
        found["sum"] = distributed.all_reduce_sum(torch.tensor(process.rank + 1)).item()
        found["object"] = distributed.broadcast_object({"from": process.rank})
        found["main"] = call_on_main(lambda: process.rank)
        try:
            call_on_main(fail_on_main)
        except UserError as error:
            found["error"] = str(error)
        try:
            call_on_main(break_on_main)
        except (OSError, RuntimeError) as error:
            found["failure"] = f"{type(error).__name__}: {error}"
        if process.world_size > 1:
            dist.barrier()
        (folder / f"rank{process.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    {"all": main, "wide": continue_wide}[sys.argv[2]](Path(sys.argv[1]))
