"""Every option of a schedule and of a training run reaches what it configures."""

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_files
from helpers.tiny_run import CLASSES, SIZE, TinyModel, load_last, make_config, make_teacher, run

from vil.checkpoints.checkpoint_files import step_files
from vil.config import ModelConfig, ScheduleConfig, TrainConfig
from vil.training import run_log, trainer

Options = dict[str, Any]
RANDOM_SHIFT = ModelConfig(image_size=SIZE, num_classes=CLASSES, neighbors="random")
SGD: Options = {"optimizer": "momentum", "momentum": 0.9}

SCHEDULE: dict[str, tuple[Any, Options, str]] = {
    "epochs": (2, {}, "epochs"),
    "max_steps": (2, {}, "steps"),
    "batch_size": (8, {}, "batch_size"),
    "accumulation": (2, {}, "batch_size"),
    "trainable": ("head", {}, "params"),
    "optimizer": ("lamb", {}, "optimizer"),
    "lr": (0.1, {}, "learning_rates"),
    "lr_batch_size": (32, {}, "learning_rates"),
    "lr_scaling": ("sqrt", {"lr_batch_size": 64}, "learning_rates"),
    "betas": ((0.5, 0.6), {}, "betas"),
    "momentum": (0.5, SGD, "momentum"),
    "dampening": (0.5, SGD, "dampening"),
    "eps": (1e-3, {}, "eps"),
    "optimizer_options": ({"amsgrad": True}, {}, "optimizer"),
    "weight_decay": (0.3, {}, "weight_decay"),
    "decay_biases": (True, {"weight_decay": 0.1}, "params"),
    "layer_decay": (0.5, {}, "lr_scale"),
    "layer_decay_min": (0.9, {"layer_decay": 0.5}, "lr_scale"),
    "clip_grad": (0.01, SGD, "weights"),
    "clip_mode": ("value", {**SGD, "clip_grad": 0.01}, "weights"),
    "scheduler": ("constant", {}, "learning_rates"),
    "min_lr": (0.01, {}, "learning_rates"),
    "warmup_epochs": (0.0, {}, "learning_rates"),
    "warmup_factor": (0.5, {}, "learning_rates"),
    "warmup_prefix": (False, {}, "learning_rates"),
    "decay_epochs": (0.4, {"scheduler": "step", "warmup_epochs": 0}, "learning_rates"),
    "decay_milestones": (
        [0.4],
        {"scheduler": "multistep", "warmup_epochs": 0, "decay_milestones": [0.6]},
        "learning_rates",
    ),
    "cooldown_epochs": (1, {}, "epochs"),
    "decay_rate": (0.5, {"scheduler": "step", "warmup_epochs": 0, "decay_epochs": 0.4}, "learning_rates"),
    "loss": ("bce", {}, "losses"),
    "bce_threshold": (0.9, {"loss": "bce", "label_smoothing": 0.3}, "losses"),
    "class_weights": ("balanced", {}, "losses"),
    "label_smoothing": (0.3, {}, "losses"),
    "distillation": ("hard", {}, "losses"),
    "distillation_alpha": (0.9, {"distillation": "hard"}, "losses"),
    "distillation_temperature": (2.0, {"distillation": "soft"}, "losses"),
    "ema_decay": (0.5, {}, "ema"),
    "ema_warmup": (True, {"ema_decay": 0.9}, "ema"),
    "patience": (1, {"epochs": 3, "lr": 1e-9}, "epochs"),
    "best_metric": ("loss", {}, "best"),
    "random_shift_until": (0.0, {"model": RANDOM_SHIFT}, "neighbors"),
    "progressive_resizing": ([(0.1 * n, SIZE) for n in range(9)], {"compile": True}, "recompile_limit"),
    "random_sizes": ([SIZE] * 9, {"compile": True}, "recompile_limit"),
    "scale_lr_with_batch_size": (
        True,
        {"progressive_resizing": [(0, SIZE), (0.5, SIZE, 14)], "epochs": 2, "scheduler": "constant"},
        "learning_rates",
    ),
}
"""Option -> another value than the default, options of both runs, and the effect that must differ."""

TRAIN: dict[str, tuple[Any, Options, str]] = {
    "seed": (1, {}, "losses"),
    "precision": ("bfloat16", {}, "dtype"),
    "compile": (True, {}, "compiled"),
    "compile_backend": ("aot_eager", {"compile": True}, "compile_options"),
    "compile_mode": ("max-autotune-no-cudagraphs", {"compile": True}, "compile_options"),
    "channels_last": (True, {}, "channels_last"),
    "gradient_checkpointing": (True, {}, "gradient_checkpointing"),
    "log_every": (3, {}, "steps"),
    "eval_every": (2, {"epochs": 2}, "evaluations"),
    "save_every": (2, {}, "checkpoints"),
    "keep_checkpoints": (1, {"epochs": 2}, "checkpoints"),
    "max_skipped_steps": (3, {}, "LossMonitor"),
    "spike_threshold": (3.0, {}, "LossMonitor"),
    "hang_timeout": (300.0, {}, "Watchdog"),
    "hang_action": ("exit", {}, "Watchdog"),
    "grace_period": (60.0, {}, "Watchdog"),
    "attention_every": (1, {"loggers": ["tensorboard"], "epochs": 2}, "attention_images"),
    "loggers": (["csv"], {}, "files"),
    "progress": (False, {}, "progress_bars"),
}

