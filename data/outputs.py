"""Keep the files of results apart from the images of a data set."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from data.image_files import has_image_extension
from vil.errors import UserError

ARCHIVES = (".tar", ".zip", ".beton")
"""Ends of the names of files that hold images."""


def refuse_images_as_outputs(
    outputs: Mapping[str, str | Path | None], folders: Iterable[str | Path | None]
) -> None:
    """Raise UserError for an output of a command that would replace images of one of its data sets.

    Images lie in a class folder, so that a figure may replace an earlier one beside the class folders. The
    names of the classes of an FFCV file are not replaced either.

    Args:
        outputs: option → file; None for an output that is not requested.
        folders: folders of the data sets; None for one without a folder.
    """
    roots = [os.path.realpath(os.path.expanduser(folder)) for folder in folders if folder]
    for option, output in outputs.items():
        if output is None or not os.path.isfile(output):
            continue
        real = os.path.realpath(output)
        for root in roots:
            is_below = real.startswith(os.path.join(root, ""))
            beton, extension = os.path.splitext(real)
            if is_below and extension == ".json" and os.path.exists(f"{beton}.beton"):
                raise UserError(option, f"{output} names the classes of the data set; name another file")
            is_in_class = is_below and os.path.dirname(real) != root and has_image_extension(real)
            if is_in_class or (is_below and real.lower().endswith(ARCHIVES)):
                raise UserError(option, f"{output} is an image of the data set; name another file")
