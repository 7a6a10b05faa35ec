import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import center_crop

from vil.runtime.images import denormalize, limit_aspect_ratio

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def test_colors_are_restored():
    images = torch.rand(2, 3, 4, 5)
    normalized = (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(denormalize(normalized, MEAN, STD), images)
    torch.testing.assert_close(denormalize(normalized[0].double(), MEAN, STD), images[0])


@pytest.mark.parametrize("batch", [(), (2,)])
def test_gray_images_use_the_averages_and_get_three_channels(batch: tuple[int, ...]):
    images = torch.rand(*batch, 1, 4, 5)
    colors = denormalize((images - 0.5) / 0.25, MEAN, STD)
    torch.testing.assert_close(colors, images.expand(*batch, 3, 4, 5))


def test_colors_are_clamped():
    colors = denormalize(torch.tensor([-9.0, 9.0]).view(2, 1, 1, 1), MEAN, STD)
    assert colors[:, 0].flatten().tolist() == [0, 1]


@pytest.mark.parametrize("size", [(3000, 1), (1, 3001), (400, 3), (4, 301), (128, 2), (5, 7)])
def test_long_images_keep_their_center(size: tuple[int, int]):
    image = Image.frombytes("L", size, bytes(index % 251 for index in range(size[0] * size[1])))
    width, height = (min(side, 64 * min(size)) for side in size)
    found = limit_aspect_ratio(image)
    assert found.size == (width, height)
    assert found.tobytes() == center_crop(image, [height, width]).tobytes()
