"""The index of a data set: built once, rebuilt after a change, and never read while it is written."""

import json
import logging
import mmap
import multiprocessing
import os
import shutil
import signal
import tarfile
import time
import zipfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.sample_images import write_image
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data.index
import data.sources.folder
from data.decoding import UnreadableImageError, decoding_errors
from data.sources import open_source
from data.sources.folder import ImageFolder
from vil.command_line import resolve_train_command, run_program
from vil.config import DataConfig
from vil.errors import UserError


@pytest.fixture
def indexed(image_folder, folder_data, tmp_path):
    """The data set, not modified recently, with a folder for its indexes."""
    folder_data.index = str(tmp_path / "index")
    age(image_folder)
    return folder_data


def age(folder: Path) -> None:
    """Set the modification times of a folder and of all in it to an hour ago."""
    for path in (folder, *folder.rglob("*")):
        if "index" not in path.parts:
            os.utime(path, (time.time() - 3600,) * 2)


def contents(data, split="train"):
    source = open_source(data, split, 3)
    return source.class_names, [(source.name(i), int(source.targets[i])) for i in range(len(source))]


def index_files(data):
    return sorted(path.name for path in Path(data.index).iterdir())


@pytest.fixture
def calls(monkeypatch):
    """The folders that were listed."""
    calls, find_files = [], data.sources.folder.find_files

    def counted(root, *arguments):
        calls.append(Path(root).name)
        return find_files(root, *arguments)

    monkeypatch.setattr(data.sources.folder, "find_files", counted)
    return calls


def test_a_folder_is_listed_once(indexed, calls):
    expected = [contents(indexed, split) for split in ("train", "val")]
    assert calls == ["train", "val"]
    assert [contents(indexed, split) for split in ("train", "val")] == expected
    assert calls == ["train", "val"]
    assert len(index_files(indexed)) == 2  # no lock or temporary file remains
    indexed.index = "off"
    assert [contents(indexed, split) for split in ("train", "val")] == expected
    assert calls == ["train", "val"] * 2
    source = open_source(indexed, "train", 3)
    assert source.load(11)[1] == 2


def test_the_arrays_of_a_stored_index_are_mapped_from_the_first_start_on(indexed):
    for _ in range(2):
        base = open_source(indexed, "train", 3).targets
        while isinstance(base, np.ndarray):
            base = base.base
        assert isinstance(base.obj, mmap.mmap)


def test_validation_images_have_the_classes_of_training(indexed, image_folder):
    shutil.rmtree(image_folder / "val/bear")
    age(image_folder)
    for _ in range(2):
        names, images = contents(indexed, "val")
        assert names == ("ant", "bear", "cat")
        assert {target for _, target in images} == {0, 2}


