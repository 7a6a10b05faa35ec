"""Benchmark of data loaders: images per second of every source, of timm's loader and of the JPEG decoder."""

from __future__ import annotations

import itertools
import os
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_dataset, create_loader

from data import build_loaders
from data.beton import Beton
from data.decoding import EncodedImage
from data.ffcv_loader import StoredImage, load_decoder
from data.policies import patch_posterize
from data.sources import open_source
from data.sources.subsets import select_subset
from tools.benchmarks.options import positive
from tools.benchmarks.output import Column, Results, ratio
from tools.benchmarks.timing import Measurement, TimingOptions, time_interleaved
from vil.command_line import bounded_int
from vil.config import AugmentConfig, DataConfig, ModelConfig, Precision, ScheduleConfig, TrainConfig
from vil.errors import COMMAND_LINE, UserError
from vil.runtime.distributed import Process

RECIPES = {
    "crop": AugmentConfig(),
    "full": AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.25),
}
"""crop: random-resized crop and horizontal flip; full: DeiT's, with RandAugment and random erasing."""
DECODING = "decoding"
TIMM = "timm"
COLUMNS = (
    Column("source", "method"),
    Column("images/s", "images_per_second", "{:.0f}"),
    Column("× timm", "times_timm", "{:.2f}"),
    Column("of decoding the originals", "share_of_originals", "{:.2f}"),
    Column("of decoding its own JPEGs", "share_of_decoder", "{:.2f}"),
)


def add_options(parser: ArgumentParser) -> None:
    """Add the options of `benchmark.py loader`."""
    add = parser.add_argument
    sources_help = "data.source and data.root, as folder=/datasets/imagenet; timm's loader reads folders too"
    add("--sources", nargs="+", required=True, type=_source, metavar="SOURCE=ROOT", help=sources_help)
    recipes_help = "crop: crop and flip; full: with RandAugment and random erasing"
    add("--recipes", nargs="+", choices=RECIPES, default=tuple(RECIPES), help=recipes_help)
    workers_help = "processes or threads of a loader; default: one per core"
    add("--workers", type=bounded_int(1), default=len(os.sched_getaffinity(0)), help=workers_help)
    add("--image-size", type=bounded_int(1), default=224, help="side of the crops, in pixels")
    add("--batch-size", type=bounded_int(1), default=64, help="images of a batch")
    add("--fraction", type=positive, default=1.0, help="fraction of the images of each class")


def _source(text: str) -> tuple[str, str]:
    source, _, root = text.partition("=")
    if not root:
        raise ArgumentTypeError(f"expected SOURCE=ROOT, got {text!r}")
    return source, root


def run(arguments: Namespace, device: torch.device, _: Precision) -> Results:
    """Measure every source with every recipe, timm's loader and the decoders, interleaved."""
    if arguments.fraction > 1:
        raise UserError(COMMAND_LINE, f"--fraction must be at most 1, got {arguments.fraction:g}")
    epochs: dict[tuple[str, str], Callable[[], int]] = {}
    names = [source for source, _ in arguments.sources]
    for source, root in arguments.sources:
        label = source if names.count(source) == 1 else f"{source} {Path(root).name}"
        workers, fraction = arguments.workers, arguments.fraction
        data = DataConfig(source=source, root=root, workers=workers, train_fraction=fraction)
        for recipe in arguments.recipes:
            loader = train_loader(data, RECIPES[recipe], arguments.image_size, arguments.batch_size, device)
            epochs[recipe, label] = partial(_next_epoch, loader, itertools.count())
            if source == "folder" and (recipe, TIMM) not in epochs:
                epochs[recipe, TIMM] = _timm_epoch(data, RECIPES[recipe], arguments, device)
        if source in ("folder", "ffcv"):
            epochs[DECODING, f"{label}'s JPEGs"] = _decoder_epoch(data, arguments)
    options = TimingOptions(arguments.repeats, arguments.seconds)
    measurements = measure_loaders(epochs, device, options)
    tables: dict[str, list[Any]] = {}
    for record in to_records(measurements):
        tables.setdefault(f"**{record['recipe']}**", []).append(record)
    notes = [
        *(f"- folder: {describe_images(root)}." for source, root in arguments.sources if source == "folder"),
        f"- {arguments.workers} workers, batches of {arguments.batch_size}, {arguments.image_size}² pixels. "
        f"{options}, of one epoch each.",
        "- crop: random-resized crop, flip; full: and rand-m9-mstd0.5-inc1, random erasing 0.25.",
        "- decoding: libjpeg-turbo alone, all pixels of the stored JPEGs, from memory, in as many threads.",
    ]
    return Results(notes, tables, COLUMNS, has_failed=any(x.has_failed for x in measurements))


