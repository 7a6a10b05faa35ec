"""The input pipeline: sources of images, transforms, and loaders of batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.eval_sets import errors_in_eval_set, eval_set_data, eval_set_names, match_eval_set
from data.ffcv_loader import FFCVTrainLoader, build_micro_batches, uses_ffcv
from data.fingerprint import check_same_images
from data.loaders import (
    EvaluationImages,
    LoaderOptions,
    MicroBatchLoader,
    TrainingViews,
    TrainLoader,
    ValidationLoader,
)
from data.mixing import Mixing
from data.order import ORDER_VERSION
from data.outputs import refuse_images_as_outputs
from data.progressive_resizing import ProgressiveResizingLoader
from data.random_sizes import RandomSizesLoader
from data.real_labels import NotImageNetError, RealLabelImages, check_same_real_labels
from data.samplers import MicroBatches
from data.sources import Source, check_root, dataset_name, open_source
from data.sources.folder import class_folder_options
from data.sources.held_out import has_held_out_images, read_split, write_split
from data.sources.subsets import ImageList, select_subset
from data.transforms import evaluation_transform, train_transform, tta_transform
from data.unreadable_images import UnreadableImages
from data.workers import limit_workers
from vil.config import DataConfig, EvalConfig, Size, TrainConfig
from vil.errors import UserError, errors_in_option
from vil.runtime.distributed import Process, call_on_main
from vil.runtime.epoch_steps import Phase, training_phases

__all__ = [
    "Loaders",
    "Mixing",
    "NotImageNetError",
    "Validation",
    "build_loaders",
    "build_training_images",
    "build_validation",
    "check_root",
    "check_same_classes",
    "check_same_images",
    "check_same_real_labels",
    "class_folder_options",
    "dataset_name",
    "open_eval_sets",
    "refuse_images_as_outputs",
]


@dataclass
class Validation:
    """A validation set: its name in results, this rank's batches, its classes by index, and its images."""

    name: str
    loader: ValidationLoader
    class_names: tuple[str, ...]
    source: Source


@dataclass
class Loaders:
    """This rank's batches in a training run, the classes by index, and the size of the training set.

    Attributes:
        class_counts: training images of each class, over all ranks.
        train_images: training images, over all ranks.
        train_source: the training images.
        validation_source: the validation images.
        order_version: version of the order of the training images, which a checkpoint stores.
        data: the section of the configuration.
    """

    train: MicroBatchLoader | ProgressiveResizingLoader
    validation: ValidationLoader
    class_names: tuple[str, ...]
    class_counts: list[int]
    train_images: int
    train_source: Source
    validation_source: Source
    order_version: int
    data: DataConfig

    def write_split(self, folder: Path) -> None:
        """Write the names of the images that are held out to split.txt in a run's folder, if there are any.

        Raises:
            UserError: a name contains a line break, or the file cannot be written.
        """
        if has_held_out_images(self.data):
            write_split(folder, self.validation_source, self.data)


def build_loaders(
    config: TrainConfig, process: Process, is_new: bool = True, order_version: int = ORDER_VERSION
) -> Loaders:
    """Open both splits of a data set and build their loaders.

    Unreadable images are listed in the folder `config.output`. Validation batches have the size of a
    micro-batch. A run that continues (not `is_new`) keeps the validation images that it has held out, and the
    order of its training images, `order_version`.

    Raises:
        UserError: the options do not fit one another or the data set, or a file is missing or invalid.
    """
    data, schedule, model = config.data, config.schedule, config.model
    folder = None if config.output is None else Path(config.output)
    stored_split = None
    if has_held_out_images(data) and folder is not None and not is_new:
        stored_split = call_on_main(lambda: read_split(folder, data))  # others may not see rank 0's folder
    source = select_subset(open_source(data, "train", model.in_chans, stored_split), data)
    micro_batches = build_micro_batches(config, source, process, schedule.batch_size, order_version)
    batch_size, channels_last = micro_batches.micro_batch_size, config.channels_last
    eval_config = EvalConfig(model=model, data=data, batch_size=batch_size, channels_last=channels_last)
    validation = build_validation(eval_config, process, stored_split)
    check_same_classes(source.class_names, validation.class_names)
    unreadable_images = UnreadableImages(len(source), data.max_unreadable_fraction, folder)
    loader_class = FFCVTrainLoader if uses_ffcv(config, source, process) else TrainLoader

    options = LoaderOptions(limit_workers(data.workers), process.device, config.channels_last)

    def build_views(size: int | Size) -> TrainingViews:
        transform = train_transform(schedule.augment, data, image_size=size, in_chans=model.in_chans)
        return TrainingViews(source, transform, config.seed, data.unreadable_images, order_version)

    def build(size: int | Size, micro_batches: MicroBatches) -> MicroBatchLoader:
        return loader_class(build_views(size), micro_batches, options, unreadable_images)

    def build_phase(phase: Phase) -> MicroBatchLoader:
        with _errors_in_progressive_resizing():
            batches = build_micro_batches(config, source, process, phase.batch_size, order_version)
            return build(phase.image_size, batches)

    train: MicroBatchLoader | ProgressiveResizingLoader
    if schedule.random_sizes is not None:
        if schedule.progressive_resizing is not None:
            reason = "cannot be combined with schedule.progressive_resizing"
            raise UserError("schedule.random_sizes", reason)
        sized = [build_views(size) for size in schedule.random_sizes]
        train = RandomSizesLoader(sized, micro_batches, options, unreadable_images)
    elif schedule.progressive_resizing is not None:
        train = ProgressiveResizingLoader(build_phase, training_phases(schedule, model.size))
    else:
        train = build(model.size, micro_batches)
    return Loaders(
        train,
        validation.loader,
        validation.class_names,
        np.bincount(source.targets, minlength=len(source.class_names)).tolist(),
        len(source),
        source,
        validation.source,
        order_version,
        data,
    )


