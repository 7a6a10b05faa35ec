"""Read image files as model inputs: decoding and evaluation transform as in eval.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from data.decoding import EncodedImage, Mode, decoding_errors
from data.transforms import evaluation_transform
from vil import command_line
from vil.config import EvalConfig, ModelConfig
from vil.errors import UserError
from vil.runtime.files import read_bytes
from vil.runtime.images import MAX_ENCODED_BYTES


class ImageReader:
    """Read a file as the input of a model: (C, H, W), float32, normalized.

    `transform_options` of the evaluation transform are those stored with the weights, and may be empty;
    `model_path` is for messages.
    """

    def __init__(self, config: ModelConfig, transform_options: Mapping[str, Any], model_path: str) -> None:
        if config.in_chans not in (1, 3):
            reason = f"takes images of {config.in_chans} channels; files hold 3 (RGB) or 1 (grayscale)"
            raise UserError(model_path, reason)
        data = command_line.parse(EvalConfig, [], base_values={"data": dict(transform_options)}).config.data
        self.mean, self.std = data.mean, data.std
        self.mode: Mode = "RGB" if config.in_chans == 3 else "L"
        self.transform = evaluation_transform(data, image_size=config.size, in_chans=config.in_chans)

    def __call__(self, path: str | Path) -> Tensor:
        """Return the image. Raise UnreadableImageError if it cannot be read."""
        return self.transform(read_image(path, self.mode))


def read_image(path: str | Path, mode: Mode) -> EncodedImage:
    """Read a file as the data sources do. Raise UnreadableImageError if it cannot be read."""
    with decoding_errors():
        return EncodedImage(read_bytes(path, MAX_ENCODED_BYTES), mode)
