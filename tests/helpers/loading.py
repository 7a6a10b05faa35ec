"""Build loaders from options, as train.py and eval.py build them from a configuration."""

from pathlib import Path
from typing import Any

import torch

from data import Loaders, Validation, build_loaders, build_validation
from vil.config import AugmentConfig, DataConfig, EvalConfig, ModelConfig, ScheduleConfig, Size, TrainConfig
from vil.runtime.distributed import Process

CPU = torch.device("cpu")


def load(
    data: DataConfig,
    augment: AugmentConfig | None = None,
    *,
    batch_size: int,
    image_size: int | Size = 32,
    in_chans: int = 3,
    seed: int = 0,
    channels_last: bool = False,
    output: Path | None = None,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device = CPU,
    is_new: bool = True,
    **schedule: Any,
) -> Loaders:
    """Return the loaders of a run; further options are those of its schedule."""
    config = TrainConfig(
        ModelConfig(image_size=image_size, in_chans=in_chans),
        ScheduleConfig(batch_size=batch_size, augment=augment or AugmentConfig(), **schedule),
        data,
        None if output is None else str(output),
        seed=seed,
        channels_last=channels_last,
    )
    return build_loaders(config, Process(rank, rank, world_size, device), is_new)


def load_validation(
    data: DataConfig,
    *,
    batch_size: int,
    image_size: int | Size = 32,
    in_chans: int = 3,
    rank: int = 0,
    world_size: int = 1,
) -> Validation:
    """Return a validation set."""
    model = ModelConfig(image_size=image_size, in_chans=in_chans)
    config = EvalConfig(model=model, data=data, batch_size=batch_size)
    return build_validation(config, Process(rank, rank, world_size, CPU))
