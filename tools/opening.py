"""What tools open for a picture: a model from a file of weights, with the transform its images need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from data.decoding import MAX_ENCODED_BYTES, Mode, Picture, decoding
from data.transforms import Transform, evaluation_transform
from vil import command_line
from vil.config import ConfigError, DataConfig, EvalConfig, ModelConfig
from vil.models.released import open_model
from vil.runtime.files import read_bytes
from vil.weight_files import TRANSFORM


@dataclass(frozen=True)
class Opened:
    """A model in eval mode.

    Attributes:
        model: the model, with its weights.
        config: its section, with its image size and channels.
        data: the options of its evaluation transform, the others as always.
        class_names: in the order of the head's rows; None where they are not known.
        title: the file and the kind of weights in it, in words.
    """

    model: nn.Module
    config: ModelConfig
    data: DataConfig
    class_names: tuple[str, ...] | None
    title: str

    @property
    def mode(self) -> Mode:
        """How images are decoded for the model."""
        return "RGB" if self.config.in_chans == 3 else "L"

    def transform(self) -> Transform:
        """The evaluation transform that belongs to the weights. Raises ConfigError for impossible options."""
        return evaluation_transform(
            self.data, image_size=self.config.image_size, in_chans=self.config.in_chans
        )


def open_checkpoint(checkpoint: str, **choice: Any) -> Opened:
    """The model of a file of weights.

    Args:
        checkpoint, choice: the arguments of `vil.models.released.open_model`.

    Raises:
        ConfigError: as `open_model`, and for stored options of another type.
    """
    model, file = open_model(checkpoint, **choice)
    assert file.model is not None  # or open_model had refused the file
    title = f"{Path(checkpoint).name or checkpoint}, {file.kind} weights"
    return Opened(model, file.model, data_section(file.data), file.class_names, title)


def data_section(stored: Mapping[str, Any]) -> DataConfig:
    """The stored options of an evaluation transform as a data section. Raises ConfigError for wrong types."""
    values = {"data": {key: stored[key] for key in TRANSFORM if key in stored}}
    return command_line.parse(EvalConfig, [], base_values=values).config.data


def read_picture(path: str | Path, mode: Mode) -> Picture:
    """A file as the sources of the training read it. Raises UnreadableImageError where it cannot be read."""
    with decoding():
        return Picture(read_bytes(path, MAX_ENCODED_BYTES), mode)


def check_channels(config: ModelConfig, path: str) -> None:
    """Raises ConfigError for a model whose images are neither RGB nor grey."""
    if config.in_chans not in (1, 3):
        raise ConfigError(path, f"its images have {config.in_chans} channels; files hold 3 (RGB) or 1 (grey)")
