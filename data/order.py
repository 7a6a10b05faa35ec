"""The order of the images in an epoch: a function of (seed, epoch), computed at any position.

No array of all images is needed: the order is a keyed bijection of the indices onto themselves, a generalized
Feistel network on pairs of digits with modular addition (Black and Rogaway, Ciphers with Arbitrary Finite
Domains, CT-RSA 2002, section 5; Luby and Rackoff, SIAM J. Comput. 17(2), 1988). Indices below n are
written with a = ⌈√n⌉ and b = ⌈n / a⌉ as l·b + r; results that are n or more are permuted again (cycle
walking, section 4 of the first paper). It serves for shuffling and is no cipher: its rounds hash with the
multipliers of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from vil.runtime.seeding import seed_sequence

ORDER_VERSION = 2
"""Version of the order of new runs; 1, an array of all indices shuffled by NumPy, is that of runs before
version 0.3.0. A checkpoint stores the version of its run."""

_ROUNDS = 16
"""Even. Four rounds do for large domains; with 16, positions and neighbors show no bias from 2 images on."""
_GAMMA, _MIX_1, _MIX_2 = (
    np.uint64(value) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


@dataclass(frozen=True)
class EpochOrder:
    """The order of `num_images` images in each epoch; every position has another image.

    Attributes:
        seed: the run's seed.
        num_images: size of the training set.
        version: `ORDER_VERSION`, or that of the run to continue.
    """

    seed: int
    num_images: int
    version: int = ORDER_VERSION

    def indices(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Return the images (int64) at positions of an epoch, of any shape (int64)."""
        if self.version == 1:
            return _shuffled(self.seed, epoch, self.num_images)[positions]
        return permute(positions, np.array(self.num_images), self._key(epoch))

    def positions(self, epoch: int, indices: np.ndarray) -> np.ndarray:
        """Return the positions (int64) of images in an epoch: the inverse of `indices`."""
        if self.version == 1:
            return np.argsort(_shuffled(self.seed, epoch, self.num_images))[indices]
        return permute(indices, np.array(self.num_images), self._key(epoch), inverse=True)

    def _key(self, epoch: int) -> np.ndarray:
        return seed_sequence(self.seed, "order", epoch).generate_state(1, np.uint64)


@functools.lru_cache(maxsize=1)
def _shuffled(seed: int, epoch: int, num_images: int) -> np.ndarray:
    return np.random.default_rng(seed_sequence(seed, "order", epoch)).permutation(num_images)


def permute(values: np.ndarray, sizes: np.ndarray, keys: np.ndarray, inverse: bool = False) -> np.ndarray:
    """Map each of `values` to its image under the permutation of 0 to size - 1 that a key selects.

    Args:
        values: int64, of any shape, each below its size.
        sizes: integers of at least 1, broadcast to the shape of `values`.
        keys: uint64, broadcast likewise.
        inverse: map in the other direction.

    Returns:
        int64, of the shape of `values`.
    """
    a = np.ceil(np.sqrt(sizes)).astype(np.uint64)  # a·a >= size: sizes are far below 2^52
    b = (-(-sizes // a.astype(np.int64))).astype(np.uint64)
    shape = np.shape(values)
    a, b, keys, limits = (
        np.broadcast_to(array, shape).reshape(-1) for array in (a, b, keys, sizes.astype(np.uint64))
    )
    permuted = np.array(values, np.uint64).reshape(-1)
    pending = np.arange(permuted.size)
    while pending.size:
        permuted[pending] = _feistel(
            permuted[pending], a[pending], b[pending], keys[pending], inverse=inverse
        )
        pending = pending[permuted[pending] >= limits[pending]]
    return permuted.astype(np.int64).reshape(shape)


def _feistel(x: np.ndarray, a: np.ndarray, b: np.ndarray, key: np.ndarray, inverse: bool) -> np.ndarray:
    """Permute the numbers below a·b; all arguments (N,), uint64."""
    left, right = x // b, x % b
    for number in reversed(range(_ROUNDS)) if inverse else range(_ROUNDS):
        # In even rounds left < a and right < b, in odd ones the other way around.
        size = b if number % 2 else a
        if inverse:
            left, right = right, left
            left = left + size - _hash(right, key, number, size)
        else:
            left = left + _hash(right, key, number, size)
        left = np.where(left >= size, left - size, left)
        if not inverse:
            left, right = right, left
    return left * b + right


def _hash(x: np.ndarray, key: np.ndarray, number: int, size: np.ndarray) -> np.ndarray:
    """Return a hash of (x, key, number of the round) below `size`; (N,), uint64."""
    round_key = splitmix64(key + _GAMMA * np.array([number + 1], np.uint64))
    hashed = (x + round_key) * _MIX_1
    hashed = (hashed ^ (hashed >> np.uint64(32))) * _MIX_2
    return ((hashed >> np.uint64(32)) * size) >> np.uint64(32)  # as uniform as a remainder, and faster


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Return the finalizer of SplitMix64 of each element, uint64."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))
