"""Prefetching: the same batches in the same order, on the device."""

import pytest
import torch

from data import build_loaders
from data.bad_images import BadImages
from data.loaders import EvaluationImages, TrainingViews, TrainLoader, ValidationLoader
from data.prefetch import to_device
from data.samplers import MicroBatches
from data.sources import open_source
from data.transforms import evaluation_transform, train_transform
from vil.config import AugmentConfig, DataConfig


def batches(count=5):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, 8, 8, generator=generator), torch.arange(4) + 10 * i) for i in range(count)]


def test_on_the_cpu_nothing_is_copied():
    given = batches()
    for (images, targets), (out, out_targets) in zip(given, to_device(given, torch.device("cpu"))):
        assert out.data_ptr() == images.data_ptr()
        assert out_targets is targets


def test_on_the_cpu_no_batch_is_asked_for_early():
    asked = []
    stream = to_device((asked.append(i) or batch for i, batch in enumerate(batches())), torch.device("cpu"))
    next(stream)
    assert asked == [0]


def test_channels_last_changes_the_layout_alone():
    given = batches()
    for (images, _), (out, _) in zip(given, to_device(given, torch.device("cpu"), channels_last=True)):
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(out, images)


def test_no_batches_are_no_batches():
    assert list(to_device([], torch.device("cpu"))) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_on_a_gpu_batches_arrive_in_order_and_whole(count, channels_last):
    given = batches(count)
    pinned = [(images.pin_memory(), targets.pin_memory()) for images, targets in given]
    arrived = []
    for images, targets in to_device(pinned, torch.device("cuda"), channels_last):
        assert images.device.type == targets.device.type == "cuda"
        assert not channels_last or images.is_contiguous(memory_format=torch.channels_last)
        big = torch.randn(2000, 2000, device="cuda")
        for _ in range(10):  # keep the device busy, and the allocator too
            big = big @ big / 2000
        arrived.append((images * 1, targets * 1))
        del images, targets
    assert len(arrived) == count
    for (images, targets), (out, out_targets) in zip(given, arrived):
        assert torch.equal(out.cpu(), images)
        assert torch.equal(out_targets.cpu(), targets)


def views_of(image_folder, augment, *, bytes_first, in_chans=3):
    """Batches of six training views, normalised in the workers or, as for a GPU, from bytes on the device."""
    data = DataConfig("folder", str(image_folder), on_error="skip", max_bad=1.0)
    views = TrainingViews(
        open_source(data, "train", in_chans),
        train_transform(augment, data, image_size=32, in_chans=in_chans),
        7,
        "skip",
        normalised=not bytes_first,
        planned=bytes_first,
    )
    order = MicroBatches(len(views.source), 6, 1, 7)
    loader = TrainLoader(views, order, 1, torch.device("cpu"), False, BadImages(12, 1.0, None))
    return list(loader.epoch(0)) + list(loader.epoch(1))


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
@pytest.mark.parametrize("in_chans", [3, 1])
def test_bytes_finished_on_the_device_are_the_same_images(image_folder, mode, in_chans):
    policy = "rand-m9-mstd0.5-inc1" if in_chans == 3 else None
    augment = AugmentConfig(
        auto_augment=policy, random_erasing=0.7, random_erasing_mode=mode, random_erasing_count=3
    )
    before, after = (views_of(image_folder, augment, bytes_first=b, in_chans=in_chans) for b in (False, True))
    without = views_of(image_folder, AugmentConfig(auto_augment=policy), bytes_first=True, in_chans=in_chans)
    assert len(before) == len(after) == 4
    for (images, targets), (out, out_targets), (bare, _) in zip(before, after, without):
        assert out.dtype == torch.float32
        assert out.is_contiguous()
        assert torch.equal(out, images)
        assert torch.equal(out_targets, targets)
        assert not torch.equal(out, bare)


def test_a_replaced_image_brings_its_own_erasing(image_folder):
    (image_folder / "train/cat/0.png").write_bytes(b"")
    augment = AugmentConfig(random_erasing=1.0)
    for (images, _), (out, _) in zip(
        *(views_of(image_folder, augment, bytes_first=b) for b in (False, True))
    ):
        assert torch.equal(out, images)


def test_evaluation_from_bytes_is_the_same(image_folder):
    data = DataConfig("folder", str(image_folder))
    transform = evaluation_transform(data, image_size=24, in_chans=3)
    loaders = [
        ValidationLoader(
            EvaluationImages(open_source(data, "val", 3), transform, normalised),
            4, 0, torch.device("cpu"), channels_last, 0, 1,
        )
        for normalised, channels_last in ((True, False), (False, True))
    ]  # fmt: skip
    for (images, targets), (out, out_targets) in zip(*loaders, strict=True):
        assert torch.equal(out, images)
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(out_targets, targets)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_loaders_deliver_to_a_gpu():
    def run(device):
        options = {"image_size": 32, "in_chans": 3, "batch_size": 128, "accumulation": 2, "seed": 0}
        augment = AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5)
        loaders = build_loaders(DataConfig(workers=2), augment, **options, device=device)
        return list(loaders.train.epoch(0)) + list(loaders.validation)

    for (images, targets), (out, out_targets) in zip(run("cpu"), run("cuda"), strict=True):
        assert out.device.type == "cuda"
        assert torch.equal(out.cpu(), images)
        assert torch.equal(out_targets.cpu(), targets)
