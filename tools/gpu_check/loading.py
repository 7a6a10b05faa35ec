"""Section `loading`: overlap of loader and GPU, and augmentation on the GPU against Pillow."""

from __future__ import annotations

import os
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment

from data.batch_augment import Operation, apply_to_batch, apply_to_image
from data.decoding import image_extensions
from data.workers import limit_workers
from tools.benchmarks.loader import train_loader
from tools.benchmarks.models import Candidate
from tools.benchmarks.timing import seconds_per_call, synchronize
from tools.gpu_check.report import Report
from tools.gpu_check.runner import Options
from vil.config import AugmentConfig, DataConfig

IMAGE_SIDE, IMAGES = 48, 16
MIN_STEPS = 40
"""Steps for which the loader is timed, rounded up to a multiple of the workers."""
RESAMPLING = {"resample": Image.Resampling.BICUBIC, "fillcolor": (124, 116, 104)}
GEOMETRIC = {"shear_x": 0.2, "translate_y_rel": 0.3, "rotate": 25.0}
OPERATIONS = {
    name: Operation(getattr(auto_augment, name), arguments, RESAMPLING if name in GEOMETRIC else {})
    for name, arguments in {
        **dict.fromkeys(("brightness", "contrast", "color", "sharpness"), (1.4,)),
        **{name: (value,) for name, value in GEOMETRIC.items()},
        **{"posterize": (4,), "solarize": (100,)},
        **dict.fromkeys(("invert", "auto_contrast", "equalize"), ()),
    }.items()
}


def run(options: Options, report: Report) -> None:
    """Compare augmentation with Pillow; then time the loader, the model, and both together."""
    device = torch.device(options.device)
    rng = np.random.default_rng(0)
    images = [_random_shapes(rng, IMAGE_SIDE, IMAGE_SIDE) for _ in range(IMAGES)]
    for name, step in OPERATIONS.items():
        ours = apply_to_batch(_to_batch(images).to(device), [[step]] * IMAGES).cpu().int()
        theirs = _to_batch([apply_to_image(image, [step]) for image in images]).int()
        different = ((ours - theirs).abs() > 1).float().mean().item()
        limit = 0.003 if name in GEOMETRIC else 0.0  # coordinates on a pixel's edge are rounded either way
        report.check(f"pixels of {name} unlike Pillow's", different, limit, shown=False)
    _time_overlap(options, report)


def _to_batch(images: list[Image.Image]) -> torch.Tensor:
    batch = torch.from_numpy(np.stack([np.asarray(image) for image in images]))  # (B, H, W, 3)
    return batch.permute(0, 3, 1, 2).contiguous()


def _time_overlap(options: Options, report: Report) -> None:
    device = torch.device(options.device)
    root = options.images or _write_images(options.folder / "images", 32 if options.is_small else 512)
    batch, size = (4, 64) if options.is_small else (128, 224)
    workers = 0 if options.is_small else limit_workers(max(1, (os.cpu_count() or 1) - 1))
    # Workers that start together finish their batches at about the same time: time whole rounds.
    steps = 2 if options.is_small else -(-MIN_STEPS // workers) * workers
    repeated = _repeat_images(root, options.folder / "repeated", batch * (steps + 1))
    data = DataConfig(
        source="folder", root=str(repeated), train_split="train", val_split="train", workers=workers
    )
    loader = train_loader(data, AugmentConfig(), size, batch, device)
    candidate = Candidate("vil_tiny", size, device, "float32" if options.is_small else "bfloat16")
    images, targets = candidate.images(batch)

    def seconds_per_step(train: bool) -> float:
        """Return the mean duration of a step that loads a batch, without the first one."""
        start = 0.0
        for done, (loaded, _) in enumerate(islice(loader.epoch(0), steps + 1)):
            if train:
                candidate.train(loaded, targets)
            if done == 0:
                synchronize(device)
                start = time.perf_counter()
        synchronize(device)
        return (time.perf_counter() - start) / steps

    candidate.train(images, targets)
    load = seconds_per_step(train=False)
    compute = seconds_per_call(lambda: candidate.train(images, targets), steps, device)
    both = seconds_per_step(train=True)
    report.add("loader alone", batch / load, "images/s", note=f"{workers} workers, {root}")
    report.add("vil_tiny alone", batch / compute, "images/s")
    note = f"{batch / both:.0f} images/s"
    report.add("both, relative to the slower", 100 * max(load, compute) / both, "%", target="95", note=note)


def _repeat_images(root: Path, folder: Path, count: int) -> Path:
    """Return `root` if train/ has at least `count` images, else a new folder with several links to each.

    An epoch of fewer batches than workers would leave workers without work.
    """
    extensions = image_extensions()
    files = (Path(path, name) for path, _, names in os.walk(root / "train") for name in sorted(names))
    images = list(islice((file for file in files if file.suffix.lower() in extensions), count))
    if not images or len(images) == count:  # the loader reports that there are none
        return root
    for number in range(count):
        image = images[number % len(images)]
        link = folder / "train" / image.relative_to(root / "train").parts[0] / f"{number}{image.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(image.resolve())
    return folder


def _random_shapes(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height))


def _write_images(folder: Path, count: int) -> Path:
    """Write JPEGs of two classes with the size of ImageNet's: noise on large shapes."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / "train" / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        shapes = np.asarray(_random_shapes(rng, 500, 375), dtype=np.int16)
        pixels = shapes + rng.integers(-8, 9, shapes.shape)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return folder
