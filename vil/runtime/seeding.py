"""Seeded random draws: each one is a function of the run's seed and of its purpose.

A sample's augmentation is a function of (seed, epoch, index, view), the order of an epoch of (seed, epoch),
mixup, drop path and random shift of (seed, step, rank, part). A run is then the same with any number of data
workers, and continues exactly after a crash: the step number is the only state.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.random import mtrand


def seed_sequence(seed: int, purpose: str, *key: int) -> np.random.SeedSequence:
    """Return the seed of one draw; `purpose` separates draws whose other numbers are equal."""
    return np.random.SeedSequence((seed, zlib.crc32(purpose.encode()), *key))


def seed_generators(seed: int, purpose: str, *key: int) -> None:
    """Seed PyTorch's generators of the CPU and of all GPUs for one purpose at one step of the run."""
    torch.manual_seed(int(seed_sequence(seed, purpose, *key).generate_state(1, np.uint64)[0]))


def seed_cpu_generators(seed: int, purpose: str, *key: int) -> None:
    """Seed the global CPU generators of Python, NumPy and PyTorch; transforms draw from all three."""
    sequence = seed_sequence(seed, purpose, *key)
    seeds = sequence.generate_state(5)
    random.seed(seeds[:4].tobytes())
    mtrand.set_bit_generator(np.random.PCG64(sequence))
    torch.default_generator.manual_seed(int(seeds[4]))  # not torch.manual_seed: that seeds GPUs too


@contextmanager
def seeded(seed: int, purpose: str, *key: int) -> Iterator[None]:
    """Seed the generators as `seed_cpu_generators` inside, and restore them afterwards.

    A training process that loads its own images (workers 0) thereby keeps the state of its generators.
    """
    python_state = random.getstate()
    numpy_generator = mtrand.get_bit_generator()  # replaced, which is faster than saving its state
    torch_state = torch.get_rng_state()
    seed_cpu_generators(seed, purpose, *key)
    try:
        yield
    finally:
        random.setstate(python_state)
        mtrand.set_bit_generator(numpy_generator)
        torch.set_rng_state(torch_state)
