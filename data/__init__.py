"""Data: images from a source, through transforms, in batches that are the same however they are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data.bad_images import BadImages
from data.ffcv_pipeline import FFCVTrainLoader, build_micro_batches, reads_ffcv
from data.loaders import EvaluationImages, TrainingViews, TrainLoader, ValidationLoader
from data.mixing import Mixing, check_pairs, mixes
from data.real_labels import ForeignImagesError, RelabelledImages
from data.sizes import EpochLoader, SizedLoader
from data.sources import Source, open_source
from data.subsets import chosen
from data.transforms import evaluation_transform, train_transform
from vil.config import AugmentConfig, ConfigError, DataConfig

__all__ = ["ForeignImagesError", "Loaders", "Mixing", "Validation", "build_loaders", "build_validation"]

MOST_WORKERS = 1024
"""Processes per rank that load images."""


@dataclass
class Validation:
    """A validation set: its loader and its classes, in the order of their indices."""

    loader: ValidationLoader
    num_classes: int
    class_names: tuple[str, ...]


@dataclass
class Loaders:
    """The loaders, the number of training images and the classes, by index, that training needs."""

    train: EpochLoader
    validation: ValidationLoader
    num_classes: int
    class_names: tuple[str, ...]
    train_images: int


def build_loaders(
    data: DataConfig,
    augment: AugmentConfig,
    *,
    image_size: int,
    in_chans: int,
    batch_size: int,
    accumulation: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    channels_last: bool = False,
    folder: Path | None = None,
    sizes: Sequence[tuple[float, int]] | None = None,
    epochs: int = 1,
) -> Loaders:
    """Opens both splits of a data set and builds their loaders.

    Args:
        data: the data set.
        augment: how training images are changed (mixing is `Mixing`'s part).
        image_size: side of the images, in pixels.
        in_chans: 3 for RGB, 1 for grey.
        batch_size: images per optimiser step over all ranks and accumulation steps; validation takes as
            many at a time as one of its parts.
        accumulation: micro-batches per step and rank.
        seed: of the order and the augmentation.
        rank: of this process.
        world_size: number of processes.
        device: where the batches are wanted.
        channels_last: lay the images out channels-last.
        folder: of the run, for its list of images that cannot be read.
        sizes: (fraction of the epochs, side of the training images in pixels), in place of image_size.
        epochs: length of the run.

    Raises:
        ConfigError: something of it cannot be, or the data set is not as the configuration says.
    """
    device = torch.device(device)
    source = chosen(open_source(data, "train", in_chans), data)
    parts = (batch_size, accumulation, seed, augment.repeats, rank, world_size)
    micro_batches = build_micro_batches(source, data.ffcv_order, *parts)
    if mixes(augment):
        check_pairs(micro_batches.micro_batch_size)
    validation = build_validation(
        data,
        image_size=image_size,
        in_chans=in_chans,
        batch_size=micro_batches.micro_batch_size,
        rank=rank,
        world_size=world_size,
        device=device,
        channels_last=channels_last,
    )
    if validation.class_names != source.class_names:
        raise ConfigError("data.val_split", _difference(source.class_names, validation.class_names))
    bad_images = BadImages(len(source), data.max_bad, folder)

    def build(side: int) -> EpochLoader:
        transform = train_transform(augment, data, image_size=side, in_chans=in_chans)
        on_gpu = device.type == "cuda"  # which normalises and erases for the workers
        views = TrainingViews(source, transform, seed, data.on_error, normalised=not on_gpu, planned=on_gpu)
        kind = FFCVTrainLoader if reads_ffcv(views) else TrainLoader
        return kind(views, micro_batches, data.workers, device, channels_last, bad_images)

    return Loaders(
        build(image_size) if sizes is None else SizedLoader(build, sizes, epochs),
        validation.loader,
        validation.num_classes,
        validation.class_names,
        len(source),
    )


def build_validation(
    data: DataConfig,
    *,
    image_size: int,
    in_chans: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    channels_last: bool = False,
) -> Validation:
    """Opens the validation split alone and builds its loader; no training split is needed.

    Args:
        data: the data set.
        image_size: side of the images, in pixels.
        in_chans: 3 for RGB, 1 for grey.
        batch_size: images per batch of this rank.
        rank: of this process.
        world_size: number of processes.
        device: where the batches are wanted.
        channels_last: lay the images out channels-last.

    Raises:
        ConfigError: something of it cannot be, or the data set is not as the configuration says.
    """
    if batch_size < 1:
        raise ConfigError("batch_size", f"expected at least 1, got {batch_size}")
    if not 0 <= data.workers <= MOST_WORKERS:
        raise ConfigError("data.workers", f"expected 0 to {MOST_WORKERS:,}, got {data.workers}")
    transform = evaluation_transform(data, image_size=image_size, in_chans=in_chans)
    source: Source = open_source(data, "val", in_chans)
    on_gpu = torch.device(device).type == "cuda"
    images: EvaluationImages = EvaluationImages(source, transform, normalised=not on_gpu)
    if data.real_labels is not None:
        images = RelabelledImages(images, data.real_labels)
    loader = ValidationLoader(
        images,
        batch_size,
        data.workers,
        torch.device(device),
        channels_last,
        rank,
        world_size,
        data.on_error,
    )
    return Validation(loader, len(source.class_names), source.class_names)


def _difference(train: tuple[str, ...], validation: tuple[str, ...]) -> str:
    place = next((i for i, pair in enumerate(zip(train, validation)) if pair[0] != pair[1]), None)
    if place is None:
        return f"it has {len(validation)} classes, the training split has {len(train)}"
    return f"its class {place} is {validation[place]!r}, but {train[place]!r} in the training split"
