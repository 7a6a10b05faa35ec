"""Where images come from: one file per kind of data set, found by its name.

To add a source, write a file with a function (data, split, mode) -> Source and add a line to `SOURCES`.
"""

from __future__ import annotations

from data.sources.base import Mode, Opener, Source, Split
from data.sources.beton import open_beton
from data.sources.digits import open_digits
from data.sources.folder import open_folder
from data.sources.tarred import open_shards, open_tar
from data.sources.timm_datasets import open_timm, refuse_stream
from data.sources.zipped import open_zip
from vil.config import ConfigError, DataConfig

__all__ = ["SOURCES", "Source", "Split", "open_source"]

SOURCES: dict[str, Opener] = {
    "digits": open_digits,
    "folder": open_folder,
    "ffcv": open_beton,
    "zip": open_zip,
    "tar": open_tar,
    "wds": open_shards,
    "torch/": open_timm,
    "hfds/": open_timm,
    "hfids/": refuse_stream,
    "tfds/": refuse_stream,
    "wds/": refuse_stream,
}
"""What `data.source` may be; a name that ends in a slash is the beginning of one."""


def open_source(data: DataConfig, split: Split, in_chans: int) -> Source:
    """Opens the training or the validation split of the data set that `data` names.

    Args:
        data: the data set.
        split: which of the two; `data.train_split` and `data.val_split` are their names.
        in_chans: 3 for RGB images, 1 for grey ones.

    Raises:
        ConfigError: the source is unknown, or its files are missing or not what it expects.
    """
    if in_chans not in (1, 3):
        raise ConfigError("model.in_chans", f"images have 3 channels (RGB) or 1 (grey), not {in_chans}")
    mode: Mode = "RGB" if in_chans == 3 else "L"
    kind, slash, _ = data.source.partition("/")
    opener = SOURCES.get(kind.lower() + slash)
    if opener is None:
        known = ", ".join(f"{name}..." if name.endswith("/") else name for name in SOURCES)
        raise ConfigError("data.source", f"unknown source {data.source!r}; known are {known}")
    return opener(data, split, mode)
