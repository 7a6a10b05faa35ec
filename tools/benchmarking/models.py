"""tools/benchmark.py model: training and inference of whole models."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vil
from tools.benchmarking import measure
from tools.benchmarking.measure import Missing, attempt, interleaved
from tools.benchmarking.methods import BASELINE, sliding_chunk_attention
from tools.benchmarking.output import Cell, Figure, amount, factor, sheet
from tools.paper_tables import read_paper
from vil.attention import vision_longformer
from vil.attention.local import BACKENDS
from vil.command_line import COMMAND_LINE
from vil.config import ConfigError, Precision
from vil.evaluation.benchmark import halved_until_it_fits, saved_bytes
from vil.models.zoo import SIZES
from vil.training.precision import autocast, grad_scaler

MODELS = (
    "vil_small",
    f"vil_small+{BASELINE}",
    "timm/swin_tiny_patch4_window7_224",
    "timm/deit_small_patch16_224",
)
BATCH = {"cpu": 8, "cuda": 128}
"""Images of a step, where the option does not say, per kind of device."""


@dataclass
class Row:
    """What was found of one model; seconds and bytes of a whole batch, or why there is no such figure."""

    name: str
    batch: int
    params: int
    training: float | Missing
    inference: float | Missing
    memory: float | Missing


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `model`, beside those of every benchmark."""
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="MODEL",
                        help="a name of the zoo or timm/<name>; vil_small+sliding_chunk computes its local "
                        "attention by that baseline, vil_small+chunked by that backend")  # fmt: skip
    parser.add_argument("--batch", type=int, help="images of a step, halved until they fit; default: 8 on a "
                        "CPU, 128 on a GPU")  # fmt: skip
    parser.add_argument("--image_size", type=int, default=224, help="pixels")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")


