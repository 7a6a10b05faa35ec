"""Randomness as a function: every draw is seeded by what it is for.

A sample's augmentation is a function of (seed, epoch, index, view), the order of an epoch of (seed, epoch),
the mixing of a batch of (seed, step, rank, part). A run is then the same with any number of workers, and goes
on after a crash with no generator state but the step number.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.random import mtrand

from vil.randomness import seed_sequence


@contextmanager
def seeded(seed: int, purpose: str, *key: int) -> Iterator[None]:
    """Seeds the global CPU generators of Python, NumPy and PyTorch inside, and restores them afterwards.

    timm's and torchvision's transforms draw from all three; a training process that loads its own images
    (workers 0) finds its generators untouched.
    """
    sequence = seed_sequence(seed, purpose, *key)
    words = sequence.generate_state(5)
    python_state = random.getstate()
    numpy_generator = mtrand.get_bit_generator()  # exchanged as a whole: saving its state takes longer
    torch_state = torch.get_rng_state()
    random.seed(words[:4].tobytes())
    mtrand.set_bit_generator(np.random.PCG64(sequence))
    torch.default_generator.manual_seed(int(words[4]))  # not torch.manual_seed: that seeds GPUs too
    try:
        yield
    finally:
        random.setstate(python_state)
        mtrand.set_bit_generator(numpy_generator)
        torch.set_rng_state(torch_state)