TESTED_ELSEWHERE = {
    *("model", "schedule", "data", "augment", "output", "resume", "device", "deterministic", "start_timeout"),
    "eval_sets",
    *("teacher", "teacher_weights", "teacher_released_config"),
}
"""Sections, and options that train.py reads."""

COUNTERS = ("attention_images", "compiled", "progress_bars")


def effects(folder: Path, options: Options) -> Options:
    """Train for an epoch, and return what options can change."""
    found: Options = {"gradient_checkpointing": False} | dict.fromkeys(COUNTERS, 0)

    class Observed(TinyModel):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = super().forward(x)
            if self.training:
                found["batch_size"], found["dtype"] = len(x), logits.dtype
                found["channels_last"] = x.is_contiguous(memory_format=torch.channels_last)
            return logits

        def set_grad_checkpointing(self, enable: bool = True) -> None:
            found["gradient_checkpointing"] = enable

    def count(name: str, result: Any) -> Any:
        found[name] += 1
        return result

    def recording(name: str) -> Any:
        original = getattr(trainer, name)

        def create(*arguments: Any, **keywords: Any) -> Any:
            found[name] = [value for value in arguments if isinstance(value, int | float)]
            return original(*arguments, **keywords)

        return create

    model = Observed(dropout=0.2)
    draw = torch.zeros(3, 4, 4, dtype=torch.uint8)
    tqdm = run_log.tqdm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch,
            "compile",
            lambda network, **keywords: found.update(compile_options=keywords) or count("compiled", network),
        )
        for name in ("LossMonitor", "Watchdog"):
            patch.setattr(trainer, name, recording(name))
        patch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        patch.setattr(
            run_log,
            "tqdm",
            lambda **keywords: tqdm(
                **keywords | {"disable": count("progress_bars", True) if not keywords["disable"] else True}
            ),
        )
        patch.setattr("vil.evaluation.accuracy.progress_bar", lambda batches, **_: batches)
        config = make_config(folder, **{"epochs": 1, "warmup_epochs": 0.4} | options)
        with torch._dynamo.config.patch(recompile_limit=8):
            teacher = None if config.schedule.distillation == "none" else make_teacher()
            monitoring = trainer.Monitoring(lambda: count("attention_images", draw))
            run(config, model, teacher=teacher, monitoring=monitoring)
            found["recompile_limit"] = torch._dynamo.config.recompile_limit
    train = run_files.records(folder, "train")
    state = load_last(folder)
    groups = state["optimizer"]["param_groups"]
    for key in ("betas", "momentum", "dampening", "eps", "weight_decay", "lr_scale", "params"):
        found[key] = [group.get(key) for group in groups]
    return found | {
        "steps": [record["step"] for record in train],
        "epochs": {record["epoch"] for record in train},
        "losses": [record["loss"] for record in train],
        "learning_rates": [record["lr"] for record in train],
        "best": state["best"],
        "evaluations": len(run_files.records(folder)) - len(train),
        "optimizer": set(state["optimizer"]["state"][0]),
        "weights": [value.tolist() for value in state["model"].values()],
        "ema": state["ema"] and [value.tolist() for value in state["ema"].values()],
        "neighbors": model.neighbors,
        "checkpoints": [step for step, _ in step_files(folder)],
        "files": sorted(path.name for path in folder.iterdir()),
    }


@pytest.fixture(scope="module")
def cached_effects(tmp_path_factory: pytest.TempPathFactory):
    cache: dict[str, Options] = {}
    numbers = itertools.count()

    def get(options: Options) -> Options:
        key = repr(sorted(options.items()))
        if key not in cache:
            cache[key] = effects(tmp_path_factory.mktemp(f"run{next(numbers)}"), options)
        return cache[key]

    return get


@pytest.mark.parametrize("name", [*SCHEDULE, *TRAIN])
def test_an_option_has_its_effect(name: str, cached_effects):
    value, base, effect = {**SCHEDULE, **TRAIN}[name]
    assert cached_effects({**base, name: value})[effect] != cached_effects(base)[effect]


@pytest.mark.parametrize(("config", "entries"), [(ScheduleConfig, SCHEDULE), (TrainConfig, TRAIN)])
def test_every_option_has_an_entry(config: Any, entries: Options):
    fields = {field.name for field in dataclasses.fields(config)}
    assert fields - TESTED_ELSEWHERE == entries.keys()
