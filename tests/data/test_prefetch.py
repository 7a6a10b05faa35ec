"""Prefetching: the same batches in the same order, on the device."""

import pytest
import torch

from data.prefetch import to_device


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_loaders_deliver_to_a_gpu():
    from data import build_loaders
    from vil.config import AugmentConfig, DataConfig

    def run(device):
        options = {"image_size": 32, "in_chans": 3, "batch_size": 128, "accumulation": 2, "seed": 0}
        loaders = build_loaders(DataConfig(workers=2), AugmentConfig(), **options, device=device)
        return list(loaders.train.epoch(0)) + list(loaders.validation)

    for (images, targets), (out, out_targets) in zip(run("cpu"), run("cuda")):
        assert out.device.type == "cuda"
        assert torch.equal(out.cpu(), images)
        assert torch.equal(out_targets.cpu(), targets)
