"""Pictures for the tests of this folder."""

import numpy as np
from PIL import Image

NO_AUGMENT = {"crop": "none", "hflip": 0.0, "interpolation": "bilinear"}


def write_image(path, seed, size=(40, 30), mode="RGB"):
    """A smooth random picture: noise of 6×5 positions, enlarged."""
    rng = np.random.default_rng(seed)
    shape = (5, 6) if mode == "L" else (5, 6, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).resize(size).save(path)