def build_validation(
    config: EvalConfig,
    process: Process,
    stored_split: ImageList | None = None,
    persistent_workers: bool = True,
) -> Validation:
    """Open the validation split alone and build its loader; the training split is not needed.

    Args:
        config: the data set, image size and channels of the model, batch size per rank and order of channels.
        process: this process.
        stored_split: validation images of a run that continues, if they are held out of the training split.
        persistent_workers: keep the processes that load images for the next pass.

    Raises:
        NotImageNetError: the images are not those of `data.real_labels`.
    """
    source = open_source(config.data, "val", config.model.in_chans, stored_split)
    return _evaluation_images(config, source, process, persistent_workers)


def build_training_images(config: EvalConfig, process: Process) -> Validation:
    """Open the training split with the evaluation transform, without augmentation, in its order.

    The options of `data` that select training images apply; the arguments are those of `build_validation`.
    """
    source = select_subset(open_source(config.data, "train", config.model.in_chans), config.data)
    data = replace(config.data, real_labels=None)
    return _evaluation_images(replace(config, data=data), source, process)


def _evaluation_images(
    config: EvalConfig, source: Source, process: Process, persistent_workers: bool = True
) -> Validation:
    """Return the images of a source with the evaluation transform, and their loader."""
    data, model = config.data, config.model
    if config.tta == "none" and config.tta_scales == [1.0]:
        transform = evaluation_transform(data, image_size=model.size, in_chans=model.in_chans)
    else:
        transform = tta_transform(config)
    images = EvaluationImages(source, transform)
    if data.real_labels is not None:
        images = RealLabelImages(images, data.real_labels)
    options = LoaderOptions(
        limit_workers(data.workers), process.device, config.channels_last, persistent_workers
    )
    loader = ValidationLoader(images, config.batch_size, options, process, data.unreadable_images)
    return Validation(dataset_name(data), loader, source.class_names, source)


def open_eval_sets(
    config: TrainConfig, class_names: Sequence[str], process: Process
) -> list[tuple[Validation, list[int] | None]]:
    """Open the data sets of `config.eval_sets` with the transform of the run.

    Args:
        config: the resolved configuration.
        class_names: classes of the run, in the order of the logits.
        process: this process.

    Returns:
        Each set, with a name that differs from the others', and the index of each class's logit, as of
        `match_classes`.

    Raises:
        UserError: a set cannot be opened, or has classes that the run lacks.
    """
    schedule = config.schedule
    batch_size = schedule.batch_size // (process.world_size * schedule.accumulation)
    opened = []
    for path, name in zip(config.eval_sets, eval_set_names(config.eval_sets)):
        with errors_in_option("eval_sets"), errors_in_eval_set(path):
            data = eval_set_data(path, config.data)
            eval_config = EvalConfig(
                model=config.model, data=data, batch_size=batch_size, channels_last=config.channels_last
            )
            found = build_validation(eval_config, process, persistent_workers=False)
            indices = match_eval_set(found.class_names, class_names, config.model.num_classes)
        opened.append((replace(found, name=name), indices))
    return opened


@contextmanager
def _errors_in_progressive_resizing() -> Iterator[None]:
    """Move an error about the batch size of a phase to `schedule.progressive_resizing`."""
    try:
        yield
    except UserError as error:
        if error.location != "schedule.batch_size":
            raise
        raise UserError("schedule.progressive_resizing", error.reason) from error


def check_same_classes(train: tuple[str, ...], validation: tuple[str, ...]) -> None:
    """Raise UserError if the splits of a data set differ in their classes or the order of these."""
    if train == validation:
        return
    index = next((i for i, pair in enumerate(zip(train, validation)) if pair[0] != pair[1]), None)
    if index is None:
        reason = f"it has {len(validation)} classes, the training split has {len(train)}"
    else:
        reason = f"its class {index} is {validation[index]!r}, but {train[index]!r} in the training split"
    raise UserError("data.val_split", reason)
