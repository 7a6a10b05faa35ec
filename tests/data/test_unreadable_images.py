"""Unreadable images: fail names the first one, skip replaces and lists them, and memory does not grow."""

import logging
import os

import numpy as np
import pytest
import torch
from helpers.loading import load as load_options
from helpers.sample_images import write_image

from data.order import EpochOrder
from data.samplers import replacement_indices
from vil.config import DataConfig
from vil.errors import UserError


@pytest.fixture
def corrupt(tmp_path):
    """Return the configuration of 200 images in 2 classes and 5 unreadable ones, and the paths of these."""
    for split, count in (("train", 100), ("val", 5)):
        for index, name in enumerate(("ant", "bear")):
            for number in range(count):
                write_image(tmp_path / split / name / f"{number:03}.jpg", 1000 * index + number, (20, 20))
    folder = tmp_path / "train/ant"
    whole = (folder / "000.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("no image")
    (folder / "folder.jpg").mkdir()
    (folder / "link.jpg").symlink_to("nowhere.jpg")
    data = DataConfig(
        source="folder", root=str(tmp_path), workers=0, unreadable_images="skip", max_unreadable_fraction=0.03
    )
    return data, {str(folder / f"{n}.jpg") for n in ("truncated", "empty", "text", "folder", "link")}


def load(data, output=None, **options):
    return load_options(data, **{"image_size": 16, "batch_size": 41, **options}, output=output)


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_lists_exactly_the_unreadable_images(corrupt, tmp_path, workers):
    data, unreadable = corrupt
    data.workers = workers
    loaders = load(data, tmp_path / "run")
    for epoch in range(2):
        assert [len(targets) for _, targets in loaders.train.epoch(epoch)] == [41] * 5
    listed = (tmp_path / "run/bad_images.txt").read_text().splitlines()
    assert len(listed) == 5
    assert set(listed) == unreadable


def test_a_continued_run_and_other_ranks_list_nothing_twice(corrupt, tmp_path):
    data, unreadable = corrupt
    for rank in (0, 1, 0):
        list(load(data, tmp_path / "run", batch_size=40, rank=rank, world_size=2).train.epoch(rank))
    list(load(data, tmp_path / "run").train.epoch(0))
    listed = (tmp_path / "run/bad_images.txt").read_text().splitlines()
    assert len(listed) == len(set(listed)) == 5
    assert set(listed) == unreadable


def test_the_next_readable_image_of_the_epoch_replaces_an_unreadable_one(corrupt):
    data, unreadable = corrupt
    loaders = load(data)
    views = loaders.train._loader.dataset
    order = EpochOrder(0, len(views.source)).indices(0, np.arange(len(views.source)))
    bad = next(index for index in order.tolist() if views.source.describe(index) in unreadable)
    others = list(replacement_indices(0, 0, len(views.source), bad))
    position = order.tolist().index(bad)
    assert others == [*order[position + 1 :].tolist(), *order[:position].tolist()]
    expected = next(index for index in others if views.source.describe(index) not in unreadable)
    read = []
    original_read = views.source.read
    views.source.read = lambda index: read.append(index) or original_read(index)
    replaced = views[0, bad, 0]
    assert read[-1] == expected
    assert [image.image for image in replaced.unreadable] == [views.source.describe(i) for i in read[:-1]]


def test_skipping_is_the_same_for_any_number_of_workers_and_after_a_resume(corrupt):
    data, _ = corrupt
    first = list(load(data).train.epoch(3))
    data.workers = 2
    second = list(load(data).train.epoch(3))
    resumed = list(load(data).train.epoch(3, start=2))
    for one, other in (*zip(first, second, strict=True), *zip(first[2:], resumed, strict=True)):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


@pytest.mark.parametrize("workers", [0, 1])
def test_fail_names_the_file_and_stops(corrupt, workers):
    data, unreadable = corrupt
    data.workers, data.unreadable_images = workers, "fail"
    with pytest.raises(UserError) as error:
        list(load(data, batch_size=205).train.epoch(0))
    assert error.value.location == "data.root"
    assert any(f"{path}: cannot be read: " in error.value.reason for path in unreadable)
    assert "\n" not in str(error.value)


def test_too_many_stop_the_run_with_one_line(corrupt, tmp_path):
    data, _ = corrupt
    data.max_unreadable_fraction = 0.02
    with pytest.raises(UserError) as error:
        list(load(data, tmp_path / "run").train.epoch(0))
    assert error.value.location == "data.max_unreadable_fraction"
    assert "5 of 205 training images cannot be read" in error.value.reason
    assert str(tmp_path / "run/bad_images.txt") in error.value.reason
    assert "\n" not in str(error.value)


def test_one_image_may_be_unreadable_in_a_small_set(folder_data, image_folder):
    """0.001, the default, of 12 images is less than one."""
    (image_folder / "train/ant/1.png").write_bytes(b"")
    folder_data.unreadable_images = "skip"
    assert sum(len(targets) for _, targets in load(folder_data, batch_size=12).train.epoch(0)) == 12
    folder_data.max_unreadable_fraction = 0.0
    with pytest.raises(UserError, match="1 of 12 training images cannot be read"):
        list(load(folder_data, batch_size=12).train.epoch(0))
    folder_data.max_unreadable_fraction = 0.001
    (image_folder / "train/ant/2.png").write_bytes(b"")
    with pytest.raises(UserError, match="2 of 12 training images cannot be read"):
        list(load(folder_data, batch_size=12).train.epoch(0))


def test_a_set_without_a_readable_image_ends(tmp_path):
    for split in ("train", "val"):
        for name in ("ant", "bear"):
            path = tmp_path / split / name / "0.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
    data = DataConfig(
        source="folder", root=str(tmp_path), workers=0, unreadable_images="skip", max_unreadable_fraction=1.0
    )
    loaders = load(data, batch_size=2)
    with pytest.raises(UserError, match="cannot be read"):
        list(loaders.train.epoch(0))
    assert list(loaders.validation) == []
    assert loaders.validation.unreadable == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_counts_and_logs_omitted_images(corrupt, tmp_path, workers, caplog):
    data, _ = corrupt
    data.workers = workers
    victim = tmp_path / "val/bear/002.jpg"
    victim.write_bytes(b"")
    loaders = load(data)
    for _ in range(2):
        with caplog.at_level(logging.WARNING, "vil.data"):
            assert sum(len(targets) for _, targets in loaders.validation) == 9
        assert (loaders.validation.unreadable, loaders.validation.num_images) == (1, 10)
    assert str(victim) in caplog.text
    data.unreadable_images = "fail"
    with pytest.raises(UserError, match=f"{victim}: cannot be read"):
        list(load(data).validation)


def resident(process):
    """Kilobytes of the process in memory."""
    with open(f"/proc/{process}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_memory_and_open_files_do_not_grow_over_twenty_epochs(corrupt):
    data, _ = corrupt
    data.workers = 1
    loaders = load(data)
    sizes, files = [], []
    for epoch in range(20):
        for _ in loaders.train.epoch(epoch):
            pass
        for _ in loaders.validation:
            pass
        (worker,) = loaders.train._loader._iterator._workers
        sizes.append([resident(worker.pid), resident(os.getpid())])
        files.append([len(os.listdir(f"/proc/{pid}/fd")) for pid in (worker.pid, os.getpid())])
    for last, second in zip(sizes[-1], sizes[1]):
        assert last < 1.05 * second
    assert files[-1] == files[1]
