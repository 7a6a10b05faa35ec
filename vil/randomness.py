"""Seeds: every random draw of a run is a function of the run's seed and of what the draw is for."""

from __future__ import annotations

import zlib

import numpy as np
import torch


def seed_sequence(seed: int, purpose: str, *key: int) -> np.random.SeedSequence:
    """The seed of one draw. The purpose keeps apart draws whose other numbers are equal."""
    return np.random.SeedSequence((seed, zlib.crc32(purpose.encode()), *key))


def seed_generators(seed: int, purpose: str, *key: int) -> None:
    """Seeds PyTorch's generators, of the CPU and all GPUs, for one purpose at one place of the run."""
    torch.manual_seed(int(seed_sequence(seed, purpose, *key).generate_state(1, np.uint64)[0]))
