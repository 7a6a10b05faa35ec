"""The random draws of training are a function of (seed, step, rank, part of the batch) alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.run_files import is_equal
from helpers.tiny_run import TinyLoaders, TinyTrainLoader, make_batch, make_config, make_loaders, run
from torch import nn

from data import Mixing
from vil.config import AugmentConfig, ModelConfig
from vil.models.zoo import model_from_config
from vil.runtime.distributed import Process

CLASSES = 4
KINDS = ("mixup", "dropout", "drop_path", "random_shift")
Draws = dict[tuple[int, int], dict[str, torch.Tensor]]  # (step, part) -> kind -> what was drawn


class EqualBatches(TinyTrainLoader):
    """Yield the same images on all ranks, in all steps and parts: only the draws differ."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(2 * (self.steps_per_epoch - start)):
            images, targets = make_batch(1, 8)
            yield images.repeat(1, 1, 4, 4), targets  # (8, 3, 32, 32)


def record_draws(folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int, rank: int) -> Draws:
    """Train two steps of two parts on one rank, and return its draws."""
    torch.set_num_threads(1)
    options = ModelConfig(
        blocks=(1, 1, 1, 1),
        window=2,
        neighbors="random",
        image_size=32,
        num_classes=CLASSES,
        dropout=0.5,
        drop_path=0.9,
    )
    model = model_from_config(options)
    calls: list[dict[str, list[torch.Tensor]]] = []
    is_in_forward = False

    def record(kind: str, value: torch.Tensor) -> None:
        if is_in_forward:
            calls[-1].setdefault(kind, []).append(value.detach().flatten())

    def begin_forward(module: nn.Module, arguments: tuple[torch.Tensor]) -> None:
        nonlocal is_in_forward
        if model.training:
            is_in_forward = True
            calls.append({})
            record("mixup", arguments[0])

    def end_forward(*_: Any) -> None:
        nonlocal is_in_forward
        is_in_forward = False

    model.register_forward_hook(end_forward)
    model.register_forward_pre_hook(begin_forward)
    for module in model.modules():
        name = type(module).__name__
        kind = {"Dropout": "dropout", "DropPath": "drop_path"}.get(name)
        if kind:
            module.register_forward_hook(lambda _, __, output, kind=kind: record(kind, output != 0))
    randint = torch.randint

    def recording_randint(*arguments: Any, **options: Any) -> torch.Tensor:
        value = randint(*arguments, **options)
        record("random_shift", value)
        return value

    config = make_config(folder, seed=seed, epochs=1, max_steps=2, accumulation=2, model=options)
    mix = Mixing(AugmentConfig(mixup=0.8), CLASSES, 0.1, seed)
    validation = [(images.repeat(1, 1, 4, 4), targets) for images, targets in make_loaders().validation]
    loaders = TinyLoaders(EqualBatches(16, 2), validation)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randint", recording_randint)
        run(config, model, loaders, Process(rank, 0, 1, torch.device("cpu")), mix=mix)
    draws = [{kind: torch.cat(values) for kind, values in call.items()} for call in calls]
    assert len(draws) == 4
    assert all(set(draw) == set(KINDS) for draw in draws)
    return {divmod(index, 2): draw for index, draw in enumerate(draws)}


def test_draws_are_a_function_of_seed_step_rank_and_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One process of one rank, with the number of another rank, draws what that rank would draw."""
    runs = {
        (seed, rank): record_draws(tmp_path / f"{seed}_{rank}", monkeypatch, seed, rank)
        for seed, rank in ((0, 0), (0, 1), (1, 0))
    }
    torch.rand(7)  # the state of the generators does not matter
    again = record_draws(tmp_path / "again", monkeypatch, 0, 1)
    for kind in KINDS:
        draws = {
            (*run, *position): draw[kind] for run, found in runs.items() for position, draw in found.items()
        }
        keys = list(draws)
        equal = [(a, b) for i, a in enumerate(keys) for b in keys[:i] if torch.equal(draws[a], draws[b])]
        assert equal == [], f"{kind}: equal draws for (seed, rank, step, part)"
    assert is_equal(again, runs[0, 1])
