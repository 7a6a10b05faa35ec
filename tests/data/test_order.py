"""The order of an epoch: every image once, without bias, and computed at any position."""

from itertools import pairwise

import numpy as np
import pytest

from data.order import EpochOrder, permute
from data.samplers import BalancedBatches, MicroBatches

ORDER_1, ORDER_2 = [11, 1, 10, 8, 2, 6, 0, 9, 5, 7, 4, 3], [8, 10, 3, 0, 11, 1, 6, 5, 9, 2, 7, 4]
LAST_2 = [5_806_794, 5_641_399, 10_952_207, 8_882_820, 13_666_847]
"""Orders of 12 images by version, and the last images of 14,197,122."""


def order(num_images, seed=0, epoch=0, version=2):
    return EpochOrder(seed, num_images, version).indices(epoch, np.arange(num_images))


@pytest.mark.parametrize("num_images", [*range(1, 40), 97, 256, 257, 1000, 10_007, 65_536, 100_003])
def test_every_image_has_one_position(num_images):
    indices = order(num_images, seed=3, epoch=num_images)
    assert np.array_equal(np.sort(indices), np.arange(num_images))
    positions = EpochOrder(3, num_images).positions(num_images, indices)
    assert np.array_equal(positions, np.arange(num_images))


@pytest.mark.slow
def test_every_image_of_imagenet_22k_has_one_position():
    indices = order(14_197_122)
    is_seen = np.zeros(len(indices), dtype=bool)
    is_seen[indices] = True
    assert is_seen.all()
    assert np.array_equal(EpochOrder(0, len(indices)).positions(0, indices[:1000]), np.arange(1000))


def test_a_position_does_not_depend_on_the_others():
    indices = order(14_197_122 // 100)
    some = np.array([[5, 70_001], [141_970, 5]])
    assert np.array_equal(EpochOrder(0, len(indices)).indices(0, some), indices[some])


@pytest.mark.parametrize("version", [1, 2])
def test_the_order_is_a_function_of_seed_and_epoch(version):
    orders = {
        (seed, epoch): order(100, seed, epoch, version).tolist() for seed in (0, 1) for epoch in range(3)
    }
    assert len(set(map(tuple, orders.values()))) == 6
    assert order(100, 1, 2, version).tolist() == orders[1, 2]


@pytest.mark.parametrize(("version", "expected"), [(1, ORDER_1), (2, ORDER_2)])
def test_a_version_of_the_order_never_changes(version, expected):
    """A run that an earlier version has started continues in its order."""
    assert order(12, seed=1, epoch=2, version=version).tolist() == expected
    last = EpochOrder(1, 14_197_122, 2).indices(2, np.arange(14_197_117, 14_197_122))
    assert last.tolist() == LAST_2


def chi_square(counts, expected):
    """Return the deviation of counts from what is expected, in standard deviations of their chi-square."""
    degrees = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - degrees) / np.sqrt(2 * degrees)


@pytest.mark.parametrize("num_images", [2, 3, 4, 5, 6, 7, 9, 10, 16, 30, 49])
def test_positions_and_neighbors_of_small_sets_are_not_biased(num_images):
    """Over 20,000 keys, an image has each position, and each successor, equally often."""
    keys = np.random.SeedSequence(1).generate_state(20_000, np.uint64)
    values = np.tile(np.arange(num_images), (len(keys), 1))
    permuted = permute(values, np.array(num_images), keys[:, None])
    assert np.array_equal(np.sort(permuted), values)
    for image in range(num_images):
        counts = np.bincount(permuted[:, image], minlength=num_images)
        assert chi_square(counts, len(keys) / num_images) < 6
    for image in range(num_images - 1):
        steps = (permuted[:, image + 1] - permuted[:, image]) % num_images
        counts = np.bincount(steps, minlength=num_images)[1:]
        assert num_images == 2 or chi_square(counts, len(keys) / (num_images - 1)) < 6


@pytest.mark.parametrize("num_images", [10_000, 99_991])
def test_large_sets_are_shuffled_evenly(num_images):
    """Blocks of positions have images of all parts of the set, neighbors and epochs are unrelated."""
    parts = 40
    orders = [order(num_images, epoch=epoch) for epoch in range(6)]
    position = np.arange(num_images) * parts // num_images
    for indices in orders:
        part = indices * parts // num_images
        pairs = {"position": (position, part), "neighbor": (part[:-1], part[1:]), "2": (part[:-2], part[2:])}
        for first, second in pairs.values():
            counts = np.bincount(first * parts + second, minlength=parts**2)
            assert abs(chi_square(counts, len(first) / parts**2)) < 6
        assert np.count_nonzero(indices == np.arange(num_images)) < 10  # fixed points: 1 on average
        assert np.count_nonzero(np.diff(indices) == 1) < 10
    for first, second in pairwise(orders):
        counts = np.bincount(first * parts // num_images * parts + second * parts // num_images)
        assert abs(chi_square(counts, num_images / parts**2)) < 6


def test_the_first_version_is_that_of_earlier_runs():
    assert order(10, 3, 4, version=1).tolist() == [6, 7, 4, 3, 2, 8, 9, 1, 0, 5]
    targets = np.repeat([0, 1, 3], [6, 3, 2])
    balanced = BalancedBatches(targets, 4, 1, 7, 2, 0, 1, 1)
    drawn = [balanced.draw(epoch, np.arange(8))[0].tolist() for epoch in (0, 3)]
    assert drawn == [[10, 10, 9, 9, 3, 3, 8, 8], [7, 7, 0, 0, 9, 9, 10, 10]]
    assert MicroBatches(11, 4, 1, 7, 3, order_version=1).images(2, 1) == [5, 5, 10, 10]
