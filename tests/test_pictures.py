import pytest
import torch

from vil.pictures import denormalised

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def test_colours_come_back():
    images = torch.rand(2, 3, 4, 5)
    normalised = (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(denormalised(normalised, MEAN, STD), images)
    torch.testing.assert_close(denormalised(normalised[0].double(), MEAN, STD), images[0])


@pytest.mark.parametrize("batch", [(), (2,)])
def test_grey_images_have_the_averages_and_become_three_channels(batch: tuple[int, ...]):
    images = torch.rand(*batch, 1, 4, 5)
    shown = denormalised((images - 0.5) / 0.25, MEAN, STD)
    torch.testing.assert_close(shown, images.expand(*batch, 3, 4, 5))


def test_what_lies_outside_is_clipped():
    assert denormalised(torch.tensor([-9.0, 9.0]).view(2, 1, 1, 1), MEAN, STD)[:, 0].flatten().tolist() == [
        0,
        1,
    ]
