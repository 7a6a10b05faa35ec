"""Random sizes: drawn for each step, equal on all ranks; the images are those of a loader of their size."""

import pytest
import torch
from helpers.loading import load

from vil.config import AugmentConfig, DataConfig
from vil.errors import UserError

SIZES = [8, 12, (8, 16)]
AUGMENT = AugmentConfig(auto_augment="rand-m9", random_erasing=0.5)


def batches(
    workers: int = 0, epoch: int = 1, start: int = 0, **options: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    data = DataConfig(workers=workers, images_per_class=30)
    return list(load(data, AUGMENT, batch_size=30, random_sizes=SIZES, **options).train.epoch(epoch, start))


def equal(
    one: list[tuple[torch.Tensor, torch.Tensor]], other: list[tuple[torch.Tensor, torch.Tensor]]
) -> bool:
    return len(one) == len(other) > 0 and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one, other, strict=True)
    )


def test_sizes_change_and_images_are_those_of_their_size():
    found = [tuple(images.shape[2:]) for images, _ in batches()]
    assert set(found) == {(8, 8), (12, 12), (8, 16)}
    assert found != [tuple(images.shape[2:]) for images, _ in batches(epoch=2)]
    plain = {
        size: list(
            load(
                DataConfig(workers=0, images_per_class=30), AUGMENT, batch_size=30, image_size=size
            ).train.epoch(1)
        )
        for size in ((8, 8), (12, 12), (8, 16))
    }
    assert equal(batches(), [plain[size][step] for step, size in enumerate(found)])


def test_batches_do_not_depend_on_workers_and_the_first_step():
    whole = batches()
    assert equal(batches(workers=1), whole)
    assert equal(batches(start=5), whole[5:])


def test_ranks_and_micro_batches_of_a_step_have_one_size():
    parts = [batches(rank=rank, world_size=2, accumulation=3) for rank in range(2)]
    for step, (images, _) in enumerate(batches()):
        micro_batches = [part[0] for rank in parts for part in rank[3 * step : 3 * step + 3]]
        assert {part.shape for part in micro_batches} == {(5, *images.shape[1:])}


def test_a_plan_of_sizes_is_refused():
    with pytest.raises(UserError) as refused:
        load(
            DataConfig(workers=0, images_per_class=30),
            batch_size=30,
            random_sizes=[8],
            progressive_resizing=[(0, 8)],
        )
    assert str(refused.value) == (
        "schedule.random_sizes: cannot be combined with schedule.progressive_resizing"
    )
