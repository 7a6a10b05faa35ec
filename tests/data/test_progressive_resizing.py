"""Progressive resizing: the size is a function of the epoch."""

import pytest
import torch
from helpers.loading import load

from data.progressive_resizing import start_epochs
from vil.config import AugmentConfig


def test_start_epochs():
    assert start_epochs([(0, 160), (0.6, 224)], 300) == [(0, 160), (180, 224)]
    assert start_epochs([(0, 160), (0.5, 192), (0.9, 224)], 3) == [(0, 160), (2, 192), (3, 224)]
    assert start_epochs([(0, 160), (0.1, 224)], 10) == [(0, 160), (1, 224)]


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
