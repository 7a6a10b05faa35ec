"""Benchmark of whole models: training and inference speed, and training memory."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vil
from tools.benchmarks import timing
from tools.benchmarks.methods import BASELINE, sliding_chunk_attention
from tools.benchmarks.output import Column, Results, ratio
from tools.benchmarks.timing import Measurement, Missing, TimingOptions
from tools.paper_results import read_paper_results
from vil.attention import vision_longformer
from vil.attention.local import BACKENDS
from vil.command_line import bounded_int
from vil.config import Precision
from vil.errors import COMMAND_LINE, UserError
from vil.evaluation.cost import halve_batch_until_it_fits, saved_bytes
from vil.models.zoo import SIZES
from vil.runtime.precision import autocast, grad_scaler

TIMM_MODELS = ("timm/swin_tiny_patch4_window7_224", "timm/deit_small_patch16_224")
MODELS = ("vil_small", f"vil_small+{BASELINE}", *TIMM_MODELS)
NONE = "none"
"""Replacement of the local attention that computes next to nothing."""
DEFAULT_BATCH_SIZE = {"cpu": 8, "cuda": 128}
"""Images of a step, by device type."""


def add_options(parser: ArgumentParser) -> None:
    """Add the options of `benchmark.py model`."""
    models_help = (
        "a name of the zoo or timm/<name>; vil_small+sliding_chunk replaces the local attention by that "
        "baseline, vil_small+none by next to nothing (an upper bound), vil_small+chunked selects that backend"
    )
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="MODEL", help=models_help)
    batch_help = "images of a step, halved until they fit; default: 8 on a CPU, 128 on a GPU"
    parser.add_argument("--batch-size", type=bounded_int(1), help=batch_help)
    parser.add_argument("--image-size", type=bounded_int(1), default=224, help="pixels")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")


class Candidate:
    """A model with its optimizer.

    Args:
        name: a name of the zoo or of timm; `+` and a backend, the baseline or `none` select its local
            attention.
        compiler: returns the compiled model.
    """

    def __init__(
        self,
        name: str,
        image_size: int,
        device: torch.device,
        precision: Precision,
        compiler: Callable[[nn.Module], Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        model_name, _, attention = name.partition("+")
        choices = (BASELINE, NONE, "auto", *BACKENDS)
        if attention and (model_name.startswith("timm/") or attention not in choices):
            reason = f"{name}: expected a model of the zoo before +, and one of {', '.join(choices)} after it"
            raise UserError(COMMAND_LINE, reason)
        options: dict[str, Any] = {"attention_backend": attention} if attention in BACKENDS else {}
        torch.manual_seed(0)
        self.model = vil.create_model(model_name, image_size=image_size, **options).to(device)
        self.forward = self.model if compiler is None else compiler(self.model)
        self.name, self.image_size, self.device, self.precision = name, image_size, device, precision
        self.replacement = {BASELINE: sliding_chunk_attention, NONE: _no_attention}.get(attention)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=device.type == "cuda")
        self.scaler = grad_scaler(precision, device)

    def _attention_replaced(self) -> AbstractContextManager[Any]:
        if self.replacement is None:
            return nullcontext()
        return mock.patch.object(vision_longformer, "local_attention", self.replacement)

    def loss(
        self, images: Tensor, targets: Tensor, forward: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Return the cross-entropy in train mode; `forward` replaces the compiled model."""
        self.model.train()
        with self._attention_replaced(), autocast(self.precision, self.device):
            logits = (forward or self.forward)(images)  # (B, classes)
        return F.cross_entropy(logits.float(), targets)

    def train(self, images: Tensor, targets: Tensor) -> None:
        """Run a training step."""
        self.scaler.scale(self.loss(images, targets)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def infer(self, images: Tensor) -> Tensor:
        """Return the logits in eval mode."""
        self.model.eval()
        with self._attention_replaced(), autocast(self.precision, self.device):
            return self.forward(images)

    def images(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return normal images (batch, 3, size, size), and targets."""
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (batch, 3, self.image_size, self.image_size)
        images = torch.randn(shape, generator=generator, device=self.device)
        return images, torch.zeros(batch, dtype=torch.int64, device=self.device)

    def largest_batch(self, batch: int) -> int:
        """Return the first of `batch`, its half, its quarter, ... whose training step fits into memory."""

        def step(count: int) -> int:
            self.optimizer.zero_grad()  # gradients of a larger batch that ran out of memory
            self.train(*self.images(count))
            timing.synchronize(self.device)
            return count

        if batch_size := halve_batch_until_it_fits(step, batch):
            return batch_size
        raise torch.OutOfMemoryError

    def memory(self, batch: int) -> float:
        """Return bytes per image of a forward and backward pass: the peak on a GPU, or what autograd keeps.

        Parameters, their gradients and the optimizer's state do not count.
        """
        if self.device.type == "cuda":
            images, targets = self.images(batch)

            def passes() -> None:
                self.loss(images, targets).backward()

            passes()  # allocates the gradients
            peak_bytes = timing.peak_memory(passes, self.device) / batch
            self.optimizer.zero_grad()
            return peak_bytes
        constant = [*self.model.parameters(), *self.model.buffers()]
        two, three = (
            saved_bytes(partial(self.loss, *self.images(count), forward=self.model), constant)
            for count in (2, 3)  # batch norm refuses a single value per channel
        )
        return float(three - two)


def _no_attention(query: Tensor, key: Tensor, value: Tensor, *_: Tensor, **__: object) -> Tensor:
    """Return (B, h, N, D) by two additions, so that all projections still have gradients."""
    return query + key + value


def run(arguments: Namespace, device: torch.device, precision: Precision) -> Results:
    """Measure every model."""
    torch._dynamo.config.recompile_limit = 64  # the models of the zoo share one forward function
    compiler = torch.compile if arguments.compile else None
    names, size = dict.fromkeys(arguments.models), arguments.image_size
    candidates = [Candidate(name, size, device, precision, compiler) for name in names]
    options = TimingOptions(arguments.repeats, arguments.seconds)
    batch_size = arguments.batch_size or DEFAULT_BATCH_SIZE[device.type]
    measurements = measure_models(candidates, batch_size, options)
    memory = timing.memory_kind(device)
    uncompiled = "" if device.type == "cuda" else "; counted without torch.compile"
    notes = [
        f"- {arguments.image_size}² pixels, {'with' if arguments.compile else 'without'} torch.compile, "
        f"autocast to {precision}. training: forward, loss, backward, AdamW. {options}.",
        f"- ×: improvement over the model with +{BASELINE}. MB: 10⁶ bytes, without parameters, their "
        f"gradients and the optimizer's state{uncompiled}.",
    ]
    columns = [
        Column("model", "model"),
        Column("batch", "batch"),
        Column("params M", "params_m", "{:.1f}"),
        Column("training images/s", "training_images_per_second", "{:.1f}"),
        Column("×", "training_ratio", "{:.2f}"),
        Column("inference images/s", "inference_images_per_second", "{:.1f}"),
        Column("× ", "inference_ratio", "{:.2f}"),
        Column(f"MB per image, {memory}", "memory_mb_per_image", "{:.1f}"),
        Column("×  ", "memory_ratio", "{:.2f}"),
        Column("MB, paper's Table 2", "paper_memory_mb", "{:.1f}"),
    ]
    return Results(notes, {"": to_records(measurements, memory)}, columns)


def measure_models(
    candidates: Sequence[Candidate], batch: int, options: TimingOptions, inference: bool = True
) -> list[Measurement]:
    """Measure `training` and `inference` (seconds of a batch), and `memory` (bytes per image), of each model.

    A batch is halved until it fits.
    """
    device = candidates[0].device
    passes: dict[tuple[str, str], Callable[[], Any]] = {}
    measurements = []
    for candidate in candidates:
        fitting = timing.try_measure(partial(candidate.largest_batch, batch), device)
        print(f"{candidate.name}: batch {fitting}", file=sys.stderr, flush=True)
        params_m = sum(p.numel() for p in candidate.model.parameters()) / 1e6
        labels = {"model": candidate.name, "batch": batch, "precision": candidate.precision}
        labels["params_m"] = params_m
        measurements.append(Measurement(labels, {}))
        if isinstance(fitting, Missing):
            measurements[-1].values["training"] = fitting
            continue
        labels["batch"] = fitting
        images, targets = candidate.images(fitting)
        passes[candidate.name, "training"] = partial(candidate.train, images, targets)
        if inference:
            passes[candidate.name, "inference"] = partial(candidate.infer, images)
    times = timing.time_interleaved(passes, device, options)
    for candidate, measurement in zip(candidates, measurements):
        measurement.values |= {key: x for (name, key), x in times.items() if name == candidate.name}
        if (candidate.name, "training") in times:
            memory = partial(candidate.memory, measurement.labels["batch"])
            measurement.values["memory"] = timing.try_measure(memory, device)
    return measurements


def to_records(measurements: Sequence[Measurement], memory: str) -> list[dict[str, Any]]:
    """Return the measurements as flat records."""

    def speed(measurement: Measurement, key: str) -> float | None:
        return ratio(measurement.labels.get("batch"), measurement.get(key))

    absent = Measurement({}, {})
    baseline = next((x for x in measurements if x.labels["model"].endswith(f"+{BASELINE}")), absent)
    printed = paper_memory()
    return [
        {
            **x.labels,
            "training_images_per_second": speed(x, "training"),
            "inference_images_per_second": speed(x, "inference"),
            "memory_mb_per_image": x.get("memory", 1e6),
            "memory": memory,
            "training_ratio": ratio(speed(x, "training"), speed(baseline, "training")),
            "inference_ratio": ratio(speed(x, "inference"), speed(baseline, "inference")),
            "memory_ratio": ratio(baseline.get("memory"), x.get("memory")),
            "paper_memory_mb": printed.get(x.labels["model"].partition("+")[0]),
            "note": x.note,
        }
        for x in measurements
    ]


def paper_memory() -> dict[str, float]:
    """Return the MB per image that Table 2 of the paper prints for models of ViL and DeiT."""
    memory_mb = {}
    for row in read_paper_results()["table2"]:
        if "DeiT" in row["model"]:
            memory_mb[f"timm/deit_{row['size']}_patch16_224"] = float(row["memory_mb"])
        for name in (f"vil_{row['size']}", f"vil_{row['size']}_3stage"):
            blocks = tuple(stage[0] for stage in SIZES[name].stages)
            if "longformer" in row["attention"] and tuple(row["blocks"]) == blocks:
                memory_mb[name] = float(row["memory_mb"])
    return memory_mb
