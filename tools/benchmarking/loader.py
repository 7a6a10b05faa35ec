"""tools/benchmark.py loader: images per second of every source, beside timm's loader and the bare decoder."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_dataset, create_loader

from data import build_loaders
from data.beton import Beton
from data.decoding import Picture
from data.ffcv_pipeline import StoredImage, decoder
from data.sources import open_source
from data.transforms import _mend_posterize
from tools.benchmarking.measure import Missing, interleaved
from tools.benchmarking.output import Cell, Figure, factor, sheet
from vil.command_line import COMMAND_LINE
from vil.config import AugmentConfig, ConfigError, DataConfig

RECIPES = {
    "crop": AugmentConfig(),
    "full": AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.25),
}
"""crop: random-resized crop and horizontal flip; full: DeiT's, with RandAugment and random erasing."""
TIMM = "timm"


@dataclass
class Row:
    """What was found: images of a pass, and its seconds or why there is no such figure."""

    recipe: str
    method: str
    images: int
    seconds: float | Missing


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `loader`, beside those of every benchmark."""
    parser.add_argument("--sources", nargs="+", required=True, metavar="SOURCE=ROOT",
                        help="data.source and data.root, as folder=/datasets/imagenet ffcv=/datasets/beton; "
                        "timm's loader reads the folder too")  # fmt: skip
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=tuple(RECIPES),
                        help="crop: crop and flip; full: with RandAugment and random erasing")  # fmt: skip
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)),
                        help="processes or threads that load; default: one per core")  # fmt: skip
    parser.add_argument("--image_size", type=int, default=224, help="side of the crops, in pixels")
    parser.add_argument("--batch", type=int, default=64, help="images of a batch")
    parser.add_argument(
        "--fraction", type=float, default=1.0, help="of the images of each class, to be quick"
    )


def run(arguments: argparse.Namespace, device: torch.device) -> list[Row]:
    """Measures every source with every recipe, the baseline and the decoders; they take turns."""
    sources = [_source(text) for text in arguments.sources]
    kinds = [source for source, _ in sources]
    for key in ("workers", "batch", "image_size"):
        if getattr(arguments, key) < 1:
            raise ConfigError(COMMAND_LINE, f"--{key} must be at least 1, got {getattr(arguments, key)}")
    if not 0 < arguments.fraction <= 1:
        raise ConfigError(COMMAND_LINE, f"--fraction must be above 0, up to 1, got {arguments.fraction}")
    passes: dict[tuple[str, str], Callable[[], int]] = {}
    for source, root in sources:
        label = source if kinds.count(source) == 1 else f"{source} {Path(root).name}"
        data = DataConfig(
            source=source, root=root, workers=arguments.workers, train_fraction=arguments.fraction
        )
        for recipe in arguments.recipes:
            passes[recipe, label] = _ours(data, RECIPES[recipe], arguments, device)
            if source == "folder" and (recipe, TIMM) not in passes:
                passes[recipe, TIMM] = _timms(data, RECIPES[recipe], arguments, device)
        if source in ("folder", "ffcv"):
            passes["decoding", f"{label}'s JPEGs"] = _decoder(data, arguments)
    counts: dict[tuple[str, str], int] = {}

    def counted(key: tuple[str, str]) -> Callable[[], None]:
        def count() -> None:
            counts[key] = passes[key]()

        return count

    seconds = interleaved(
        {key: counted(key) for key in passes},
        device=device,
        repeats=arguments.repeats,
        seconds=arguments.seconds,
        fastest=arguments.fastest,
    )
    return [Row(*key, counts.get(key, 0), seconds[key]) for key in sorted(passes, key=_place)]


def _place(key: tuple[str, str]) -> tuple[int, bool]:
    return [*RECIPES, "decoding"].index(key[0]), key[1] == TIMM


def _source(text: str) -> tuple[str, str]:
    source, equals, root = text.partition("=")
    if not equals or not root:
        raise ConfigError(COMMAND_LINE, f"--sources: expected SOURCE=ROOT, got {text!r}")
    return source, root


def _ours(
    data: DataConfig, augment: AugmentConfig, arguments: argparse.Namespace, device: torch.device
) -> Callable[[], int]:
    loader = build_loaders(
        data,
        augment,
        image_size=arguments.image_size,
        in_chans=3,
        batch_size=arguments.batch,
        accumulation=1,
        seed=0,
        device=device,
    ).train
    epochs = iter(range(2**31))
    return lambda: _images(loader.epoch(next(epochs)))


def _timms(
    data: DataConfig, augment: AugmentConfig, arguments: argparse.Namespace, device: torch.device
) -> Callable[[], int]:
    """timm's loader with its prefetcher and persistent workers, as its train.py builds it."""
    dataset = create_dataset("", str(Path(data.root or "") / data.train_split))
    dataset.reader.samples = dataset.reader.samples[:: max(1, round(1 / arguments.fraction))]
    loader = create_loader(
        dataset,
        (3, arguments.image_size, arguments.image_size),
        arguments.batch,
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
    for step in loader.dataset.transform.transforms:
        _mend_posterize(step)  # which fails with Pillow 13
    return lambda: _images(loader)


def _images(batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> int:
    return sum(len(targets) for _, targets in batches)


def _decoder(data: DataConfig, arguments: argparse.Namespace) -> Callable[[], int]:
    """libjpeg-turbo alone, in as many threads: all pixels of every JPEG, as it is stored, from memory."""
    images: Sequence[Picture | StoredImage]
    if data.source == "ffcv":
        decoder()
        beton = Beton(Path(data.root or "") / f"{data.train_split}.beton")
        images = [StoredImage(beton, index) for index, raw in enumerate(beton.raw) if not raw]
    else:
        source = open_source(data, "train", 3)
        try:
            images = [source.picture(index) for index in range(len(source))]
        except OSError as error:
            raise ConfigError("data.root", f"{error.filename}: cannot be read: {error.strerror}") from None
    chosen = range(0, len(images), max(1, round(1 / arguments.fraction)))
    pool = ThreadPoolExecutor(arguments.workers)

    def decode(picture: Picture | StoredImage) -> int:
        return min(1, picture.pixels().size)

    return lambda: sum(pool.map(decode, (images[index] for index in chosen)))


def records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One flat record per row."""
    speeds = {(row.recipe, row.method): _speed(row) for row in rows}
    return [
        {
            "recipe": row.recipe,
            "method": row.method,
            "images": row.images,
            "images_per_second": _speed(row),
            "times_timm": factor(_speed(row), speeds.get((row.recipe, TIMM))),
            "share_of_originals": factor(_speed(row), speeds.get(("decoding", "folder's JPEGs"))),
            "share_of_decoder": factor(_speed(row), speeds.get(("decoding", f"{row.method}'s JPEGs"))),
            "note": row.seconds.reason if isinstance(row.seconds, Missing) else None,
        }
        for row in rows
    ]


def _speed(row: Row) -> float | None:
    return None if isinstance(row.seconds, Missing) else row.images / row.seconds


COLUMNS: Mapping[str, Cell] = {
    "source": ("method", str),
    "images/s": ("images_per_second", "{:.0f}".format),
    "× timm": ("times_timm", "{:.2f}".format),
    "of decoding the originals": ("share_of_originals", "{:.2f}".format),
    "of decoding its own JPEGs": ("share_of_decoder", "{:.2f}".format),
}


def tables(found: Sequence[Mapping[str, Any]]) -> str:
    """One table per recipe."""
    recipes = dict.fromkeys(record["recipe"] for record in found)
    return "\n\n".join(
        f"**{recipe}**\n\n{sheet([r for r in found if r['recipe'] == recipe], COLUMNS)}" for recipe in recipes
    )


def figures(found: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """A panel of bars per recipe."""
    return [
        Figure(
            f"{recipe}: images/s",
            "",
            {
                r["method"]: [(0.0, r["images_per_second"])]
                for r in found
                if r["recipe"] == recipe and r["images_per_second"] is not None
            },
        )
        for recipe in dict.fromkeys(record["recipe"] for record in found)
    ]


def mean_size(root: str, split: str = "train") -> str:
    """The images of a folder in words: how many, and their mean size."""
    data = DataConfig(source="folder", root=root, train_split=split)
    source = open_source(data, "train", 3)
    sample = range(0, len(source), max(1, len(source) // 256))
    started, pixels, size, count = time.perf_counter(), 0, 0, 0
    for index in sample:
        path = source.describe(index)
        try:
            with Image.open(path) as image:
                pixels += image.width * image.height
        except OSError:  # a pass over the images has said so
            continue
        size += os.path.getsize(path)
        count += 1
        if time.perf_counter() - started > 10:
            break
    count = max(1, count)
    return f"{len(source):,} images of {pixels / count / 1e6:.2f} megapixels and {size / count / 1e3:.0f} kB"
