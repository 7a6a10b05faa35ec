"""A tiny problem that trains in milliseconds, with everything a run needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vil.checkpoints.checkpoint_files import step_files
from vil.checkpoints.teacher import TrainedTeacher
from vil.checkpoints.training_state import read_training_state
from vil.config import DataConfig, ModelConfig, ScheduleConfig, TrainConfig
from vil.runtime.distributed import Process
from vil.training.distillation import Teacher
from vil.training.trainer import Summary, fit

CLASSES, SIZE, STEPS = 4, 8, 5
CPU = Process(0, 0, 1, torch.device("cpu"))


class TinyModel(nn.Module):
    """A convolution, a norm, dropout and a head, with the methods of timm that training calls."""

    def __init__(self, dropout: float = 0.0, norm: type[nn.Module] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)  # first weights are always the same
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = norm(8) if norm else nn.GroupNorm(2, 8)
        self.dropout = nn.Dropout(dropout)
        self.position = nn.Parameter(torch.zeros(8, 2, 2))
        self.head = nn.Linear(8, CLASSES)
        self.neighbors: list[str] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.norm(self.stem(x) + self.position).relu())
        return self.head(x.mean((2, 3)))

    def get_classifier(self) -> nn.Module:
        return self.head

    def no_weight_decay(self) -> set[str]:
        return {"position"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^stem|^position", "blocks": [(r"^norm", None)]}

    def set_neighbors(self, neighbors: str) -> None:
        self.neighbors.append(neighbors)


class TwoHeads(TinyModel):
    """The tiny model with a distillation head, as timm's distilled models have it."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.head_dist = nn.Linear(8, CLASSES)
        self.distilled_training = False

    def forward(self, x: torch.Tensor) -> Any:
        x = self.dropout(self.norm(self.stem(x) + self.position).relu()).mean((2, 3))
        outputs = self.head(x), self.head_dist(x)
        return outputs if self.distilled_training and self.training else sum(outputs) / 2

    def get_classifier(self) -> Any:
        return self.head, self.head_dist

    def set_distilled_training(self, enable: bool = True) -> None:
        self.distilled_training = enable


def make_teacher(seed: int = 1, class_names: tuple[str, ...] | None = None) -> Teacher:
    """Return a teacher of another normalization, whose images have twice the size."""
    model = TinyModel(dropout=0.5)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    model.position.data = torch.randn(8, 2 * SIZE // 4, 2 * SIZE // 4, generator=generator)
    names = class_names or make_loaders().class_names
    trained = TrainedTeacher(
        model.eval().requires_grad_(False),
        name="tiny",
        image_size=(2 * SIZE, 2 * SIZE),
        in_chans=3,
        mean=(0.4, 0.5, 0.6),
        std=(0.3, 0.2, 0.1),
        class_names=names,
        num_classes=len(names),
        digest=f"seed {seed}",
    )
    device = torch.device("cpu")
    return Teacher(trained, DataConfig.mean, DataConfig.std, make_loaders().class_names, device)


class TinyTrainLoader:
    """Images whose class is the brightest channel, or none; batches are a function of epoch and step."""

    def __init__(self, batch_size: int, accumulation: int = 1, rank: int = 0, world_size: int = 1) -> None:
        self.steps_per_epoch = STEPS
        self.batch_size, self.accumulation = batch_size, accumulation
        self.rank, self.world_size = rank, world_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for step in range(start, STEPS):
            images, targets = make_batch(1 + epoch * STEPS + step, self.batch_size)
            parts = self.world_size * self.accumulation
            for part in range(self.rank * self.accumulation, (self.rank + 1) * self.accumulation):
                yield images.chunk(parts)[part], targets.chunk(parts)[part]

    def samples(self, epoch: int, step: int) -> list[str]:
        return [f"epoch {epoch} step {step} image {number}" for number in range(self.batch_size)]


@dataclass
class TinyLoaders:
    train: TinyTrainLoader
    validation: list[tuple[torch.Tensor, torch.Tensor]]
    num_classes: int = CLASSES
    class_names: tuple[str, ...] = ("red", "green", "blue", "none")
    class_counts: tuple[int, ...] = (STEPS * 8, STEPS * 4, STEPS * 2, STEPS * 2)
    train_images: int = STEPS * 16
    order_version: int = 2

    def write_split(self, folder: Path) -> None:
        pass


def make_batch(number: int, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    targets = torch.randint(CLASSES, (batch_size,), generator=generator)
    images = torch.randn(batch_size, 3, SIZE, SIZE, generator=generator)
    offsets = torch.eye(CLASSES)[targets, :3]  # (B, 3)
    return images + offsets[:, :, None, None], targets


def make_loaders(
    batch_size: int = 16, accumulation: int = 1, rank: int = 0, world_size: int = 1
) -> TinyLoaders:
    images, targets = make_batch(0, 30)
    share = slice(rank, None, world_size)
    return TinyLoaders(
        TinyTrainLoader(batch_size, accumulation, rank, world_size), [(images[share], targets[share])]
    )


def make_config(output: Path, **options: Any) -> TrainConfig:
    """Return a configuration of three epochs; `options` are fields of TrainConfig or ScheduleConfig."""
    fields: dict[str, Any] = {"epochs": 3, "batch_size": 16, "lr": 0.02, "warmup_epochs": 0.5}
    schedule = ScheduleConfig(
        **fields | {k: v for k, v in options.items() if k in ScheduleConfig.__dataclass_fields__}
    )
    other = {k: v for k, v in options.items() if k not in ScheduleConfig.__dataclass_fields__}
    model = other.pop("model", ModelConfig(image_size=SIZE, num_classes=CLASSES))
    defaults = {"device": "cpu", "precision": "float32", "log_every": 1, "loggers": []}
    return TrainConfig(model, schedule, output=str(output), **defaults | other)


def load_last(folder: Path) -> dict[str, Any]:
    """Load the newest checkpoint of a run."""
    return read_training_state(step_files(folder)[0][1])


def find_last(folder: Path) -> dict[str, Any] | None:
    """Load the newest checkpoint of a run, if it has one."""
    return load_last(folder) if step_files(folder) else None


def run(
    config: TrainConfig,
    model: nn.Module | None = None,
    loaders: Any = None,
    process: Process = CPU,
    **options: Any,
) -> Summary:
    """Train a model, by default the tiny one on its data, in the folder `config.output`."""
    Path(config.output or "").joinpath("checkpoints").mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # small models are slower with more
    if loaders is None:
        loaders = make_loaders(config.schedule.batch_size, config.schedule.accumulation)
    if options.get("state"):
        options["state"] = dict(options["state"])  # which is emptied
    return fit(model or TinyModel(), loaders, config, process, **options)
