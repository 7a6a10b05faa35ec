"""File names of images: every format that is decoded, no metadata, and every folder entered once."""

import logging
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from helpers import forked
from helpers.sample_images import write_image
from PIL import Image

from data.image_files import find_files, has_image_extension, is_metadata
from data.sources import open_source
from tools.programs.predict import find_images
from vil.config import DataConfig
from vil.errors import UserError

ROOT = Path(__file__).parents[2]


def names(source):
    return [source.name(index) for index in range(len(source))]


def test_every_format_that_is_decoded_is_an_image():
    for extension in (".gif", ".avif", ".jfif", ".jpe", ".jp2", ".JPG", ".tiff", ".webp"):
        assert has_image_extension(f"a{extension}")
    for name in ("a.txt", ".jpg", "a/.jpg", "..jpg", "a.jpg/b", "jpg", ""):
        assert not has_image_extension(name)
    assert is_metadata("._a.jpg")
    assert is_metadata("a/__MACOSX/b/a.jpg")
    assert is_metadata("@eaDir/a.jpg")
    assert not is_metadata("a/.b/_c.jpg")


@pytest.fixture
def untidy_folder(image_folder):
    """The image folder with other formats, metadata of macOS and of network storage, and a text."""
    for name in ("a.gif", "b.jfif", "c.JPE", "d.jp2"):
        path = image_folder / "train/ant" / name
        kind = {".gif": "GIF", ".jp2": "JPEG2000"}.get(path.suffix, "JPEG")
        Image.new("RGB", (20, 20)).save(path, kind)
    for name in ("ant/._0.png", "ant/@eaDir/0.png/preview.jpg", "__MACOSX/ant/0.png", "bear/notes.txt"):
        path = image_folder / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"metadata")
    return image_folder


EXPECTED = [
    f"ant/{name}" for name in ("0.png", "1.png", "2.png", "3.png", "a.gif", "b.jfif", "c.JPE", "d.jp2")
]


def test_folder_reads_all_formats_and_counts_what_it_skips(untidy_folder, folder_data, caplog):
    with caplog.at_level(logging.WARNING, "vil.data"):
        source = open_source(folder_data, "train", 3)
    assert names(source)[:8] == EXPECTED
    assert source.class_names == ("ant", "bear", "cat")
    assert len(source) == 16
    for index in range(8):
        source.load(index)
    (line,) = caplog.messages
    assert line.startswith(f"{untidy_folder / 'train'}: 3 files were skipped")


def test_tar_reads_the_images_of_the_folder_and_counts_what_it_skips(untidy_folder, tmp_path, caplog):
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars/train.tar", "w") as tar:
        tar.add(untidy_folder / "train", "train")
    with caplog.at_level(logging.WARNING, "vil.data"):
        source = open_source(DataConfig(source="tar", root=str(tmp_path / "tars")), "train", 3)
    assert [name.removeprefix("train/") for name in names(source)][:8] == EXPECTED
    assert (len(source), source.class_names) == (16, ("ant", "bear", "cat"))
    assert "4 files were skipped" in caplog.text


def test_nothing_is_logged_without_skipped_files(folder_data, caplog):
    open_source(folder_data, "train", 3)
    assert not caplog.messages


def test_predict_skips_metadata(untidy_folder):
    found = [
        os.path.relpath(path, untidy_folder / "train") for path in find_images([str(untidy_folder / "train")])
    ]
    assert len(found) == 16
    assert not any(map(is_metadata, found))


def test_circular_links_repeat_no_image(folder_data, image_folder):
    expected = names(open_source(folder_data, "train", 3))
    train = image_folder / "train"
    (train / "ant/up").symlink_to("..")
    (train / "ant/self").symlink_to(".")
    (train / "ant/other").symlink_to("../bear")
    assert names(open_source(folder_data, "train", 3)) == expected
    (train / "bear/self.png").symlink_to("self.png")  # broken, and so for data.unreadable_images to decide
    assert names(open_source(folder_data, "train", 3)) == sorted([*expected, "bear/self.png"])


def test_links_that_multiply_paths_terminate(folder_data, image_folder):
    """Two links to the folder around them double the paths with every level, 40 levels deep."""
    expected = names(open_source(folder_data, "train", 3))
    for name in ("one", "two"):
        (image_folder / "train/ant" / name).symlink_to(".")
    program = (
        "import sys; from data.sources import open_source; from vil.config import DataConfig; "
        "print(len(open_source(DataConfig(source='folder', root=sys.argv[1]), 'train', 3)))"
    )
    line = [forked.python(), "-c", program, str(image_folder)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == [str(len(expected))]


def test_links_to_other_folders_are_followed_once(folder_data, image_folder, tmp_path):
    write_image(tmp_path / "elsewhere/more/9.png", 9)
    for link in ("ant/more", "ant/again"):
        (image_folder / "train" / link).symlink_to(tmp_path / "elsewhere")
    shutil.move(image_folder / "train/cat", tmp_path / "cat")
    (image_folder / "train/cat").symlink_to(tmp_path / "cat")
    source = open_source(folder_data, "train", 3)
    assert [name for name in names(source) if "9.png" in name] == ["ant/again/more/9.png"]
    assert source.class_names == ("ant", "bear", "cat")
    assert len(source) == 13


def test_a_folder_is_read_by_its_real_path_rather_than_a_link(folder_data, image_folder):
    write_image(image_folder / "train/ant/z/9.png", 9)
    (image_folder / "train/ant/a").symlink_to("z")
    assert "ant/z/9.png" in names(open_source(folder_data, "train", 3))
    assert len(open_source(folder_data, "train", 3)) == 13


def test_two_classes_that_are_one_folder_are_rejected(folder_data, image_folder):
    (image_folder / "train/dog").symlink_to("cat")
    with pytest.raises(UserError, match="the classes cat and dog are the same folder"):
        open_source(folder_data, "train", 3)


def test_listing_errors_are_one_line(folder_data, image_folder, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    (image_folder / "train/ant/locked").mkdir()
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="ant/locked: cannot be listed: Permission denied"):
        open_source(folder_data, "train", 3)


def test_the_order_is_that_of_torchvision(tmp_path):
    for name in ("b/0.png", "a.x/1.png", "a/2.png", "a/c/3.png", "a-b/4.png", "10.png", "9.png"):
        write_image(tmp_path / "root" / name, 0)
    found = find_files(tmp_path, ["root"])
    expected = [
        os.path.join(parent, name)
        for parent, _, files in sorted(os.walk(tmp_path / "root"))
        for name in sorted(files)
    ]
    paths = [os.path.join(tmp_path, os.fsdecode(path)) for path in next(found.images).split(b"\0")[:-1]]
    assert paths == expected
    assert found.others == (0, "")
    assert [path for path, _ in found.mtimes][:2] == [".", "root"]
