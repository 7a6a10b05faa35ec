"""Loaders: the same batches for any number of workers and ranks, resumed exactly; errors on one line."""

import dataclasses
import itertools
import os
import pickle
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from helpers import forked
from helpers.loading import load as load_options
from helpers.loading import load_validation
from helpers.sample_images import NO_AUGMENT, generator_states, write_image

from data.workers import explain_shared_memory, iterate
from vil.config import AugmentConfig, DataConfig
from vil.errors import UserError

ROOT = Path(__file__).parents[2]
RECIPE = AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.25)


def load(data=None, augment=RECIPE, **options):
    return load_options(data or DataConfig(workers=0), augment, **{"batch_size": 128, **options})


def equal(batches, others):
    batches, others = list(batches), list(others)
    assert len(batches) == len(others) > 0
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(batches, others))


def test_shapes_types_and_counts_of_batches():
    loaders = load(accumulation=2)
    assert loaders.train.steps_per_epoch == 1437 // 128
    assert loaders.class_names == tuple("0123456789")
    batches = list(loaders.train.epoch(0))
    assert len(batches) == 2 * loaders.train.steps_per_epoch
    for images, targets in batches:
        assert (images.shape, images.dtype) == ((64, 3, 32, 32), torch.float32)
        assert (targets.shape, targets.dtype) == ((64,), torch.int64)
    assert loaders.validation.num_images == sum(len(targets) for _, targets in loaders.validation) == 360
    assert len(list(loaders.validation)) == len(loaders.validation) == 6


def test_batches_do_not_depend_on_the_number_of_workers():
    """Also not in a second epoch, from the middle of one, after one that was abandoned, or in evaluation."""

    def run(workers):
        loaders = load(DataConfig(workers=workers), accumulation=2)
        batches = list(loaders.train.epoch(0, start=6)) + list(loaders.train.epoch(1, start=7))
        batches += itertools.islice(loaders.train.epoch(2), 3)
        batches += list(loaders.train.epoch(3, start=9))
        return batches + list(loaders.validation) + list(loaders.validation)

    assert equal(run(0), run(2))


def test_epochs_and_seeds_differ_and_repeat_themselves():
    def tail(loaders, epoch):
        return list(loaders.train.epoch(epoch, start=10))

    loaders = load()
    first = tail(loaders, 0)
    assert equal(first, tail(loaders, 0))
    assert equal(first, tail(load(), 0))
    assert not equal(first, tail(loaders, 1))
    assert not equal(first, tail(load(seed=1), 0))


def test_augmentation_differs_in_every_epoch_and_view(folder_data):
    loaders = load(folder_data, dataclasses.replace(RECIPE, repeated_augmentation=3), batch_size=12)
    for epoch in range(2):
        ((images, _),) = loaders.train.epoch(epoch)
        assert len(torch.unique(images, dim=0)) == 12
    (first, _), (second, _) = (next(loaders.train.epoch(epoch)) for epoch in range(2))
    assert not (first[:, None] == second[None]).flatten(2).all(2).any()