class Candidate:
    """A model with its optimiser, and the attention that stands in the place of its own, if one does."""

    def __init__(self, name: str, arguments: argparse.Namespace, device: torch.device, precision: Precision):
        base, _, way = name.partition("+")
        if way and (base.startswith("timm/") or way not in (BASELINE, "auto", *BACKENDS)):
            ways = ", ".join((BASELINE, "auto", *BACKENDS))
            raise ConfigError(COMMAND_LINE, f"{name}: after a model of the zoo and + comes one of {ways}")
        options: dict[str, Any] = {"attention_backend": way} if way in BACKENDS else {}
        torch.manual_seed(0)
        model = vil.create_model(base, image_size=arguments.image_size, **options).to(device)
        self.name, self.model, self.device, self.precision = name, model, device, precision
        self.callable: nn.Module | Callable[[Tensor], Tensor] = model
        if arguments.compile:
            self.callable = torch.compile(model)
        self.slides = way == BASELINE
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")
        self.scaler = grad_scaler(precision, device)
        self.in_chans, self.image_size = 3, arguments.image_size

    def as_named(self) -> AbstractContextManager[Any]:
        """While this lasts, local attention is computed as the name says."""
        if not self.slides:
            return nullcontext()
        return mock.patch.object(vision_longformer, "local_attention", sliding_chunk_attention)

    def loss(
        self, images: Tensor, targets: Tensor, model: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Cross-entropy in train mode, of `model` in the place of the compiled one."""
        self.model.train()
        with self.as_named(), autocast(self.precision, self.device):
            logits = (model or self.callable)(images)  # (B, classes)
        return F.cross_entropy(logits.float(), targets)

    def train(self, images: Tensor, targets: Tensor) -> None:
        """A training step."""
        self.scaler.scale(self.loss(images, targets)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def infer(self, images: Tensor) -> Tensor:
        """Logits in eval mode."""
        self.model.eval()
        with self.as_named(), autocast(self.precision, self.device):
            logits: Tensor = self.callable(images)
            return logits

    def images(self, batch: int) -> tuple[Tensor, Tensor]:
        """Normal images and their targets."""
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (batch, self.in_chans, self.image_size, self.image_size)
        images = torch.randn(shape, generator=generator, device=self.device)
        return images, torch.zeros(batch, dtype=torch.int64, device=self.device)

    def fitting(self, batch: int) -> int:
        """The images of a step that memory holds: `batch`, or its half, its quarter, ... Trains a step."""

        def step(count: int) -> int:
            self.optimizer.zero_grad()  # of a larger batch that failed half-way
            self.train(*self.images(count))
            measure.synchronize(self.device)
            return count

        found = halved_until_it_fits(step, batch)
        if found is None:
            raise torch.OutOfMemoryError
        return found

    def memory(self, batch: int) -> float:
        """Bytes per image of a forward and backward pass: its peak on a GPU; on a CPU what is kept between.

        Weights, their gradients and the optimiser's state are not counted, nor is compilation on a CPU.
        """
        if self.device.type == "cuda":
            images, targets = self.images(batch)

            def passes() -> None:
                self.loss(images, targets).backward()

            passes()  # makes the gradients
            found = measure.peak_memory(passes, self.device) / batch
            self.optimizer.zero_grad()
            return found
        constant = [*self.model.parameters(), *self.model.buffers()]
        two, three = (
            saved_bytes(partial(self.loss, *self.images(count), model=self.model), constant)
            for count in (2, 3)  # batch norm refuses a single value per channel
        )
        return float(three - two)


def run(arguments: argparse.Namespace, device: torch.device, precision: Precision) -> list[Row]:
    """Measures every model."""
    batch = BATCH[device.type] if arguments.batch is None else arguments.batch
    for key, value in (("batch", batch), ("image_size", arguments.image_size)):
        if value < 1:
            raise ConfigError(COMMAND_LINE, f"--{key} must be at least 1, got {value}")
    torch._dynamo.config.recompile_limit = 64  # all models of the zoo share one forward function
    candidates = [Candidate(name, arguments, device, precision) for name in dict.fromkeys(arguments.models)]
    batches: dict[str, int | Missing] = {}
    functions: dict[tuple[str, str], Callable[[], Any]] = {}
    for candidate in candidates:
        fitting = batches[candidate.name] = attempt(partial(candidate.fitting, batch), device)
        print(f"{candidate.name}: batch {fitting}", file=sys.stderr, flush=True)
        if not isinstance(fitting, Missing):
            images, targets = candidate.images(fitting)
            functions[candidate.name, "training"] = partial(candidate.train, images, targets)
            functions[candidate.name, "inference"] = partial(candidate.infer, images)
    times = interleaved(
        functions, device=device, repeats=arguments.repeats, seconds=arguments.seconds,
        fastest=arguments.fastest,
    )  # fmt: skip
    rows = []
    for candidate in candidates:
        name, fitting = candidate.name, batches[candidate.name]
        params = sum(p.numel() for p in candidate.model.parameters())
        if isinstance(fitting, Missing):
            rows.append(Row(name, batch, params, fitting, fitting, fitting))
            continue
        memory = attempt(partial(candidate.memory, fitting), device)
        rows.append(Row(name, fitting, params, times[name, "training"], times[name, "inference"], memory))
    return rows


# --- Tables and figures -------------------------------------------------------------------------------------


def paper_memory() -> dict[str, float]:
    """Model → MB per image that Table 2 of the paper prints, for ViL and DeiT."""
    found = {}
    for printed in read_paper()["table2"]:
        size, blocks = printed["size"], tuple(printed["blocks"])
        if "DeiT" in printed["model"]:
            found[f"timm/deit_{size}_patch16_224"] = float(printed["memory_mb"])
        for name in (f"vil_{size}", f"vil_{size}_3stage"):
            is_vil = "longformer" in printed["attention"]
            if is_vil and blocks == tuple(stage[0] for stage in SIZES[name].stages):
                found[name] = float(printed["memory_mb"])
    return found


def records(rows: Sequence[Row], memory: str, precision: Precision) -> list[dict[str, Any]]:
    """Rows as plain values; None for what there is not, and why in `note`."""
    base = next((row for row in rows if row.name.endswith(f"+{BASELINE}")), None)
    printed = paper_memory()
    found = []
    for row in rows:
        training, inference = _speed(row, "training"), _speed(row, "inference")
        megabytes = amount(row.memory, 1e6)
        reasons = [x.reason for x in (row.training, row.inference, row.memory) if isinstance(x, Missing)]
        found.append(
            {
                "model": row.name, "batch": row.batch, "precision": precision, "params_m": row.params / 1e6,
                "training_images_per_second": training, "inference_images_per_second": inference,
                "memory_mb_per_image": megabytes, "memory": memory,
                "training_ratio": factor(training, _speed(base, "training")),
                "inference_ratio": factor(inference, _speed(base, "inference")),
                "memory_ratio": factor(amount(base.memory, 1e6) if base else None, megabytes),
                "paper_memory_mb": printed.get(row.name.partition("+")[0]),
                "note": "; ".join(dict.fromkeys(reasons)),
            }
        )  # fmt: skip
    return found


def _speed(row: Row | None, key: str) -> float | None:
    """Images per second."""
    return None if row is None else factor(row.batch, getattr(row, key))


def table(found: Sequence[Mapping[str, Any]], memory: str) -> str:
    """The records as a table."""
    columns: dict[str, Cell] = {
        "model": ("model", str),
        "batch": ("batch", str),
        "params M": ("params_m", "{:.1f}".format),
        "training images/s": ("training_images_per_second", "{:.1f}".format),
        "×": ("training_ratio", "{:.2f}".format),
        "inference images/s": ("inference_images_per_second", "{:.1f}".format),
        "× ": ("inference_ratio", "{:.2f}".format),
        f"MB per image, {memory}": ("memory_mb_per_image", "{:.1f}".format),
        "×  ": ("memory_ratio", "{:.2f}".format),
        "MB, paper's Table 2": ("paper_memory_mb", "{:.1f}".format),
    }
    return sheet(found, columns)


def figures(found: Sequence[Mapping[str, Any]], memory: str) -> list[Figure]:
    """Bars of speed and memory."""
    titles = {
        "training_images_per_second": "training, images per second",
        "inference_images_per_second": "inference, images per second",
        "memory_mb_per_image": f"training, MB per image, {memory}",
    }
    return [
        Figure(title, "", {r["model"]: [(0.0, r[key])] for r in found if r[key] is not None})
        for key, title in titles.items()
    ]
