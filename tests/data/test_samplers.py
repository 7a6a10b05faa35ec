"""Samplers: batches are a function of (seed, epoch), however ranks and accumulation divide them."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import EpochOrder
from data.samplers import BalancedBatches, MicroBatches, replacement_indices
from vil.errors import UserError


def batches(epoch=0, start=0, world_size=1, accumulation=1, num_images=50, batch_size=12, **options):
    """The global batches of an epoch, as sets of keys, put together from the micro-batches of all ranks."""
    steps = None
    for rank in range(world_size):
        sampler = MicroBatches(
            num_images, batch_size, accumulation, 7, rank=rank, world_size=world_size, **options
        )
        sampler.set_epoch(epoch, start)
        micro = list(sampler)
        assert len(micro) == len(sampler) == (num_images // batch_size - start) * accumulation
        assert all(len(keys) == sampler.micro_batch_size for keys in micro)
        groups = [micro[i : i + accumulation] for i in range(0, len(micro), accumulation)]
        mine = [[key for keys in group for key in keys] for group in groups]
        steps = mine if steps is None else [a + b for a, b in zip(steps, mine)]
    return [sorted(keys) for keys in steps]


def test_an_epoch_has_each_image_once_without_the_incomplete_batch():
    sampler = MicroBatches(50, 12, 1, seed=0)
    assert sampler.steps_per_epoch == 4
    keys = [key for micro_batch in sampler for key in micro_batch]
    assert len(keys) == len({index for _, index, _ in keys}) == 48
    assert {(epoch, view) for epoch, _, view in keys} == {(0, 0)}


@settings(deadline=None)  # a busy machine is no failure
@given(
    world_size=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    share=st.integers(1, 4),
    extra=st.integers(0, 30),
    repeats=st.integers(1, 4),
    epoch=st.integers(0, 5),
)
def test_ranks_and_accumulation_divide_the_same_batch(world_size, accumulation, share, extra, repeats, epoch):
    batch_size = world_size * accumulation * share
    shape = {"num_images": batch_size + extra, "batch_size": batch_size, "repeats": repeats, "epoch": epoch}
    divided = batches(world_size=world_size, accumulation=accumulation, **shape)
    assert divided == batches(**shape)
    assert all(len(set(keys)) == batch_size for keys in divided)


@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_start_skips_whole_steps(start):
    for options in ({}, {"world_size": 2, "accumulation": 3}, {"repeats": 3}):
        assert batches(epoch=2, start=start, **options) == batches(epoch=2, **options)[start:]


def test_start_outside_the_epoch_is_an_error():
    with pytest.raises(ValueError, match="start"):
        MicroBatches(50, 12, 1, seed=0).set_epoch(0, 5)


def test_repeated_augmentation_puts_all_views_of_an_image_into_one_batch():
    steps = batches(num_images=50, batch_size=12, repeats=3)
    assert len(steps) == 4  # an epoch keeps its length
    seen = Counter()
    for keys in steps:
        views = Counter(index for _, index, _ in keys)
        assert set(views.values()) == {3}
        assert {(index, view) for _, index, view in keys} == {(i, v) for i in views for v in range(3)}
        seen.update(set(views))
    assert len(seen) == 16  # a third of the images
    assert set(seen.values()) == {1}


def test_repeated_augmentation_spreads_the_views_over_the_ranks():
    for rank in range(3):
        sampler = MicroBatches(60, 12, 1, seed=0, repeats=3, rank=rank, world_size=3)
        for keys in sampler:
            assert len({index for _, index, _ in keys}) == len(keys)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"batch_size": 10, "world_size": 4}, "schedule.batch_size"),
        ({"batch_size": 10, "accumulation": 4}, "schedule.batch_size"),
        ({"batch_size": 51}, "schedule.batch_size"),
    ],
)
def test_indivisible_batches_are_rejected(options, key):
    with pytest.raises(UserError) as error:
        MicroBatches(**{"num_images": 50, "batch_size": 12, "accumulation": 1, "seed": 0, **options})
    assert error.value.location == key


def test_the_error_names_the_nearest_batch_size():
    with pytest.raises(UserError, match="12 are"):
        MicroBatches(50, 13, 2, seed=0, world_size=2)


@pytest.mark.parametrize("version", [1, 2])
def test_replacements_are_the_rest_of_the_epoch_then_its_beginning(version):
    order = EpochOrder(5, 200, version).indices(2, np.arange(200)).tolist()
    for position in (0, 7, 199):
        rest = list(replacement_indices(5, 2, 200, order[position], version))
        assert rest == order[position + 1 :] + order[:position]


UNBALANCED = np.repeat([0, 1, 3], [40, 7, 3])
"""Targets of 50 images; class 2 has none."""


def drawn(epoch: int, start: int = 0, seed: int = 7, version: int = 2) -> list[tuple[int, int, int]]:
    sampler = BalancedBatches(UNBALANCED, 12, 1, seed, 1, 0, 1, version)
    sampler.set_epoch(epoch, start)
    return [key for keys in sampler for key in keys]


@pytest.mark.parametrize("version", [1, 2])
def test_balanced_classes_are_equally_frequent(version):
    for epoch in range(4):
        indices = [index for _, index, _ in drawn(epoch, version=version)]
        assert len(indices) == 48  # as without balanced sampling
        assert Counter(UNBALANCED[indices].tolist()) == {0: 16, 1: 16, 3: 16}
    assert drawn(0, version=version) == drawn(0, version=version)
    seeds = [(epoch, seed) for epoch in (0, 1) for seed in (7, 8)]
    assert len({tuple(drawn(epoch, seed=seed, version=version)) for epoch, seed in seeds}) == 4
    assert drawn(2, start=1, version=version) == drawn(2, version=version)[12:]


@pytest.mark.parametrize("version", [1, 2])
def test_no_image_is_repeated_before_its_class_is_exhausted(version):
    counts: Counter[int] = Counter()
    for epoch in range(12):
        counts.update(index for _, index, _ in drawn(epoch, version=version))
        for label in (0, 1, 3):
            of_class = [counts[index] for index in np.flatnonzero(label == UNBALANCED).tolist()]
            assert max(of_class) - min(of_class) <= 1


def test_ranks_divide_balanced_batches():
    parts = [BalancedBatches(UNBALANCED, 12, 2, 7, 1, rank, 2) for rank in (0, 1)]
    divided = sorted(key for part in parts for keys in part for key in keys)
    assert divided == sorted(drawn(0))
    assert [len(keys) for keys in parts[0]] == [3] * 8


def test_views_of_balanced_images_share_a_batch():
    sampler = BalancedBatches(UNBALANCED, 12, 1, 7, 3)
    keys = [key for keys in sampler for key in keys]
    assert len(keys) == 48
    assert Counter(view for _, _, view in keys) == {0: 16, 1: 16, 2: 16}
    classes = Counter(UNBALANCED[index] for _, index, view in keys if view == 0)
    assert max(classes.values()) - min(classes.values()) <= 1
    assert sampler.images(0, 0) == [index for _, index, _ in keys[:12]]


@pytest.mark.parametrize("version", [1, 2])
def test_fewer_draws_than_classes(version):
    """Every class is drawn once before any is drawn twice, over two epochs of 64 images."""
    sampler = BalancedBatches(np.arange(101), 64, 1, 0, 1, 0, 1, version)
    drawn = [sampler.draw(epoch, np.arange(64))[0] for epoch in (0, 1)]
    assert [len(set(indices.tolist())) for indices in drawn] == [64, 64]
    assert set(np.concatenate(drawn).tolist()) == set(range(101))
