"""Section `loading`: does the loader hide behind the GPU, and does it augment as Pillow does?"""

from __future__ import annotations

import os
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment

from data import build_loaders
from data.batch_augment import Step, on_batch, on_image
from tools.benchmarking import measure
from tools.benchmarking.models import Candidate
from tools.gpu_check.report import Report
from tools.gpu_check.runner import Options
from vil.config import AugmentConfig, DataConfig, Precision

SIDE, COUNT = 48, 16


def run(options: Options, report: Report) -> None:
    """Time the loader, the model and both together; then compare augmentation on the device with Pillow."""
    _compare_with_pillow(options, report)
    _overlap(options, report)


def _overlap(options: Options, report: Report) -> None:
    device = torch.device(options.device)
    root = options.images or _made_up(options.folder / "images", 32 if options.small else 512)
    batch, size = (4, 64) if options.small else (128, 224)
    workers = 0 if options.small else max(1, (os.cpu_count() or 1) - 1)
    data = DataConfig(
        source="folder", root=str(root), train_split="train", val_split="train", workers=workers
    )
    loader = build_loaders(
        data,
        AugmentConfig(),
        image_size=size,
        in_chans=3,
        batch_size=batch,
        accumulation=1,
        seed=0,
        device=device,
    ).train
    precision: Precision = "float32" if options.small else "bfloat16"
    candidate = Candidate("vil_tiny", Namespace(image_size=size, compile=False), device, precision)
    images, _ = candidate.images(batch)
    targets = torch.zeros(batch, dtype=torch.int64, device=device)
    steps = 2 if options.small else 40

    def epochs(train: bool) -> float:
        """Seconds of a step with images from the loader, after a first one."""
        began, done, epoch = 0.0, -1, 0
        while done < steps:
            for loaded, _ in loader.epoch(epoch):
                if train:
                    candidate.train(loaded, targets[: len(loaded)])
                done += 1
                if done == 0:
                    measure.synchronize(device)
                    began = time.perf_counter()
                if done == steps:
                    break
            epoch += 1
        measure.synchronize(device)
        return (time.perf_counter() - began) / steps

    candidate.train(images, targets)
    alone = epochs(train=False)
    compute = measure.seconds_of(lambda: candidate.train(images, targets), steps, device)
    both = epochs(train=True)
    report.add("loader alone", batch / alone, "images/s", note=f"{workers} workers, {root}")
    report.add("vil_tiny alone", batch / compute, "images/s")
    slower = max(alone, compute)
    report.add(
        "both, of the slower one", 100 * slower / both, "%", target="95", note=f"{batch / both:.0f} images/s"
    )


def _made_up(folder: Path, count: int) -> Path:
    """JPEGs of two classes, of the size that ImageNet's have: noise on large shapes."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / "train" / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        shapes = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((500, 375))
        pixels = np.asarray(shapes, dtype=np.int16) + rng.integers(-8, 9, (375, 500, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return folder


def _compare_with_pillow(options: Options, report: Report) -> None:
    """Operations of RandAugment on a batch, on the device, against Pillow on each image."""
    device = torch.device(options.device)
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((SIDE, SIDE))
        for _ in range(COUNT)
    ]
    options_of_moves = {"resample": Image.Resampling.BICUBIC, "fillcolor": (124, 116, 104)}
    names = ("brightness", "contrast", "color", "sharpness", "shear_x", "translate_y_rel", "rotate")
    values = {"shear_x": 0.2, "translate_y_rel": 0.3, "rotate": 25.0}
    plain = {"posterize": (4,), "solarize": (100,), "invert": (), "auto_contrast": (), "equalize": ()}
    steps = {name: Step(getattr(auto_augment, name), (values.get(name, 1.4),)) for name in names}
    steps |= {name: Step(getattr(auto_augment, name), arguments) for name, arguments in plain.items()}
    for name in values:
        steps[name] = steps[name]._replace(options=options_of_moves)

    def batched(found: list[Image.Image]) -> torch.Tensor:
        return (
            torch.from_numpy(np.stack([np.asarray(image) for image in found]))
            .permute(0, 3, 1, 2)
            .contiguous()
        )

    for name, step in steps.items():
        planned = [[step]] * COUNT
        ours = on_batch(batched(images).to(device), planned).cpu().int()
        theirs = batched([on_image(image, [step]) for image in images]).int()
        far = ((ours - theirs).abs() > 1).float().mean().item()
        limit = (
            0.003 if name in values else 0.0
        )  # a coordinate on the edge of a pixel may fall to either side
        report.check(f"pixels of {name} unlike Pillow's", far, limit, shown=False)
