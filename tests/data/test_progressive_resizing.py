"""Progressive resizing: the size is a function of the epoch."""

import dataclasses

import pytest
import torch
from helpers.loading import load

from vil.config import AugmentConfig, ScheduleConfig
from vil.errors import UserError
from vil.runtime.epoch_steps import EpochSteps, training_phases


def phases(plan: list[tuple], epochs: int, batch_size: int = 8) -> list[tuple[int, int, int]]:
    schedule = ScheduleConfig(epochs=epochs, batch_size=batch_size, progressive_resizing=plan)
    return [dataclasses.astuple(phase) for phase in training_phases(schedule, 32)]


def test_phases():
    assert phases([(0, 160), (0.6, 224)], 300) == [(0, 160, 8), (180, 224, 8)]
    assert phases([(0, 160), (0.5, 192), (0.9, 224)], 3) == [(0, 160, 8), (2, 192, 8), (3, 224, 8)]
    assert phases([(0, 160), (0.1, 192), (0.2, 224)], 1) == [(0, 160, 8), (1, 224, 8)]
    assert phases([(0, 128, 64), (0.5, 192), (0.7, 224, 16)], 10) == [
        (0, 128, 64),
        (5, 192, 64),
        (7, 224, 16),
    ]
    assert [dataclasses.astuple(phase) for phase in training_phases(ScheduleConfig(), 32)] == [(0, 32, 1024)]


def test_steps_of_epochs():
    steps = EpochSteps(((0, 5), (2, 3), (4, 7)))
    assert [steps.steps(epoch) for epoch in range(6)] == [5, 5, 3, 3, 7, 7]
    assert [steps.first_step(epoch) for epoch in range(7)] == [0, 5, 10, 13, 16, 23, 30]
    located = [(epoch, index) for epoch in range(6) for index in range(steps.steps(epoch))]
    assert [steps.locate(step) for step in range(30)] == located
    times = [steps.scheduled_time(step) for step in range(30)]
    assert times == sorted(set(times))
    assert [times[step] for step in (0, 4, 5, 10, 13, 16, 23)] == [0, 4, 5, 10, 15, 20, 25]
    assert times[11] == pytest.approx(5 * (2 + 1 / 3))
    constant = EpochSteps.constant(4)
    assert [constant.scheduled_time(step) for step in range(9)] == list(range(9))


@pytest.mark.parametrize("workers", [0, 1])
def test_images_are_those_of_a_loader_of_their_size(folder_data, workers):
    folder_data.workers = workers
    augment = AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5)
    sized = load(folder_data, augment, batch_size=4, progressive_resizing=[(0, 16), (0.5, 24)], epochs=4)
    assert sized.train.steps_per_epoch == 3
    for epoch, side in ((0, 16), (1, 16), (2, 24), (3, 24), (0, 16)):
        plain = load(folder_data, augment, batch_size=4, image_size=side)
        pairs = list(zip(sized.train.epoch(epoch, 1), plain.train.epoch(epoch, 1), strict=True))
        assert len(pairs) == 2
        for (images, targets), (expected, expected_targets) in pairs:
            assert images.shape == (4, 3, side, side)
            assert torch.equal(images, expected)
            assert torch.equal(targets, expected_targets)
    assert next(iter(sized.validation))[0].shape[-1] == 32


def test_the_batch_size_follows_the_plan(folder_data):
    plan = [(0, 16, 6), (0.5, 24, 4)]
    sized = load(folder_data, batch_size=12, progressive_resizing=plan, epochs=4, accumulation=2)
    for epoch, side, batch_size in ((0, 16, 6), (1, 16, 6), (2, 24, 4), (3, 24, 4)):
        plain = load(folder_data, batch_size=batch_size, image_size=side, accumulation=2)
        pairs = list(zip(sized.train.epoch(epoch), plain.train.epoch(epoch), strict=True))
        assert len(pairs) == 2 * (12 // batch_size)
        assert all(torch.equal(one[0], other[0]) for one, other in pairs)
        assert sized.train.samples(epoch, 1) == plain.train.samples(epoch, 1)


@pytest.mark.parametrize(
    ("plan", "options", "message"),
    [
        (
            [(0, 16, 5)],
            {"accumulation": 2},
            "5 images are not divisible by 1 (processes) × 2 (accumulation); 4 are",
        ),
        ([(0, 16), (0.5, 24, 24)], {}, "24 is more than the 12 images of the training set"),
        (
            [(0, 16), (0.5, 24, 3)],
            {"augment": AugmentConfig(mixup=0.8)},
            "mixup and cutmix mix pairs, but micro-batches would have 3 images; change schedule.batch_size "
            "or schedule.accumulation, or switch them off",
        ),
    ],
)
def test_every_batch_size_is_checked_at_the_start(folder_data, plan, options, message):
    with pytest.raises(UserError) as refused:
        load(folder_data, batch_size=12, progressive_resizing=plan, **options)
    assert str(refused.value) == f"schedule.progressive_resizing: {message}"


def test_balanced_sampling_needs_one_batch_size(folder_data):
    folder_data.balanced_sampling = True
    with pytest.raises(UserError) as refused:
        load(folder_data, batch_size=12, progressive_resizing=[(0, 16), (0.5, 24, 4)])
    assert str(refused.value) == (
        "data.balanced_sampling: cannot be combined with batch sizes in schedule.progressive_resizing"
    )
