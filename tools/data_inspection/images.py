"""The images of a data set: sizes, formats, digests, perceptual hashes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import imagehash
import numpy as np
from torch.utils.data import DataLoader, Dataset

from data.decoding import EncodedImage, UnreadableImageError, decoding_errors
from data.sources import SOURCES, open_source
from data.sources.base import Source
from data.workers import exit_with_parent, explain_shared_memory, limit_workers
from vil.config import DataConfig
from vil.errors import UserError, printable
from vil.runtime.console import progress_bar


@dataclass(frozen=True)
class ImageRecord:
    """One image of a data set.

    Attributes:
        split, class_name, name: of the image; `name` is its path below the split's folder or in its archive.
        error: why it cannot be read; the other attributes are then empty.
        width, height: in pixels, without the EXIF orientation.
        file_format: JPEG, PNG, ...
        mode: Pillow's mode: RGB, L, I;16, P, ...
        pixels: digest of the RGB pixels and the size.
        perceptual_hash: 64 bits.
    """

    split: str
    class_name: str
    name: str
    error: str | None = None
    width: int = 0
    height: int = 0
    file_format: str = ""
    mode: str = ""
    pixels: bytes = b""
    perceptual_hash: int = 0

    def __str__(self) -> str:
        """Return split and name, on one line."""
        return printable(f"{self.split}: {self.name}")


def open_splits(root: str, source: str, names: Sequence[str] | None) -> dict[str, Source]:
    """Return the sources of the splits by name.

    Without names: train and val if both can be opened, else all images as one split.

    Raises:
        UserError: a split cannot be opened.
    """

    def open_split(name: str, training: str) -> Source:
        data = DataConfig(source=source, root=root, train_split=training, val_split=name)
        return open_source(data, "val", 3)

    if names is not None:
        return {name: open_split(name, names[0]) for name in names}
    defaults = DataConfig(source=source, root=root)
    unsplit = DataConfig(source=source, root=root, val_fraction=0.5)
    try:
        name = SOURCES[source].unsplit_name(unsplit) if source in SOURCES else defaults.train_split
    except UserError:  # there is a validation split, or the source always has one
        return {name: open_split(name, defaults.train_split) for name in ("train", "val")}
    return {"all" if name in (".", "*.tar") else name: open_split(name, name)}


class _Images(Dataset[ImageRecord]):
    """The images of all splits, in order."""

    def __init__(self, sources: dict[str, Source]) -> None:
        self._sources = sources
        self._index = [(split, index) for split, source in sources.items() for index in range(len(source))]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._index)

    def __getitem__(self, index: int) -> ImageRecord:
        split, position = self._index[index]
        source = self._sources[split]
        class_name = source.class_names[int(source.targets[position])]
        name = source.name(position)
        try:
            with decoding_errors():
                return describe_image(source.read(position), split, class_name, name)
        except UnreadableImageError as error:
            return ImageRecord(split, class_name, name, error=str(error))


def describe_image(encoded: EncodedImage, split: str, class_name: str, name: str) -> ImageRecord:
    """Decode an image and return its record. Raises UnreadableImageError."""
    file_format, mode = encoded.header()
    image = encoded.to_pil()
    digest = blake2b(image.tobytes(), digest_size=16, person=f"{image.width}x{image.height}".encode())
    bits = imagehash.phash(image).hash.flatten()
    perceptual_hash = int.from_bytes(np.packbits(bits).tobytes(), "big")
    size = (image.width, image.height)
    return ImageRecord(
        split, class_name, name, None, *size, file_format, mode, digest.digest(), perceptual_hash
    )


def read_images(sources: dict[str, Source], workers: int) -> Iterator[ImageRecord]:
    """Yield the record of every image, with a progress bar on standard error."""
    loader = DataLoader(
        _Images(sources),
        batch_size=None,
        num_workers=limit_workers(workers),
        worker_init_fn=exit_with_parent,
    )
    with progress_bar(desc="read images", total=len(loader), unit="image") as bar:
        for record in explain_shared_memory(loader):
            yield record
            bar.update()