def train_loader(
    data: DataConfig, augment: AugmentConfig, image_size: int, batch_size: int, device: torch.device
) -> Any:
    """Return the training loader of the project for RGB images."""
    config = TrainConfig(
        model=ModelConfig(image_size=image_size),
        schedule=ScheduleConfig(batch_size=batch_size, accumulation=1, augment=augment),
        data=data,
    )
    return build_loaders(config, Process(rank=0, local_rank=0, world_size=1, device=device)).train


def _timm_epoch(
    data: DataConfig, augment: AugmentConfig, arguments: Namespace, device: torch.device
) -> Callable[[], int]:
    """Build timm's loader of the same images with prefetcher and persistent workers, as its train.py."""
    source = select_subset(open_source(data, "train", 3), data)
    paths = {source.describe(index) for index in range(len(source))}
    dataset = create_dataset("", str(Path(data.root or "") / data.train_split))
    dataset.reader.samples = [sample for sample in dataset.reader.samples if sample[0] in paths]
    loader = create_loader(
        dataset,
        (3, arguments.image_size, arguments.image_size),
        arguments.batch_size,
        is_training=True,
        use_prefetcher=True,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        color_jitter=augment.color_jitter or None,  # type: ignore[arg-type]
        auto_augment=augment.auto_augment,
        re_prob=augment.random_erasing,
        re_mode=augment.random_erasing_mode,
        interpolation=augment.interpolation,
        num_workers=data.workers,
        pin_memory=device.type == "cuda",
        device=device,
        persistent_workers=True,
    )
    for transform in loader.dataset.transform.transforms:
        patch_posterize(transform)  # fails with Pillow 13
    return lambda: _count_images(loader)


def _next_epoch(loader: Any, numbers: Iterator[int]) -> int:
    return _count_images(loader.epoch(next(numbers)))


def _count_images(batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> int:
    return sum(len(targets) for _, targets in batches)


def _decoder_epoch(data: DataConfig, arguments: Namespace) -> Callable[[], int]:
    """Decode by libjpeg-turbo alone: all pixels of the stored JPEGs, from memory, one thread per worker."""
    images: Sequence[EncodedImage | StoredImage]
    if data.source == "ffcv":
        load_decoder()
        beton = Beton(Path(data.root or "") / f"{data.train_split}.beton")
        encoded = [index for index, raw in enumerate(beton.raw) if not raw]
        images = [StoredImage(beton, index) for index in encoded[:: max(1, round(1 / arguments.fraction))]]
    else:
        source = select_subset(open_source(data, "train", 3), data)
        try:
            images = [source.read(index) for index in range(len(source))]
        except OSError as error:
            raise UserError("data.root", f"{error.filename}: cannot be read: {error.strerror}") from None
    pool = ThreadPoolExecutor(arguments.workers)
    return lambda: sum(pool.map(lambda image: min(1, image.decode().size), images))


def measure_loaders(
    epochs: dict[tuple[str, str], Callable[[], int]], device: torch.device, options: TimingOptions
) -> list[Measurement]:
    """Measure the seconds of each epoch (by recipe and method), a function that returns its images."""
    counts = dict.fromkeys(epochs, 0)

    def count(key: tuple[str, str]) -> None:
        counts[key] = epochs[key]()

    seconds = time_interleaved({key: partial(count, key) for key in epochs}, device, options)
    order = sorted(epochs, key=lambda key: ([*RECIPES, DECODING].index(key[0]), key[1] == TIMM))
    return [
        Measurement({"recipe": key[0], "method": key[1], "images": counts[key]}, {"epoch": seconds[key]})
        for key in order
    ]


def to_records(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Return the measurements as flat records."""
    keys = [(x.labels["recipe"], x.labels["method"]) for x in measurements]
    speeds = {key: ratio(x.labels["images"], x.get("epoch")) for key, x in zip(keys, measurements)}
    return [
        {
            **x.labels,
            "images_per_second": speeds[recipe, method],
            "times_timm": ratio(speeds[recipe, method], speeds.get((recipe, TIMM))),
            "share_of_originals": ratio(speeds[recipe, method], speeds.get((DECODING, "folder's JPEGs"))),
            "share_of_decoder": ratio(speeds[recipe, method], speeds.get((DECODING, f"{method}'s JPEGs"))),
            "note": x.note,
        }
        for (recipe, method), x in zip(keys, measurements)
    ]


def describe_images(root: str) -> str:
    """Return the number of images in a folder and their mean size, from a sample of at most 10 seconds."""
    source = open_source(DataConfig(source="folder", root=root), "train", 3)
    deadline = time.perf_counter() + 10
    sizes = []
    for index in range(0, len(source), max(1, len(source) // 256)):
        path = source.describe(index)
        try:
            with Image.open(path) as image:
                sizes.append((image.width * image.height, os.path.getsize(path)))
        except OSError:  # reported by the loader
            continue
        if time.perf_counter() > deadline:
            break
    pixels, size = (sum(values) / len(sizes) for values in zip(*sizes)) if sizes else (0.0, 0.0)
    return f"{len(source):,} images of {pixels / 1e6:.2f} megapixels and {size / 1e3:.0f} kB on average"
