"""Batches on the device: in the same order, normalized and erased as single images are."""

import dataclasses

import pytest
import torch
from helpers.fake_gpu import NoHostWaits, fake_gpu
from helpers.loading import load

from data.samplers import replacement_indices
from data.sources import open_source
from data.to_device import to_device
from data.transforms import train_transform
from vil.config import AugmentConfig, DataConfig
from vil.runtime.seeding import seeded


def unchanged(images):
    return images


def batches(count=5):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, 8, 8, generator=generator), torch.arange(4) + 10 * i) for i in range(count)]


def test_on_the_cpu_nothing_is_copied():
    given = batches()
    for (images, targets), (out, out_targets) in zip(given, to_device(given, torch.device("cpu"), unchanged)):
        assert out.data_ptr() == images.data_ptr()
        assert out_targets is targets


def test_on_the_cpu_no_batch_is_loaded_early():
    loaded = []
    stream = to_device(
        (loaded.append(i) or batch for i, batch in enumerate(batches())), torch.device("cpu"), unchanged
    )
    next(stream)
    assert loaded == [0]


def test_channels_last_changes_the_layout_alone():
    given = batches()
    for (images, _), (out, _) in zip(
        given, to_device(given, torch.device("cpu"), unchanged, channels_last=True)
    ):
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(out, images)


def test_no_batches():
    assert list(to_device([], torch.device("cpu"), unchanged)) == []


def test_on_a_gpu_a_batch_is_yielded_before_the_next_is_loaded(monkeypatch):
    """And moved on a side stream, on which the current stream waits; the host does not."""
    events = []

    class Stream:
        def __init__(self, name):
            self.name = name if isinstance(name, str) else "side"

        def __enter__(self):
            events.append(f"enter {self.name}")

        def __exit__(self, *_):
            events.append(f"leave {self.name}")

        def record_event(self):
            events.append(f"record {self.name}")
            return self.name

        def wait_event(self, event):
            events.append(f"{self.name} waits for {event}")

    def load_batches():
        for index, batch in enumerate(batches(2)):
            events.append(f"load {index}")
            yield batch

    def finish(images):
        events.append("finish")
        return images

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream("current"))
    used = []
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: used.append((tensor, stream.name))
    )
    moved = ["enter side", "finish", "record side", "leave side", "current waits for side"]
    with fake_gpu(monkeypatch), NoHostWaits():
        for index, batch in enumerate(to_device(load_batches(), torch.device("cuda"), finish)):
            assert events == [f"load {index}", *moved]
            assert all(tensor.is_cuda for tensor in batch)
            assert [(id(tensor), stream) for tensor, stream in used] == [(id(x), "current") for x in batch]
            events.clear()
            used.clear()
    assert index == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_on_a_gpu_batches_arrive_in_order_and_complete(count, channels_last):
    given = batches(count)
    pinned = [(images.pin_memory(), targets.pin_memory()) for images, targets in given]
    arrived = []
    for images, targets in to_device(pinned, torch.device("cuda"), unchanged, channels_last):
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


def transformed(views, keys):
    """Images and targets that the transform makes of single images, without loaders and batches."""
    pairs = []
    for key in keys:
        with seeded(views.seed, "augmentation", *key):
            pairs.append((views.transform(views.source.read(key[1])), int(views.source.targets[key[1]])))
    images, targets = zip(*pairs)
    return torch.stack(images), torch.tensor(targets)


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
@pytest.mark.parametrize("in_chans", [3, 1])
def test_batches_are_normalized_and_erased_as_single_images(folder_data, mode, in_chans):
    augment = AugmentConfig(
        auto_augment="rand-m9-mstd0.5-inc1" if in_chans == 3 else None,
        random_erasing=0.7,
        random_erasing_mode=mode,
        random_erasing_count=3,
    )
    train = load(folder_data, augment, batch_size=6, in_chans=in_chans, seed=7).train
    without = load(
        folder_data, dataclasses.replace(augment, random_erasing=0.0), batch_size=6, in_chans=in_chans
    )
    for epoch in range(2):
        train.micro_batches.set_epoch(epoch)
        for keys, batch in zip(list(train.micro_batches), train.epoch(epoch), strict=True):
            images, targets = transformed(train.views, keys)
            assert torch.equal(batch[0], images)
            assert torch.equal(batch[1], targets)
            assert batch[0].stride() == images.stride()
            assert batch[0].dtype == torch.float32
    assert not torch.equal(next(train.epoch(0))[0], next(without.train.epoch(0))[0])


def test_images_are_normalized_by_division_by_255_and_erased_as_by_timm(folder_data):
    """In float32, as timm's transforms compute; the loaders' CPU results are part of a run's identity."""
    augment = AugmentConfig(random_erasing=1.0)
    transform = train_transform(augment, folder_data, image_size=32, in_chans=3)
    image = open_source(folder_data, "train", 3).read(0)
    with seeded(0, "test"):
        result = transform(image)
    with seeded(0, "test"):
        pixels = transform.pixels(image)
        mean, std = (torch.tensor(value)[:, None, None] for value in (transform.mean, transform.std))
        expected = transform.erasing((pixels.contiguous().float() / 255 - mean) / std)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("channels_last", [False, True])
def test_evaluation_batches_are_normalized_as_single_images(folder_data, channels_last):
    validation = load(folder_data, batch_size=4, image_size=24, channels_last=channels_last).validation
    source, transform = validation._loader.dataset.source, validation._loader.dataset.transform
    images, targets = map(torch.cat, zip(*validation))
    assert torch.equal(images, torch.stack([transform(source.read(index)) for index in range(len(source))]))
    assert targets.tolist() == source.targets.tolist()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert all(batch.is_contiguous(memory_format=layout) for batch, _ in validation)


def test_a_replacement_has_the_erasing_drawn_for_it(folder_data, image_folder):
    (image_folder / "train/cat/0.png").write_bytes(b"")
    folder_data.unreadable_images = "skip"
    train = load(folder_data, AugmentConfig(random_erasing=1.0), batch_size=12).train
    ((images, _),) = train.epoch(0)
    keys = next(iter(train.micro_batches))
    (position,) = (
        i for i, key in enumerate(keys) if train.views.source.describe(key[1]).endswith("cat/0.png")
    )
    key = keys[position]
    other = next(replacement_indices(0, 0, 12, key[1]))
    with seeded(0, "augmentation", *key):
        expected = train.views.transform(train.views.source.read(other))
    assert torch.equal(images[position], expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_loaders_deliver_to_a_gpu():
    def run(device):
        augment = AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5)
        options = {"batch_size": 128, "accumulation": 2, "device": torch.device(device)}
        loaders = load(DataConfig(workers=2), augment, **options)
        return list(loaders.train.epoch(0)) + list(loaders.validation)

    for (images, targets), (out, out_targets) in zip(run("cpu"), run("cuda"), strict=True):
        assert out.device.type == "cuda"
        assert torch.equal(out.cpu(), images)
        assert torch.equal(out_targets.cpu(), targets)
