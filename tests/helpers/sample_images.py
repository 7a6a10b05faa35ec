"""Images for the tests of this folder."""

import random

import numpy as np
import torch
from PIL import Image

NO_AUGMENT = {"crop": "none", "hflip": 0.0, "interpolation": "bilinear"}


def write_image(path, seed, size=(40, 30), mode="RGB"):
    """Write a smooth random image: noise of 6×5 positions, enlarged."""
    rng = np.random.default_rng(seed)
    shape = (5, 6) if mode == "L" else (5, 6, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).resize(size).save(path)


def write_image_folder(root, train=16, validation=8):
    """Write images of two classes below `root`, in equal numbers, in the folders train and val."""
    for split, count in (("train", train), ("val", validation)):
        for number in range(count):
            write_image(root / split / ("ant", "bear")[number % 2] / f"{number}.png", number, (32, 32))


def generator_states():
    """Return the states of the global CPU generators, for comparison."""
    _, numbers, position, *_ = np.random.get_state()  # noqa: NPY002
    return random.getstate(), numbers.tolist(), position, torch.get_rng_state().tolist()
