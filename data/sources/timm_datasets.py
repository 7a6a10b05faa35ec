"""Data sets of timm.data.create_dataset: torchvision's and Hugging Face's."""

from __future__ import annotations

import errno
import fcntl
import importlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from timm.data import create_dataset

from data.decoding import EncodedImage, Mode
from data.sources.base import Source, Split, root_folder, split_name
from vil.config import DataConfig
from vil.errors import UserError, error_reason
from vil.runtime.files import open_for_appending
from vil.runtime.images import MAX_ENCODED_BYTES

# timm returns other images for a misspelled split instead of an error. These data sets of torchvision treat
# every name but train and training as the test set ...
SPLIT_IS_FLAG = tuple(
    f"torch/{name}" for name in ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
)
FLAG_SPLITS = ("train", "training", "val", "valid", "validation", "test")
# ... and these read the root itself, with all splits in it, if root/<split> does not exist.
SPLIT_IS_PATH = ("torch/folder", "torch/image_folder")


class TimmDataset(Source):
    """A data set of timm.data.create_dataset, e.g. torch/cifar10, whose images have an index."""

    can_download = True

    def __init__(self, dataset: Any, name: str, mode: Mode) -> None:
        self._dataset = dataset
        # timm's ImageDataset replaces a damaged image by its neighbor; its reader does not.
        self._reader = getattr(dataset, "reader", None)
        self._name = name
        self._mode = mode
        self.class_names = _class_names(self._reader or dataset, name)
        self.targets = _targets(self._reader or dataset, name)

    @classmethod
    def requires_root(cls, data: DataConfig) -> bool:
        """See `Source.requires_root`; Hugging Face's library (hfds) has a cache of its own."""
        return not data.source.lower().startswith("hfds/")

    @classmethod
    def open(cls, data: DataConfig, split: Split, mode: Mode) -> Source:
        """Open a split by timm.data.create_dataset.

        Nothing is downloaded without `data.download`, which only the command line can set: Hugging Face's
        library (hfds) reads its cache otherwise.
        """
        source = data.source.lower()
        name = split_name(data, split)
        root = root_folder(data) if data.root or cls.requires_root(data) else None
        if source in SPLIT_IS_FLAG and name not in FLAG_SPLITS:
            known = ", ".join(FLAG_SPLITS)
            raise UserError(f"data.{split}_split", f"unknown split {name!r}; expected one of {known}")
        required = [root, root / name if source in SPLIT_IS_PATH else root] if root else []
        try:
            if root is not None and data.download:
                root.mkdir(parents=True, exist_ok=True)
            missing = [path for path in required if not path.exists()]
        except (OSError, ValueError) as error:  # ValueError: a path with a null byte
            raise UserError("data.root", f"{root} cannot be used: {error_reason(error)}") from None
        if missing:
            raise UserError("data.root", f"{missing[0]}: no such file or folder")
        try:
            folder = str(root) if root else None
            with _download_lock(root) if data.download else _offline():
                dataset = create_dataset(data.source, root=folder, split=name, download=data.download)
        except ImportError as error:
            reason = f"{data.source} needs a package that is missing: {error}"
            raise UserError("data.source", reason) from error
        except Exception as error:  # each of timm's readers raises other types
            key, where = ("data.root", f" from {root}") if root else ("data.source", "")
            reason = error_reason(error)
            hint = "" if data.download else " (--data.download true)"
            raise UserError(key, f"{data.source} cannot be read{where}: {reason}{hint}") from error
        return cls(dataset, data.source, mode)

    def read(self, index: int) -> EncodedImage:
        """Read an image; those of torchvision's data sets are decoded already."""
        if self._reader is None:
            return EncodedImage(self._dataset[index][0], self._mode)
        file, _ = self._reader[index]
        with file:
            content = file.read(MAX_ENCODED_BYTES + 1)
        if len(content) > MAX_ENCODED_BYTES:
            raise OSError(errno.EFBIG, f"is larger than {MAX_ENCODED_BYTES:,} bytes")
        return EncodedImage(content, self._mode)

    def describe(self, index: int) -> str:
        """Return the image's file if it has one."""
        if self._reader is not None:
            return str(self._reader.filename(index, absolute=True))
        samples = getattr(self._dataset, "samples", None)
        return str(samples[index][0]) if samples else f"image {index} of {self._name}"


class StreamedDataset(TimmDataset):
    """A data set of timm without an index, which cannot be shuffled or resumed: not supported."""

    can_download = False

    @classmethod
    def open(cls, data: DataConfig, split: Split, mode: Mode) -> Source:
        """Raise UserError."""
        reason = f"{data.source} is a stream of samples without an index, which is not supported"
        hint = "hfds/... reads Hugging Face data sets with one, and wds the WebDataset shards of a folder"
        raise UserError("data.source", f"{reason}; {hint}")


def _targets(dataset: Any, name: str) -> np.ndarray:
    """Return class indices, (images,), without decoding images if possible."""
    if hasattr(dataset, "iter_targets"):  # timm's readers
        targets = list(dataset.iter_targets())
    elif known := [name for name in ("targets", "labels", "_labels") if hasattr(dataset, name)]:
        targets = [int(target) for target in getattr(dataset, known[0])]
    else:
        samples = getattr(dataset, "index", None)  # iNaturalist's list; for others the images have to be read
        samples = samples if isinstance(samples, list) else (dataset[index] for index in range(len(dataset)))
        targets = [next(part for part in sample if isinstance(part, int)) for sample in samples]
    try:
        return np.array(targets, dtype=np.int64).reshape(len(dataset))
    except (TypeError, ValueError):
        raise UserError("data.source", f"{name}: expected one class for each image") from None


def _class_names(dataset: object, name: str) -> tuple[str, ...]:
    for attribute in ("classes", "all_categories"):
        if classes := getattr(dataset, attribute, None):
            # The classes of torch/imagenet are tuples of synonyms.
            return tuple(c if isinstance(c, str) else ", ".join(c) for c in classes)
    for attribute in ("class_to_idx", "class_name_to_idx"):
        if indices := getattr(dataset, attribute, None):
            return tuple(str(class_name) for class_name in sorted(indices, key=indices.get))
    raise UserError("data.source", f"{name} has no class names")


@contextmanager
def _offline() -> Iterator[None]:
    """Restrict Hugging Face's libraries to their cache, without network access, inside the context."""
    with ExitStack() as stack:
        for name in ("huggingface_hub.constants", "datasets.config"):  # the second copies flags of the first
            with suppress(ImportError):
                module = importlib.import_module(name)
                for flag in {"HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"} & vars(module).keys():
                    stack.callback(setattr, module, flag, getattr(module, flag))
                    setattr(module, flag, True)
        yield


@contextmanager
def _download_lock(folder: Path | None) -> Iterator[None]:
    """Lock a folder, if there is one, so that one rank at a time downloads a data set."""
    if folder is None:
        yield
        return
    with os.fdopen(open_for_appending(folder / ".download.lock"), "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
