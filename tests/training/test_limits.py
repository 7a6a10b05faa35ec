import math
from typing import Any

import pytest

from vil.config import ConfigError, ScheduleConfig, TrainConfig
from vil.training.limits import check_limits


def test_the_defaults_are_within():
    check_limits(TrainConfig())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("max_steps", 0),
        ("batch_size", -4),
        ("lr", 0.0),
        ("lr", math.nan),
        ("lr", math.inf),
        ("betas", (0.9, 1.0)),
        ("label_smoothing", 1.0),
        ("warmup_epochs", -1.0),
        ("layer_decay", 1.5),
        ("ema_decay", 1.0),
        ("random_shift_until", 1.1),
    ],
)
def test_impossible_schedules(name: str, value: Any):
    with pytest.raises(ConfigError) as caught:
        check_limits(TrainConfig(schedule=ScheduleConfig(**{name: value})))
    assert caught.value.key == f"schedule.{name}"
    assert str(value) in caught.value.reason


def test_impossible_intervals():
    with pytest.raises(ConfigError, match="log_every: expected 1 or more, got 0"):
        check_limits(TrainConfig(log_every=0))