def test_start_skips_steps_without_loading_them(folder_data, monkeypatch):
    loaders = load(folder_data, batch_size=4, accumulation=2)
    whole = list(loaders.train.epoch(5))
    read = []
    source = loaders.train._loader.dataset.source
    read_image = source.read
    monkeypatch.setattr(source, "read", lambda index: read.append(index) or read_image(index))
    assert equal(whole[4:], loaders.train.epoch(5, start=2))
    assert len(read) == 4
    assert list(loaders.train.epoch(5, start=3)) == []


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (1, 4), (3, 2)])
def test_ranks_and_accumulation_share_one_global_batch(world_size, accumulation):
    def rows(loaders_of_ranks):
        found = []
        for parts in zip(*(loaders.train.epoch(1, start=10) for loaders in loaders_of_ranks)):
            images = torch.cat([images for images, _ in parts]).flatten(1)
            targets = torch.cat([targets for _, targets in parts])
            found += [(int(target), image.numpy().tobytes()) for image, target in zip(images, targets)]
        return sorted(found)

    one = rows([load(batch_size=120)])
    many = rows(
        load(batch_size=120, accumulation=accumulation, rank=rank, world_size=world_size)
        for rank in range(world_size)
    )
    assert len(one) == 120
    assert one == many


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_validate_each_image_exactly_once(folder_data, world_size):
    data = dataclasses.replace(folder_data, val_split="train", crop_pct=1.0)
    whole = load_validation(data, image_size=16, batch_size=5)
    images = torch.cat([images for images, _ in whole.loader])
    parts = [
        load_validation(data, image_size=16, batch_size=2, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert all(part.loader.num_images == len(images) == 12 for part in parts)
    for rank, part in enumerate(parts):
        mine = torch.cat([images for images, _ in part.loader])
        assert torch.equal(mine, images[rank::world_size])


def test_a_rank_may_have_nothing_to_validate(folder_data):
    for workers in (0, 1):
        data = dataclasses.replace(folder_data, workers=workers)
        part = load_validation(data, image_size=16, batch_size=2, rank=7, world_size=8)
        assert (len(part.loader), list(part.loader), part.loader.num_images) == (0, [], 6)


def test_validation_is_never_augmented_and_needs_no_training_split(folder_data, image_folder):
    (image_folder / "train").rename(image_folder / "elsewhere")
    validation = load_validation(folder_data, image_size=16, in_chans=1, batch_size=4)
    assert validation.class_names == ("ant", "bear", "cat")
    assert equal(validation.loader, validation.loader)
    assert next(iter(validation.loader))[0].shape == (4, 1, 16, 16)


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_does_not_change_global_generators(workers):
    loaders = load(DataConfig(workers=workers), batch_size=480)
    states = generator_states()
    list(loaders.train.epoch(0))
    list(loaders.validation)
    assert generator_states() == states


def test_gray_images(folder_data):
    loaders = load(folder_data, in_chans=1, batch_size=4)
    images, _ = next(loaders.train.epoch(0))
    assert images.shape == (4, 1, 32, 32)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_damaged_image_is_a_one_line_error_with_its_name(folder_data, image_folder, workers, split):
    victim = image_folder / split / "bear/1.png"
    victim.write_bytes(victim.read_bytes()[:200])
    loaders = load(dataclasses.replace(folder_data, workers=workers), batch_size=12)
    line = rf"^data\.root: {re.escape(str(victim))}: cannot be read: [^\n]+$"
    with pytest.raises(UserError, match=line):
        list(loaders.train.epoch(0) if split == "train" else loaders.validation)


def test_mixing_needs_an_even_number_of_images_before_training_starts(folder_data):
    for augment in (AugmentConfig(mixup=0.8), AugmentConfig(cutmix=1.0)):
        with pytest.raises(UserError) as error:
            load(folder_data, augment, batch_size=6, accumulation=2)
        assert error.value.location == "schedule.batch_size"
    load(folder_data, AugmentConfig(), batch_size=6, accumulation=2)


def test_classes_of_both_splits_must_agree(image_folder):
    data = DataConfig(source="torch/image_folder", root=str(image_folder), workers=0)
    assert len(load(data, batch_size=4).class_names) == 3
    (image_folder / "val/bear").rename(image_folder / "val/dog")
    with pytest.raises(UserError, match=r"'cat'.*'bear'") as error:
        load(data, batch_size=4)
    assert error.value.location == "data.val_split"
    write_image(image_folder / "val/zebra/0.png", 1)
    (image_folder / "val/dog").rename(image_folder / "val/bear")
    with pytest.raises(UserError, match="4 classes"):
        load(data, batch_size=4)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"batch_size": 4096}, "schedule.batch_size"),
        ({"batch_size": 30, "world_size": 4}, "schedule.batch_size"),
    ],
)
def test_impossible_batches_are_rejected(options, key):
    with pytest.raises(UserError) as error:
        load(**options)
    assert error.value.location == key


def test_views_can_be_pickled(folder_data):
    """Python 3.14 starts workers by forkserver, which pickles the data set."""
    views = load(folder_data, batch_size=4).train._loader.dataset
    arrived = pickle.loads(pickle.dumps(views))
    assert torch.equal(arrived[1, 5, 0].content[0], views[1, 5, 0].content[0])


def test_channels_last_layout(folder_data):
    loaders = load(folder_data, batch_size=4, channels_last=True)
    images, _ = next(loaders.train.epoch(0))
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, next(load(folder_data, batch_size=4).train.epoch(0))[0])


def test_an_unaugmented_training_image_is_the_evaluation_image():
    data = DataConfig(workers=0, crop_pct=1.0, val_split="train")
    loaders = load(data, AugmentConfig(**NO_AUGMENT), batch_size=1437)
    ((images, targets),) = loaders.train.epoch(0)
    order = [index for _, index, _ in next(iter(loaders.train.micro_batches))]
    ((plain, plain_targets),) = loaders.validation
    assert torch.equal(images, plain[order])
    assert torch.equal(targets, plain_targets[order])


def test_photographs_are_the_same_for_any_number_of_workers(photographs):
    def run(workers):
        data = DataConfig(source="folder", root=photographs, val_split="train", workers=workers)
        return load(data, image_size=96, batch_size=64).train.epoch(0, start=2)

    assert equal(run(0), run(2))


def test_workers_are_forked_with_signals_blocked():
    """Until they ignore it, a Ctrl-C would be handled by their copy of the trainer's handler."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])

    class Loader:
        def __iter__(self):
            return iter([signal.pthread_sigmask(signal.SIG_BLOCK, [])])

    assert next(iterate(Loader())) >= {signal.SIGINT, signal.SIGTERM}
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


SMALL_SHARED_MEMORY = """
import torch
from data import build_loaders
from vil.config import DataConfig, ModelConfig, ScheduleConfig, TrainConfig
from vil.errors import UserError
from vil.runtime.distributed import Process
config = TrainConfig(ModelConfig(image_size=224), ScheduleConfig(batch_size=64), DataConfig(workers=2))
try:
    list(build_loaders(config, Process(0, 0, 1, torch.device("cpu"))).train.epoch(0))
except UserError as error:
    print(error)
