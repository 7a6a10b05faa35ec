"""Sizes that change in the course of a run: a function of the epoch, whatever came before."""

import pytest
import torch

from data import build_loaders
from data.sizes import first_epochs
from vil.config import AugmentConfig, ConfigError

OPTIONS = {"image_size": 32, "in_chans": 3, "batch_size": 4, "accumulation": 1, "seed": 0}


def test_first_epochs():
    assert first_epochs([(0, 160), (0.6, 224)], 300) == [(0, 160), (180, 224)]
    assert first_epochs([(0, 160), (0.5, 192), (0.9, 224)], 3) == [(0, 160), (2, 192), (3, 224)]
    assert first_epochs([(0, 160), (0.1, 224)], 10) == [(0, 160), (1, 224)]


@pytest.mark.parametrize("workers", [0, 1])
def test_images_are_those_of_a_loader_of_their_size(folder_data, workers):
    folder_data.workers = workers
    augment = AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5)
    sized = build_loaders(folder_data, augment, **OPTIONS, sizes=[(0, 16), (0.5, 24)], epochs=4)
    assert sized.train.steps_per_epoch == 3
    for epoch, side in ((0, 16), (1, 16), (2, 24), (3, 24), (0, 16)):
        plain = build_loaders(folder_data, augment, **{**OPTIONS, "image_size": side})
        pairs = list(zip(sized.train.epoch(epoch, 1), plain.train.epoch(epoch, 1), strict=True))
        assert len(pairs) == 2
        for (images, targets), (expected, expected_targets) in pairs:
            assert images.shape == (4, 3, side, side)
            assert torch.equal(images, expected)
            assert torch.equal(targets, expected_targets)
    assert next(iter(sized.validation))[0].shape[-1] == 32


@pytest.mark.parametrize("sizes", [[], [(0.1, 16)], [(0, 16), (0, 24)], [(0, 16), (1.0, 24)], [(0, 0)]])
def test_sizes_that_cannot_be(folder_data, sizes):
    with pytest.raises(ConfigError) as error:
        build_loaders(folder_data, AugmentConfig(), **OPTIONS, sizes=sizes, epochs=4)
    assert error.value.key == "schedule.sizes"
