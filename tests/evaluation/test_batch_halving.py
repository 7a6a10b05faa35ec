"""Batches that memory does not hold are evaluated in parts, in eval.py, in training and on several ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.run_files import records
from helpers.tiny_run import TinyModel, make_config, run
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from vil.config import EvalConfig, ModelConfig
from vil.evaluation.accuracy import EvaluationDataset, EvaluationOptions, EvaluationResult, evaluate
from vil.evaluation.batch_halving import BatchHalving
from vil.evaluation.report import evaluate_model
from vil.runtime.distributed import Process

CPU = torch.device("cpu")


class Limited(nn.Module):
    """A linear model in a memory of `limit` images."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.limit, self.head, self.sizes = limit, nn.Linear(12, 10), []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.head(x.flatten(1))


def batches(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(20, 3, 2, 2, generator=generator), torch.arange(20) % 10) for _ in range(count)]


def result(model: nn.Module, halving: BatchHalving | None = None) -> EvaluationResult:
    options = EvaluationOptions(CPU, "float32", halving=halving or BatchHalving())
    return evaluate(model, EvaluationDataset("random", batches(), "0123456789"), options)


def test_parts_give_the_same_results_and_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    expected, model, halving = result(Limited(20)), Limited(6), BatchHalving()
    for _ in range(2):
        found = result(model, halving)
        assert found.values == pytest.approx(dict(expected.values), rel=1e-9)
        assert (found.images, found.classes) == (40, expected.classes)
    assert caplog.messages == ["out of memory with a batch of 20 images: evaluated in parts of 5"]
    assert model.sizes == [20, 10, *[5] * 16]


def test_memory_for_less_than_one_image_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory. Tried to allocate 2.00 GiB$"):
        result(Limited(0))


def test_data_sets_of_eval_share_the_size(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    config = EvalConfig(model=ModelConfig(name="tiny", image_size=2), batch_size=4)
    datasets = [EvaluationDataset(name, batches()) for name in "ab"]
    found = evaluate_model(model := Limited(7), datasets, config, Process(0, 0, 1, CPU))
    assert [value["loss"] for value in found] == pytest.approx([result(Limited(20)).values["loss"]] * 2)
    assert len([text for text in caplog.messages if "out of memory" in text]) == 1
    assert model.sizes[:10] == [20, 10, *[5] * 8]


class LimitedInEvaluation(TinyModel):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training and len(x) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(x)


def test_evaluations_of_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for name, model in (("plain", TinyModel()), ("limited", LimitedInEvaluation())):
        run(make_config(tmp_path / name, ema_decay=0.5), model)
    found = (records(tmp_path / name, "validation") for name in ("plain", "limited"))
    for plain, limited in zip(*found, strict=True):
        assert {k: limited[k] for k in ("top1", "loss", "ema_top1", "ema_loss")} == pytest.approx(
            {k: plain[k] for k in ("top1", "loss", "ema_top1", "ema_loss")}, rel=1e-6
        )
    message = "out of memory with a batch of 30 images: evaluated in parts of 7"
    assert [text for text in caplog.messages if "out of memory" in text] == [message]


def evaluate_on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = result(Limited(3 if rank else 20))  # the memory of one rank is smaller
    Path(f"{folder}/{rank}.json").write_text(json.dumps([found.images, found.values["loss"]]))
    dist.destroy_process_group()


def test_one_of_two_ranks_halves_its_batches(tmp_path: Path) -> None:
    start_processes(evaluate_on_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    expected = result(Limited(20)).values["loss"]
    assert found[0] == found[1] == [80, pytest.approx(expected, rel=1e-9)]
