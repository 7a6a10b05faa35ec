"""Equal and similar images of a data set."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tools.data_inspection.images import ImageRecord

HASH_BITS = 64
MAX_NEAR_DISTANCE = 12


@dataclass(frozen=True)
class DuplicatePair:
    """Two images that are equal (distance 0 and equal pixels) or similar.

    Attributes:
        distance: differing bits of the perceptual hashes.
        is_exact: True if the pixels are equal.
    """

    first: ImageRecord
    second: ImageRecord
    distance: int
    is_exact: bool

    @property
    def is_across_splits(self) -> bool:
        """True if the images are in different splits."""
        return self.first.split != self.second.split

    @property
    def is_across_classes(self) -> bool:
        """True if the images have different classes."""
        return self.first.class_name != self.second.class_name

    def as_json(self) -> dict[str, object]:
        """Return the pair for the JSON file."""
        images = [
            {"split": x.split, "class": x.class_name, "name": x.name} for x in (self.first, self.second)
        ]
        return {"images": images, "distance": self.distance, "exact": self.is_exact}


def find_duplicates(images: Sequence[ImageRecord], distance: int) -> list[DuplicatePair]:
    """Return the pairs of readable images with equal pixels or hashes of at most this distance.

    Pairs of different splits or classes come first. Of a group of images with equal pixels, or with equal
    hashes, each is paired with the first of the group alone.
    """
    groups: dict[bytes, list[ImageRecord]] = defaultdict(list)
    for image in images:
        if image.error is None:
            groups[image.pixels].append(image)
    pairs = [
        DuplicatePair(group[0], other, 0, is_exact=True) for group in groups.values() for other in group[1:]
    ]
    by_hash: dict[int, list[ImageRecord]] = defaultdict(list)
    for group in groups.values():
        by_hash[group[0].perceptual_hash].append(group[0])
    for group in by_hash.values():
        pairs += [DuplicatePair(group[0], other, 0, is_exact=False) for other in group[1:]]
    different = [group[0] for group in by_hash.values()]
    for first, second in near_pairs(np.array(list(by_hash), dtype=np.uint64), distance):
        one, other = different[first], different[second]
        bits = (one.perceptual_hash ^ other.perceptual_hash).bit_count()
        pairs.append(DuplicatePair(one, other, bits, is_exact=False))
    return sorted(
        pairs,
        key=lambda pair: (
            not (pair.is_across_splits or pair.is_across_classes),
            not pair.is_exact,
            pair.distance,
            str(pair.first),
            str(pair.second),
        ),
    )


def near_pairs(hashes: np.ndarray, distance: int) -> list[tuple[int, int]]:
    """Return the pairs (i, j), i < j, of 64-bit hashes that differ in at most `distance` bits.

    Two hashes that differ in d bits are equal in at least one of d + 1 groups of bits, so that only hashes
    with an equal group are compared.
    """
    found: set[tuple[int, int]] = set()
    for bits in np.array_split(np.arange(HASH_BITS, dtype=np.uint64), distance + 1):
        mask = np.bitwise_or.reduce(np.uint64(1) << bits)
        order = np.argsort(hashes & mask, kind="stable")
        keys = (hashes & mask)[order]
        starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1], True])
        for start, end in itertools.pairwise(starts.tolist()):
            bucket = np.sort(order[start:end])
            for position, index in enumerate(bucket[:-1]):
                others = bucket[position + 1 :]
                differing = (hashes[others] ^ hashes[index]).view(np.uint8).reshape(-1, 8)
                is_near = np.unpackbits(differing, axis=1).sum(axis=1) <= distance
                found.update((int(index), int(other)) for other in others[is_near])
    return sorted(found)
