"""What a schedule's numbers may be; checked before anything is built."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from vil.config import ConfigError, TrainConfig

_Test = Callable[[Any], bool]

_POSITIVE: tuple[_Test, str] = (lambda x: x > 0, "more than 0")
_AT_LEAST_1: tuple[_Test, str] = (lambda x: x >= 1, "1 or more")
_NOT_NEGATIVE: tuple[_Test, str] = (lambda x: x >= 0, "0 or more")
_BELOW_1: tuple[_Test, str] = (lambda x: 0 <= x < 1, "from 0 to below 1")
_SECONDS: tuple[_Test, str] = (lambda x: 0 < x <= 1e6, "more than 0, up to 1,000,000 s")
_FRACTION: tuple[_Test, str] = (lambda x: 0 <= x <= 1, "from 0 to 1")

_LIMITS: dict[str, tuple[_Test, str]] = {
    "schedule.epochs": _AT_LEAST_1,
    "schedule.max_steps": _AT_LEAST_1,
    "schedule.batch_size": _AT_LEAST_1,
    "schedule.accumulation": _AT_LEAST_1,
    "schedule.lr": _POSITIVE,
    "schedule.lr_batch_size": _AT_LEAST_1,
    "schedule.betas": (lambda x: all(0 <= beta < 1 for beta in x), "two numbers from 0 to below 1"),
    "schedule.momentum": _BELOW_1,
    "schedule.dampening": _FRACTION,
    "schedule.eps": _POSITIVE,
    "schedule.weight_decay": _NOT_NEGATIVE,
    "schedule.layer_decay": (lambda x: 0 < x <= 1, "above 0, up to 1"),
    "schedule.clip_grad": _POSITIVE,
    "schedule.min_lr": _NOT_NEGATIVE,
    "schedule.warmup_epochs": _NOT_NEGATIVE,
    "schedule.warmup_factor": _FRACTION,
    "schedule.decay_epochs": _POSITIVE,
    "schedule.decay_rate": _POSITIVE,
    "schedule.label_smoothing": _BELOW_1,
    "schedule.ema_decay": _BELOW_1,
    "schedule.random_shift_until": _FRACTION,
    "seed": _NOT_NEGATIVE,
    "log_every": _AT_LEAST_1,
    "eval_every": _AT_LEAST_1,
    "attention_every": _AT_LEAST_1,
    "save_every": _AT_LEAST_1,
    "keep_checkpoints": _AT_LEAST_1,
    "max_skipped_steps": _NOT_NEGATIVE,
    "spike_threshold": _POSITIVE,
    "hang_timeout": _SECONDS,
    "grace_period": _SECONDS,
}


def check_limits(config: TrainConfig) -> None:
    """Raises ConfigError for the first number of `config` that no run could use."""
    for key, (allows, words) in _LIMITS.items():
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name)
        if value is None:
            continue
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(map(math.isfinite, numbers)) or not allows(value):
            raise ConfigError(key, f"expected {words}, got {value}")
