"""AugMix training: the views of an image, their order in a batch, and runs with the Jensen-Shannon loss."""

from pathlib import Path

import pytest
import torch
from helpers import tiny_run
from helpers.loading import load
from helpers.run_files import is_equal, records
from helpers.tiny_run import CPU, find_last, load_last, make_config
from PIL import Image
from torch import nn

from data import build_loaders
from data.transforms import train_transform
from vil.config import AugmentConfig, DataConfig, ModelConfig
from vil.errors import UserError

AUGMIX = {"auto_augment": "augmix-m3-w3", "random_erasing": 0.5}
DIGITS = DataConfig(workers=0)
PART = DataConfig(workers=0, train_fraction=0.25)  # five batches of 64 images


@pytest.mark.parametrize("in_chans", [1, 3])
def test_the_first_view_is_cropped_and_flipped_only(in_chans: int):
    plain = load(DIGITS, AugmentConfig(), batch_size=6, image_size=16, in_chans=in_chans)
    split = load(
        DIGITS, AugmentConfig(aug_splits=3, **AUGMIX), batch_size=6, image_size=16, in_chans=in_chans
    )
    (clean, targets), (images, split_targets) = (next(x.train.epoch(2)) for x in (plain, split))
    assert images.shape == (18, in_chans, 16, 16)
    assert torch.equal(targets, split_targets)
    views = images.unflatten(0, (3, 6))
    assert torch.equal(views[0], clean)
    assert not any(torch.equal(a, b) for one, other in ((0, 1), (0, 2), (1, 2)) for a, b in
                   zip(views[one], views[other], strict=True))  # fmt: skip


def test_views_are_those_of_the_policy_on_the_first_view():
    """Without draws in the policy, the others are the clean view, solarized."""
    data = DataConfig(workers=0, mean=(0, 0, 0), std=(1, 1, 1))
    transform = train_transform(AugmentConfig(aug_splits=3, color_jitter=0.1), data, image_size=8, in_chans=3)
    transform.augment = [lambda image: image.point(lambda value: 255 - value)]
    image = torch.arange(3 * 20 * 20).view(20, 20, 3).numpy().astype("uint8")
    clean, first, second = transform.pixels(Image.fromarray(image))
    assert torch.equal(first, 255 - clean)
    assert torch.equal(second, first)


def test_batches_do_not_depend_on_workers_ranks_and_the_first_step():
    augment = AugmentConfig(aug_splits=3, repeated_augmentation=2, **AUGMIX)

    def batches(workers: int = 0, start: int = 87, **options: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        loaders = load(DataConfig(workers=workers), augment, batch_size=16, image_size=8, **options)
        return list(loaders.train.epoch(1, start))

    def rows(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> list[tuple[int, bytes]]:
        """Return target and views of each image."""
        return sorted(
            (int(target), views.numpy().tobytes())
            for images, targets in parts
            for target, views in zip(targets, images.unflatten(0, (3, -1)).transpose(0, 1), strict=True)
        )

    whole = batches()
    assert all(torch.equal(a, b) for one, other in zip(whole, batches(1), strict=True) for a, b in
               zip(one, other, strict=True))  # fmt: skip
    assert torch.equal(batches(start=88)[0][0], whole[1][0])
    parts = [part for rank in range(2) for part in batches(rank=rank, world_size=2, accumulation=2)]
    assert rows(parts) == rows(whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup": 0.8, **AUGMIX}, "cannot be combined with mixup and cutmix"),
        ({"cutmix_minmax": (0.2, 0.8), **AUGMIX}, "cannot be combined with mixup and cutmix"),
        ({}, "the views of an image would be equal: needs auto_augment, e.g. augmix-m3-w3"),
    ],
)
def test_impossible_combinations(options: dict[str, float], message: str):
    with pytest.raises(UserError) as refused:
        load(DIGITS, AugmentConfig(aug_splits=3, **options), batch_size=16)
    assert str(refused.value) == f"schedule.augment.aug_splits: {message}"


class Classifier(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(3 * 8 * 8, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


def run(folder: Path, dropout: float = 0.2, **options: int) -> list[dict[str, float]]:
    """Train on the digits, continuing the run in the folder, and return the records of its steps."""
    schedule = {"epochs": 2, "batch_size": 64, "augment": AugmentConfig(aug_splits=3, **AUGMIX), **options}
    config = make_config(folder, data=PART, model=ModelConfig(image_size=8), **schedule)
    loaders = build_loaders(config, CPU, is_new=True)
    tiny_run.run(config, Classifier(dropout), loaders, state=find_last(folder))
    return records(folder, "train")


def test_a_continued_run_is_bit_identical(tmp_path: Path):
    full = run(tmp_path / "full")
    run(tmp_path / "parts", max_steps=7)
    assert run(tmp_path / "parts")[7:] == full[7:]
    assert len(full) == 10
    one, other = (load_last(tmp_path / name)["model"] for name in ("full", "parts"))
    assert is_equal(one, other)


def test_accumulation_changes_nothing(tmp_path: Path):
    losses = [
        [record["loss"] for record in run(tmp_path / str(parts), dropout=0.0, accumulation=parts)]
        for parts in (1, 4)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