"""


MOUNT = """
import ctypes, subprocess
NEW_MOUNTS = 0x20000
if ctypes.CDLL(None).unshare(NEW_MOUNTS) == 0:
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", "/dev/shm"], check=True)
"""


def run_with_small_shared_memory(program):
    """Standard output of a Python program for which /dev/shm has 4 MB, as in a container."""
    mount = "mount -t tmpfs -o size=4m tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("a small /dev/shm needs the right to mount one")
    line = [forked.python(), "-c", MOUNT + program]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=100).stdout


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs Linux")
def test_too_little_shared_memory_is_a_one_line_error_with_advice():
    message = run_with_small_shared_memory(SMALL_SHARED_MEMORY)
    assert message.startswith("data.workers: shared memory, /dev/shm (4 MB), is too small")
    assert message.count("\n") == 1
    for advice in ("--shm-size", "--ipc=host", "--data.workers 0"):
        assert advice in message


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "Caught RuntimeError in DataLoader worker process 0.\nunable to allocate shared memory(shm) for "
            "file </torch_1_2_0>: No space left on device (28)",
            UserError,
        ),
        (
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's "
            "workers are out of shared memory. Please try to raise your shared memory limit.",
            UserError,
        ),
        ("unable to write to file </torch_1_2_0>: No space left on device (28)", UserError),
        ("unable to allocate shared memory(shm) for file </torch_1_2_0>: Success (0)", UserError),  # 2.11
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", RuntimeError),
    ],
)
def test_only_shared_memory_is_explained(message, expected):
    def batches():
        yield 1
        raise RuntimeError(message)

    loaded = explain_shared_memory(batches())
    assert next(loaded) == 1
    with pytest.raises(expected) as error:
        next(loaded)
    assert type(error.value) is expected


ORPHANS = """
import multiprocessing, os, sys, torch
from torch.utils.data import DataLoader, Dataset
from data import workers

class Unanswered(Dataset):
    def __getitem__(self, index):
        with open(sys.argv[1], "a") as file:
            file.write(f"{os.getpid()}\\n")
        open(sys.argv[2]).read()  # a pipe without a writer blocks like a dead mount

    def __len__(self):
        return 8

if __name__ == "__main__":
    init = {"train": workers.init_worker, "predict": workers.exit_with_parent}[sys.argv[3]]
    multiprocessing.set_start_method(sys.argv[4])
    list(DataLoader(Unanswered(), 1, num_workers=2, worker_init_fn=init))
"""


def is_running(pid):
    """Return True unless the process has ended, or is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs Linux")
@pytest.mark.parametrize("start", ["fork", "forkserver"])
@pytest.mark.parametrize("init", ["train", "predict"])
def test_workers_end_with_the_trainer_even_if_a_file_blocks(init, start, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    script = tmp_path / "script.py"
    script.write_text(ORPHANS)  # a file, which workers of a fork server import
    line = [forked.python(), str(script), str(tmp_path / "pids"), str(tmp_path / "pipe"), init, start]
    trainer = subprocess.Popen(line, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        end = time.monotonic() + 60
        pids = []
        while len(pids) < 2 and time.monotonic() < end:
            time.sleep(0.1)
            pids = (tmp_path / "pids").read_text().split() if (tmp_path / "pids").exists() else []
        assert len(pids) == 2
        assert all(map(is_running, pids))
    finally:
        trainer.kill()
        trainer.wait()
    end = time.monotonic() + 15
    while any(map(is_running, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    left = [pid for pid in pids if is_running(pid)]
    for pid in left:
        os.kill(int(pid), signal.SIGKILL)
    assert left == []


def test_balanced_sampling_draws_all_classes_equally_often(tmp_path):
    for name, count in (("cat", 12), ("bear", 3), ("ant", 1)):
        for number in range(count):
            write_image(tmp_path / "train" / name / f"{number:02}.png", number, (8, 8))
        write_image(tmp_path / "val" / name / "0.png", 0, (8, 8))
    data = DataConfig(source="folder", root=str(tmp_path), workers=0)
    options = {"batch_size": 6, "image_size": 8, "accumulation": 2}
    plain = load(data, AugmentConfig(**NO_AUGMENT), **options)
    assert plain.class_counts == [1, 3, 12]  # ant, bear, cat
    loaders = load(dataclasses.replace(data, balanced_sampling=True), AugmentConfig(**NO_AUGMENT), **options)
    assert loaders.class_counts == plain.class_counts
    assert loaders.train.steps_per_epoch == plain.train.steps_per_epoch == 2
    batches = list(loaders.train.epoch(0))
    assert torch.cat([targets for _, targets in batches]).bincount().tolist() == [4, 4, 4]
    assert equal(batches[2:], loaders.train.epoch(0, start=1))
    with pytest.raises(UserError) as refused:
        load(
            dataclasses.replace(data, balanced_sampling=True),
            AugmentConfig(**NO_AUGMENT),
            class_weights="balanced",
            **options,
        )
    reason = "schedule.class_weights balanced would correct the imbalance twice; use one of them"
    assert str(refused.value) == f"data.balanced_sampling: {reason}"