CHANGES = {
    "add": lambda folder: write_image(folder / "train/cat/9.png", 1),
    "add in a new folder": lambda folder: write_image(folder / "train/cat/more/9.png", 1),
    "remove": lambda folder: (folder / "train/ant/0.png").unlink(),
    "rename": lambda folder: (folder / "train/ant/0.png").rename(folder / "train/ant/z.png"),
    "move": lambda folder: (folder / "train/ant/0.png").rename(folder / "train/cat/ant.png"),
    "add a class": lambda folder: write_image(folder / "train/dog/0.png", 1),
    "rename a class": lambda folder: (folder / "train/cat").rename(folder / "train/dog"),
    "remove a class": lambda folder: shutil.rmtree(folder / "train/cat"),
    "add a link": lambda folder: (folder / "train/cat/link").symlink_to(folder / "val/cat"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_index_is_made_again_after_a_change(indexed, image_folder, calls, change):
    before = contents(indexed)
    change(image_folder)
    changed = contents(indexed)
    assert changed != before
    assert len(calls) == 2
    indexed.index, stored = "off", indexed.index
    assert contents(indexed) == changed
    indexed.index = stored
    age(image_folder)
    for _ in range(2):
        assert contents(indexed) == changed
    assert len(calls) == 4  # and once more for the times that were set


def test_a_folder_that_was_modified_recently_is_listed_again(indexed, image_folder, calls):
    """File systems have coarse clocks: a change within a tick leaves the modification time as it is."""
    now = time.time_ns()
    os.utime(image_folder / "train/ant", ns=(now, now))
    contents(indexed)
    write_image(image_folder / "train/ant/9.png", 1)
    os.utime(image_folder / "train/ant", ns=(now, now))
    assert len(contents(indexed)[1]) == 13
    assert calls == ["train", "train"]


def test_a_changed_link_is_noticed(indexed, image_folder, tmp_path):
    write_image(tmp_path / "elsewhere/8.png", 1)
    (image_folder / "train/cat/link").symlink_to(tmp_path / "elsewhere")
    age(image_folder)
    assert len(contents(indexed)[1]) == 13
    write_image(tmp_path / "elsewhere/9.png", 1)
    assert len(contents(indexed)[1]) == 14


def test_skipped_files_are_reported_at_every_start(indexed, image_folder, caplog):
    (image_folder / "train/ant/notes.txt").touch()
    age(image_folder)
    with caplog.at_level(logging.WARNING, "vil.data"):
        contents(indexed)
        contents(indexed)
    reason = "1 file was skipped (not named like images, or metadata), e.g. ant/notes.txt"
    assert caplog.messages == [f"{image_folder / 'train'}: {reason}"] * 2


def test_names_that_are_not_utf_8(indexed, image_folder):
    for name in (b"\xff\xfe.png", "\u00e9.png".encode(), b"a\nb.png"):
        shutil.copy(image_folder / "train/ant/0.png", os.fsencode(image_folder / "train/ant") + b"/" + name)
    age(image_folder)
    listed = contents(indexed)
    assert contents(indexed) == listed
    source = open_source(indexed, "train", 3)
    assert all(source.load(index)[1] == 0 for index in range(7))


def test_small_data_sets_leave_no_file_in_the_cache(indexed, image_folder, calls, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    indexed.index = None
    contents(indexed)
    contents(indexed)
    assert calls == ["train", "train"]
    assert list((tmp_path / "cache/vil").iterdir()) == []
    monkeypatch.setattr(data.index, "MIN_IMAGES", 12)
    contents(indexed)
    contents(indexed)
    assert len(calls) == 3
    assert [path.suffix for path in (tmp_path / "cache/vil").iterdir()] == [".safetensors"]


def test_without_a_place_for_the_index_one_line_is_printed(indexed, tmp_path, caplog, calls):
    (tmp_path / "file").touch()
    for place, reason in (("file", "File exists"), ("file/below", "Not a directory")):
        indexed.index = str(tmp_path / place)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "vil.data"):
            assert len(contents(indexed)[1]) == 12
        expected = f"data.index: {tmp_path / place}: no index: {reason}; every process lists the images"
        assert caplog.messages == [expected]


def test_a_full_disk_is_no_error(indexed, caplog, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.index, "replacing", full)
    with caplog.at_level(logging.WARNING, "vil.data"):
        assert len(contents(indexed)[1]) == 12
    reason = "no index: No space left on device; every process lists the images"
    assert caplog.messages == [f"data.index: {indexed.index}: {reason}"]
    assert index_files(indexed) == []


def run_in_process(function, *arguments):
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def die_while_writing(config):
    os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # the file is written, and not yet renamed
    contents(config)


def test_an_index_whose_writer_was_killed_is_not_read(indexed, image_folder, calls):
    process = run_in_process(die_while_writing, indexed)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    temporary, lock = sorted(index_files(indexed), key=len, reverse=True)
    assert temporary.endswith(".tmp")
    assert lock.endswith(".lock")
    assert len(contents(indexed)[1]) == 12
    assert calls == ["train"]
    assert [Path(name).suffix for name in index_files(indexed)] == [".safetensors"]
    # The same, with an older index in its place.
    write_image(image_folder / "train/cat/9.png", 1)
    run_in_process(die_while_writing, indexed).join()
    assert len(contents(indexed)[1]) == 13


@pytest.mark.parametrize("length", [0, 7, 300, -1])
def test_a_truncated_index_is_made_again(indexed, caplog, calls, length):
    expected = contents(indexed)
    (name,) = index_files(indexed)
    path = Path(indexed.index, name)
    path.write_bytes(path.read_bytes()[:length])
    with caplog.at_level(logging.WARNING, "vil.data"):
        assert contents(indexed) == expected
    (line,) = caplog.messages
    assert line.startswith(f"data.index: rebuilding {path}: ")
    assert calls == ["train", "train"]
    assert contents(indexed) == expected
    assert len(calls) == 2


def change_header(path: Path, change) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def swap_archives_and_checksums(header):
    header["archives"], header["checksums"] = header["checksums"], header["archives"]


ARRAYS_DIFFER = "its arrays are not those of its source"
FOLDER_ARRAYS = ("names", "name_ends", "targets", "classes", "listed", "stamps")
DAMAGES = [
    *(("folder", name, lambda header, name=name: header.pop(name), ARRAYS_DIFFER) for name in FOLDER_ARRAYS),
    *(
        ("zip", name, lambda header, name=name: header.pop(name), ARRAYS_DIFFER)
        for name in data.index.LOCATION_ARRAYS
    ),
    (
        *("zip", "no locations"),
        lambda header: [header.pop(name) for name in data.index.LOCATION_ARRAYS],
        ARRAYS_DIFFER,
    ),
    (
        *("folder", "an array of archives"),
        lambda header: header.update(kinds={"dtype": "I16", "shape": [0], "data_offsets": [0, 0]}),
        ARRAYS_DIFFER,
    ),
    ("zip", "unknown archives", swap_archives_and_checksums, "its archives are damaged"),
    (
        *("folder", "skipped"),
        lambda header: header["__metadata__"].update(skipped="-1"),
        "its number of skipped files is negative",
    ),
]


@pytest.fixture
def damaged(image_folder, tmp_path, caplog):
    """Check that a damaged index is made again, with one line."""

    def check(source, damage, reason):
        root = image_folder
        if source == "zip":
            write_archives(source, root := tmp_path / "archives", image_folder)
        age(root)
        config = DataConfig(source=source, root=str(root), index=str(tmp_path / "index"), workers=0)
        expected = contents(config)
        (path,) = Path(config.index).iterdir()
        original = path.read_bytes()
        damage(path)
        assert path.read_bytes() != original
        with caplog.at_level(logging.WARNING, "vil.data"):
            assert contents(config) == expected
        assert caplog.messages == [f"data.index: rebuilding {path}: {reason}"]
        assert path.read_bytes() == original

    return check


@pytest.mark.parametrize(
    ("source", "change", "reason"),
    [(source, change, reason) for source, _, change, reason in DAMAGES],
    ids=[f"{source}, {name}" for source, name, _, _ in DAMAGES],
)
def test_an_index_with_a_damaged_header_is_made_again(damaged, source, change, reason):
    damaged(source, lambda path: change_header(path, change), reason)


@pytest.mark.parametrize(
    ("source", "before", "after", "reason"),
    [
        ("folder", b"ant\0bear\0", b"gnu\0bear\0", "its classes are damaged"),
        ("zip", b"train_map.txt\0", b"train_map.tar\0", "its archives are damaged"),
    ],
)
def test_an_index_of_other_classes_or_maps_is_made_again(damaged, source, before, after, reason):
    damaged(source, lambda path: path.write_bytes(path.read_bytes().replace(before, after)), reason)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=st.lists(st.tuples(st.integers(0, 3000), st.binary(min_size=1, max_size=9)), min_size=1))
def test_a_damaged_index_causes_no_other_error(indexed, changes):
    contents(indexed)
    path = Path(indexed.index, index_files(indexed)[0])
    original = path.read_bytes()
    content = bytearray(original)
    for position, replacement in changes:
        position %= len(content)
        content[position : position + len(replacement)] = replacement
    path.write_bytes(content)
    try:
        source = open_source(indexed, "train", 3)
        for index in range(len(source)):
            source.describe(index)
            try:
                with decoding_errors():
                    source.load(index)
            except UnreadableImageError:
                pass
    except UserError:
        pass
    finally:
        path.write_bytes(original)


def test_paths_that_lead_out_of_the_data_set_are_not_read(image_folder):
    source = ImageFolder(image_folder / "train", ("ant", "bear", "cat"), "RGB")
    for name in (b"../val/ant/0.png", b"/etc/hostname", b"ant/../../val/ant/0.png", b""):
        source._index.arrays["names"] = np.frombuffer(name + b"\0", np.uint8)
        source._index.arrays["name_ends"] = np.array([len(name)], np.uint64)
        with pytest.raises(OSError, match=r"^its path in the index leads out of the data set$"):
            source.read(0)


def count_listings(config, log, barrier):
    find_files = data.sources.folder.find_files

    def slow(*arguments):
        with log.open("a") as file:
            file.write("x")
        time.sleep(0.3)
        return find_files(*arguments)

    data.sources.folder.find_files = slow
    barrier.wait()
    os._exit(0 if len(contents(config)[1]) == 12 else 1)


@pytest.mark.parametrize(("is_stored", "listings"), [(True, 1), (False, 3)])
def test_one_process_makes_the_index_and_the_others_wait(indexed, tmp_path, monkeypatch, is_stored, listings):
    """A small data set is not stored: the others then list it at once, not one after the other."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if not is_stored:
        indexed.index = None
    barrier = multiprocessing.get_context("fork").Barrier(3)
    processes = [run_in_process(count_listings, indexed, tmp_path / "log", barrier) for _ in range(3)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "log").read_text() == "x" * listings


def test_machines_with_copies_at_one_path_keep_their_own_index(indexed, image_folder, tmp_path, calls):
    """Their folder for indexes is shared, and the modification times of the copies differ."""
    own, other = image_folder / "train", tmp_path / "train of another machine"
    shutil.copytree(own, other)
    os.utime(other / "ant", (time.time() - 7200,) * 2)
    expected = contents(indexed)
    for _ in range(2):
        own.rename(tmp_path / "moved")
        other.rename(own)
        (tmp_path / "moved").rename(other)
        assert contents(indexed) == expected
    assert calls == ["train", "train"]
    assert len(index_files(indexed)) == 2


def test_clients_of_a_shared_disk_have_one_index(indexed, calls, monkeypatch):
    """Each gives another number to the file system."""
    expected, stat = contents(indexed), os.stat

    def stat_of_another_client(path, **options):
        status = stat(path, **options)
        fields = {name: getattr(status, name) for name in dir(status) if name.startswith("st_")}
        return SimpleNamespace(**{**fields, "st_dev": status.st_dev + 1})

    monkeypatch.setattr(data.index.os, "stat", stat_of_another_client)
    assert contents(indexed) == expected
    assert calls == ["train"]


def test_a_rank_that_waited_says_that_the_data_set_has_changed(indexed, image_folder, monkeypatch, caplog):
    contents(indexed)
    write_image(image_folder / "train/cat/9.png", 1)
    monkeypatch.setattr(data.index, "_lock", lambda path: nullcontext(True))
    with caplog.at_level(logging.WARNING, "vil.data"):
        assert len(contents(indexed)[1]) == 13
    reason = "the data set has changed since another process began to list it; every process lists the images"
    assert caplog.messages == [f"data.index: {indexed.index}: no index: {reason}"]


@pytest.mark.parametrize(
    ("rank", "local_rank", "is_shown"), [("0", "0", True), ("2", "0", True), ("3", "1", False)]
)
def test_the_first_process_of_every_machine_shows_lines_about_the_index(
    rank, local_rank, is_shown, monkeypatch, capsys
):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    logger = logging.getLogger("vil.data.index")
    run_program(lambda: logger.info("waiting"))
    run_program(lambda: logging.getLogger("vil.data").info("not waiting"))
    lines = ["waiting", "not waiting"] if rank == "0" else ["waiting"] * is_shown
    assert capsys.readouterr().out.splitlines() == lines
    assert logger is data.index._logger


def hold_lock(path, connection):
    with data.index._lock(path):
        connection.send(os.getpid())
        connection.recv()


def test_waiting_ends_with_one_line(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(data.index, "LOCK_TIMEOUT_S", 0.3)
    monkeypatch.setattr(data.index, "WAITING_NOTICE_S", 0.1)
    monkeypatch.setattr(data.index.socket, "gethostname", lambda: "node7")
    path = tmp_path / "x.safetensors"
    connection, other = multiprocessing.Pipe()
    process = run_in_process(hold_lock, path, other)
    pid = connection.recv()
    caplog.set_level(logging.INFO, "vil.data")
    with pytest.raises(UserError) as error, data.index._lock(path):
        pass
    holder = f"process {pid} on node7"
    reason = f"waited 0 minutes for {path}, built by {holder}; use --data.index off to run without an index"
    assert str(error.value) == f"data.index: {reason}"
    assert caplog.messages == [f"waiting for the index of the data set, built by {holder}"]
    connection.send(None)
    process.join()


def test_a_lock_that_cannot_be_removed_is_no_error(tmp_path):
    with data.index._lock(tmp_path / "x.safetensors"):
        (tmp_path / "x.lock").unlink()
        (tmp_path / "x.lock").mkdir()  # unlink fails, as on a network file system that is gone


def test_a_file_cannot_name_a_folder_for_indexes(tmp_path):
    path = tmp_path / "data.yaml"
    path.write_text("source: folder\nindex: /tmp/x\n")
    with pytest.raises(UserError) as error:
        resolve_train_command(["--data", str(path)])
    reason = "a file cannot set this option; use --data.index on the command line, or delete it there"
    assert str(error.value) == f"{path}: data.index: {reason}"
    path.write_text('source: folder\nindex: "off"\n')
    assert resolve_train_command(["--data", str(path)]).config.data.index == "off"


# --- Archives -----------------------------------------------------------------------------------------------


def write_archives(source, root, image_folder):
    """Write the training images as two archives of a source, which has the split `train`."""
    paths = sorted((image_folder / "train").rglob("*.png"))
    folder = root / "train"
    folder.mkdir(parents=True)
    parts = {f"part{number}": paths[number::2] for number in range(2)}
    for name, part in parts.items():
        if source == "zip":
            with zipfile.ZipFile(root / f"{name}.zip", "w") as archive:
                for path in part:
                    archive.write(path, path.relative_to(image_folder / "train"))
            continue
        tar_path = folder / f"{name}.tar" if source == "tar" else root / f"train-{name}.tar"
        with tarfile.open(tar_path, "w") as archive:
            for path in part:
                if source == "wds":
                    label = path.with_suffix(".cls")
                    label.write_text(str(["ant", "bear", "cat"].index(path.parent.name)))
                    archive.add(label, f"{path.parent.name}{path.stem}.cls")
                    archive.add(path, f"{path.parent.name}{path.name}")
                else:
                    archive.add(path, path.relative_to(image_folder / "train"))
    if source == "zip":
        classes = ["ant", "bear", "cat"]
        lines = [
            f"{name}.zip@/{path.relative_to(image_folder / 'train')}\t{classes.index(path.parent.name)}\n"
            for name, part in parts.items()
            for path in part
        ]
        (root / "train_map.txt").write_text("".join(lines))


@pytest.mark.parametrize("source", ["zip", "tar", "wds"])
def test_archives_are_indexed_once(source, image_folder, tmp_path, monkeypatch):
    root = tmp_path / "archives"
    write_archives(source, root, image_folder)
    age(root)
    config = DataConfig(source=source, root=str(root), index=str(tmp_path / "index"), workers=0)
    plain = contents(DataConfig(source=source, root=str(root), index="off", workers=0))
    parallel = contents(DataConfig(source=source, root=str(root), index="off", workers=2))
    assert contents(config) == plain == parallel
    assert len(plain[1]) == 12

    def refuse(*arguments, **options):
        raise AssertionError("an archive is listed again")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", refuse)
        patch.setattr(zipfile, "ZipFile", refuse)
        stored = open_source(config, "train", 3)
        assert contents(config) == plain
        for index in range(12):
            image, target = stored.load(index)
            folder = image_folder / "train" / stored.class_names[target]
            name = stored.name(index).rpartition("/")[2]
            if source != "wds":
                expected = ImageFolder(image_folder / "train", stored.class_names, "RGB")
                names = [expected.name(i) for i in range(12)]
                assert image == expected.load(names.index(f"{folder.name}/{name}"))[0]
    for path in (*root.glob("*part1*"), *root.glob("train/*part1*")):
        path.unlink()
    if source == "zip":
        lines = (root / "train_map.txt").read_text().splitlines(keepends=True)
        (root / "train_map.txt").write_text("".join(line for line in lines if "part0" in line))
    changed = contents(config)
    assert len(changed[1]) == 6
    assert changed == contents(DataConfig(source=source, root=str(root), index="off", workers=0))


def test_a_zip_with_maps_outside_of_the_root_has_no_index(image_folder, tmp_path, caplog, monkeypatch):
    root = tmp_path / "archives"
    write_archives("zip", root, image_folder)
    (tmp_path / "maps").mkdir()
    shutil.copy(root / "train_map.txt", tmp_path / "maps/val_map.txt")
    age(root)
    folder = tmp_path / "index"
    config = DataConfig(source="zip", root=str(root), val_split="../maps/val", index=str(folder), workers=0)
    with caplog.at_level(logging.WARNING, "vil.data"):
        assert len(contents(config, "val")[1]) == 12
    reason = f"no index: ../maps/val_map.txt is not below {root}; every process lists the images"
    assert caplog.messages == [f"data.index: {folder}: {reason}"]
    assert not folder.exists()
    assert len(contents(config, "train")[1]) == 12  # whose map is below the root
    assert len(index_files(config)) == 1
    caplog.clear()
    config.index = None  # a small data set needs none
    contents(config, "val")
    assert caplog.messages == []


@pytest.mark.parametrize("source", ["zip", "tar", "wds"])
def test_a_rewritten_archive_is_indexed_again(source, image_folder, tmp_path):
    root = tmp_path / "archives"
    write_archives(source, root, image_folder)
    age(root)
    config = DataConfig(source=source, root=str(root), index=str(tmp_path / "index"), workers=0)
    contents(config)
    shutil.rmtree(root)
    shutil.rmtree(image_folder / "train/bear")
    write_archives(source, root, image_folder)
    assert len(contents(config)[1]) == 8


def test_an_index_of_other_archives_is_refused(image_folder, tmp_path):
    root = tmp_path / "archives"
    write_archives("tar", root, image_folder)
    source = open_source(DataConfig(source="tar", root=str(root)), "train", 3)
    with pytest.raises(UserError) as error:
        type(source)([root / "train/part0.tar"], source._index, source.class_names, "RGB")
    assert str(error.value) == f"data.index: the index of {root / 'train'} is damaged; delete it"


@pytest.mark.skipif(multiprocessing.get_all_start_methods()[0] != "fork", reason="patches forked processes")
def test_a_killed_process_that_indexes_archives_is_one_line(image_folder, tmp_path, monkeypatch):
    root = tmp_path / "archives"
    write_archives("tar", root, image_folder)
    monkeypatch.setattr(tarfile, "open", lambda **options: os.kill(os.getpid(), signal.SIGKILL))
    config = DataConfig(source="tar", root=str(root), workers=2)
    with pytest.raises(UserError) as error:
        open_source(config, "train", 3)
    reason = "a process that indexes archives was killed; fewer need less memory"
    assert str(error.value) == f"data.workers: {reason}"


def describe_in_worker(source, queue) -> None:
    """Send the names and classes of a source's images, and if its index is mapped into memory."""
    images = [(source.name(i), int(source.targets[i])) for i in range(len(source))]
    queue.put((images, ".safetensors" in Path("/proc/self/maps").read_text()))


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux")
@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize("start", ["fork", "forkserver", "spawn"])
def test_processes_share_the_mapped_index(indexed, image_folder, kind, start):
    if kind == "tar":
        (image_folder / "tar").mkdir()
        with tarfile.open(image_folder / "tar/train.tar", "w") as archive:
            archive.add(image_folder / "train", ".")
        age(image_folder)
        indexed = replace(indexed, source="tar", root=str(image_folder / "tar"))
    _, expected = contents(indexed)
    source = open_source(indexed, "train", 3)
    for path in Path(indexed.index).iterdir():
        path.unlink()  # another run may replace it
    context = multiprocessing.get_context(start)
    queue = context.Queue()
    process = context.Process(target=describe_in_worker, args=(source, queue))
    process.start()
    assert queue.get(timeout=120) == (expected, True)
    process.join()
