"""A sheet with the first images of each class."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

from data.decoding import UnreadableImageError, decoding_errors
from data.sources.base import Source
from tools.png import as_png
from vil.errors import printable

MAX_SHEET_CLASSES = 60
THUMBNAIL = 128
"""Side of an image in the sheet, in pixels."""


def contact_sheet(sources: dict[str, Source], columns: int) -> bytes:
    """Return a PNG with a row per class of up to `columns` readable images, of the first split that has it.

    Of more than `MAX_SHEET_CLASSES` classes, the first ones are shown.
    """
    from matplotlib.figure import Figure  # only a sheet needs it

    class_names = next(iter(sources.values())).class_names
    shown = class_names[:MAX_SHEET_CLASSES]
    figure = Figure(figsize=(1.1 * columns + 2, 1.1 * len(shown)), layout="compressed")
    grid = figure.subplots(len(shown), columns, squeeze=False)
    for row, (target, name) in zip(grid, enumerate(shown)):
        row[0].set_ylabel(printable(name), rotation=0, ha="right", va="center", fontsize=9)
        for axes in row:
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_frame_on(False)
        for axes, image in zip(row, itertools.islice(_class_images(sources, target), columns)):
            axes.imshow(image)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # of scripts that no installed font has
        return as_png(figure)


def _class_images(sources: dict[str, Source], target: int) -> Iterator[Image.Image]:
    """Yield the readable images of a class, as squares of `THUMBNAIL` pixels, padded with white."""
    for source in sources.values():
        for index in np.flatnonzero(source.targets == target):
            try:
                with decoding_errors():
                    image = source.read(int(index)).to_pil()
            except UnreadableImageError:
                continue
            yield ImageOps.pad(image, (THUMBNAIL, THUMBNAIL), color="white")
