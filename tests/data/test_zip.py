"""Zip archives with a map: the folder's images, from any process, and one-line errors."""

import os
import pickle
import re
import shutil
import subprocess
import zipfile
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.loading import load

from data.sources import open_source
from data.sources.zip import list_members
from vil.config import AugmentConfig, DataConfig
from vil.errors import UserError

CLASSES = ("ant", "bear", "cat")


def write_zip(root, images, split, method=zipfile.ZIP_STORED, lines=None):
    """`root`/<split>.zip and its map, of the images in `images`/<split>."""
    root.mkdir(exist_ok=True)
    map_lines = []
    with zipfile.ZipFile(root / f"{split}.zip", "w", method) as archive:
        for path in sorted((images / split).rglob("*.png")):
            inside = path.relative_to(images / split).as_posix()
            archive.write(path, inside)
            map_lines.append(f"{split}.zip@/{inside}\t{CLASSES.index(path.parent.name)}")
    (root / f"{split}_map.txt").write_text("\n".join(map_lines if lines is None else lines) + "\n")


@pytest.fixture(params=[zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def zip_data(request, image_folder, tmp_path):
    for split in ("train", "val"):
        write_zip(tmp_path / "zip", image_folder, split, request.param)
    return DataConfig(source="zip", root=str(tmp_path / "zip"), workers=0)


def refusal(data, split="train"):
    with pytest.raises(UserError) as error:
        open_source(data, split, 3)
    assert error.value.location == "data.root"
    assert "\n" not in str(error.value)
    return error.value.reason


def with_lines(zip_data, *lines):
    """The same archive with these lines in its map."""
    with open(os.path.join(zip_data.root, "train_map.txt"), "w", encoding="utf-8") as file:
        file.write("\n".join(lines))
    return zip_data


def test_a_zip_has_the_images_of_the_folder(zip_data, folder_data):
    for split in ("train", "val"):
        zipped, folder = open_source(zip_data, split, 3), open_source(folder_data, split, 3)
        assert zipped.class_names == folder.class_names == CLASSES
        assert zipped.targets.tolist() == folder.targets.tolist()
        for index in range(len(folder)):
            (image, target), (other, other_target) = zipped.load(index), folder.load(index)
            assert (np.asarray(image) == np.asarray(other)).all()
            assert target == other_target
            assert zipped.name(index) == folder.name(index)
    assert zipped.describe(0) == os.path.join(zip_data.root, "val.zip/ant/0.png")


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_folders_also_from_the_middle_of_an_epoch(zip_data, folder_data, workers):
    def batches(data, workers, start):
        recipe = AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.25)
        data.workers = workers
        return list(load(data, recipe, image_size=24, batch_size=4, seed=3).train.epoch(1, start))

    for start in (0, 2):
        pairs = list(zip(batches(zip_data, workers, start), batches(folder_data, 0, start), strict=True))
        assert len(pairs) == 3 - start
        assert all(torch.equal(a, b) and torch.equal(s, t) for (a, s), (b, t) in pairs)


def _loaded(source, results):
    results.put([np.asarray(source.load(index)[0]).tobytes() for index in range(len(source))])


def test_an_open_source_works_in_forked_processes(zip_data):
    source = open_source(zip_data, "train", 3)
    expected = [np.asarray(source.load(index)[0]).tobytes() for index in range(len(source))]
    context = get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_loaded, args=(source, results)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [expected] * 2
    for process in processes:
        process.join(60)


def test_a_pickled_source_opens_its_own_files(zip_data):
    source = open_source(zip_data, "train", 3)
    source.load(0)
    again = pickle.loads(pickle.dumps(source))
    assert again._files == {}
    assert (np.asarray(again.load(3)[0]) == np.asarray(source.load(3)[0])).all()


def test_a_validation_map_with_other_numbers_is_rejected(zip_data, image_folder):
    lines = [
        f"val.zip@/{name}/{i}.png\t{k}" for k, name in enumerate(("bear", "ant", "cat")) for i in range(2)
    ]
    write_zip(Path(zip_data.root), image_folder, "val", lines=lines)
    message = refusal(zip_data, "val")
    assert message == f"{zip_data.root}/val_map.txt: folder bear has class 0, but class 1 in train_map.txt"


def test_numbers_are_compared_by_class_folder_also_around_other_folders(tmp_path):
    root = tmp_path / "nested"
    root.mkdir()
    for split, numbers in (("train", (0, 1)), ("val", (1, 0))):
        with zipfile.ZipFile(root / f"{split}.zip", "w") as archive:
            for name in ("ant", "bear"):
                archive.writestr(f"{split}/{name}/images/0.png", b"")
        lines = [f"{split}.zip@/{split}/{n}/images/0.png\t{k}" for n, k in zip(("ant", "bear"), numbers)]
        (root / f"{split}_map.txt").write_text("\n".join(lines))
    data = DataConfig(source="zip", root=str(root))
    assert open_source(data, "train", 3).class_names == ("ant", "bear")
    assert "folder ant has class 1, but class 0 in train_map.txt" in refusal(data, "val")


def test_classes_without_training_images_are_logged(zip_data, caplog):
    lines = [f"train.zip@/{name}/0.png\t{3 * k}" for k, name in enumerate(("ant", "bear"))]
    assert len(open_source(with_lines(zip_data, *lines), "train", 3).class_names) == 4
    assert "split train: 2 classes have no training images: 1, 2" in caplog.text


def test_a_map_may_begin_with_a_byte_order_mark(zip_data):
    path = Path(zip_data.root, "train_map.txt")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert len(open_source(zip_data, "train", 3)) == 12


class _UnflaggedInfo(zipfile.ZipInfo):
    """Names in UTF-8 without the flag that says so, as Info-ZIP's program writes them."""

    def _encodeFilenameFlags(self):  # noqa: N802
        return self.filename.encode("utf-8"), self.flag_bits & ~(1 << 11)


def test_names_in_utf_8_without_the_flag(image_folder, tmp_path):
    root = tmp_path / "zip"
    root.mkdir()
    content = (image_folder / "train/ant/0.png").read_bytes()
    names = ["café/é 1.png", "日本/a b.png", "plain/0.png"]
    with zipfile.ZipFile(root / "train.zip", "w") as archive:
        for name in names:
            archive.writestr(_UnflaggedInfo(name), content)
    assert b"\xc3\xa9 1.png" in (root / "train.zip").read_bytes()
    assert zipfile.ZipFile(root / "train.zip").namelist()[0] != names[0]  # as zipfile reads it
    (root / "train_map.txt").write_text(
        "".join(f"train.zip@/{n}\t{k}\n" for k, n in enumerate(names)), "utf-8"
    )
    source = open_source(DataConfig(source="zip", root=str(root)), "train", 3)
    assert [source.name(index) for index in range(3)] == names
    assert source.class_names == ("café", "日本", "plain")
    assert source.load(1)[0].size == (40, 30)


def test_names_in_code_page_437(image_folder, tmp_path):
    class Info(zipfile.ZipInfo):
        def _encodeFilenameFlags(self):  # noqa: N802
            return self.filename.encode("cp437"), 0

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(Info("café/é.png"), b"")
    assert list(list_members(tmp_path / "a.zip", 0)) == ["café/é.png"]


def test_the_recipe_of_the_documentation(image_folder, tmp_path):
    """Classes in any alphabet and with spaces, and one that has no validation images."""
    page = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"```sh\ncd /datasets/imagenet && zip.*?\n(.*?)```", page, re.DOTALL)
    root = tmp_path / "recipe"
    for split in ("train", "val"):
        for name, other in zip(("ant", "bear", "cat"), ("Zebra", "a b", "çé")):
            if (split, name) != ("val", "bear"):
                shutil.copytree(image_folder / split / name, root / split / other)
        with zipfile.ZipFile(root / f"{split}.zip", "w") as archive:
            for path in sorted((root / split).rglob("*.png")):
                info = _UnflaggedInfo(path.relative_to(root).as_posix())
                archive.writestr(info, path.read_bytes())
    subprocess.run(["bash", "-ec", recipe], cwd=root, check=True)
    for split in ("train", "val"):
        zipped = open_source(DataConfig(source="zip", root=str(root)), split, 3)
        folder = open_source(DataConfig(source="folder", root=str(root)), split, 3)
        assert zipped.class_names == folder.class_names == ("Zebra", "a b", "çé")
        assert zipped.targets.tolist() == folder.targets.tolist()
        assert [zipped.name(i) for i in range(len(zipped))] == [
            f"{split}/{folder.name(i)}" for i in range(len(folder))
        ]


def test_flat_archives_number_their_classes(zip_data, image_folder):
    lines = [f"train.zip@/{name}/{i}.png\t{(i + k) % 3}" for k, name in enumerate(CLASSES) for i in range(4)]
    assert open_source(with_lines(zip_data, *lines), "train", 3).class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("train.zip@/ant/0.png 0", "expected archive@/path"),
        ("train.zip/ant/0.png\t0", "expected archive@/path"),
        ("train.zip@/ant/0.png\t-1", "the class is not an integer"),
        ("train.zip@/ant/0.png\tant", "the class is not an integer"),
        ("train.zip@/ant/0.png\t" + "9" * 5000, "the class is not an integer"),
        ("train.zip@/ant/../0.png\t0", "leads outside"),
        ("../zip/train.zip@/ant/0.png\t0", "leads outside"),
        ("/etc/train.zip@/ant/0.png\t0", "leads outside"),
        ("train.zip@/ant/9.png\t0", "ant/9.png is not in train.zip"),
    ],
)
def test_a_bad_line_is_named(zip_data, line, reason):
    message = refusal(with_lines(zip_data, "train.zip@/ant/1.png\t0", "", line))
    assert "train_map.txt, line 3: " in message
    assert reason in message


def test_missing_and_broken_files_are_named(zip_data):
    root = zip_data.root
    assert "no such file" in refusal(with_lines(zip_data, "other.zip@/ant/0.png\t0"))
    assert "does not name any image" in refusal(with_lines(zip_data, ""))
    with_lines(zip_data, "train.zip@/ant/0.png\t0")
    assert "class 1, but train_map.txt has 1" in refusal(zip_data, "val")
    with open(os.path.join(root, "train.zip"), "r+b") as file:
        file.truncate(500)
    assert "cannot be read as a zip" in refusal(zip_data)
    os.remove(os.path.join(root, "val_map.txt"))
    assert "val_map.txt: no such file" in refusal(zip_data, "val")
    assert "is needed" in refusal(DataConfig(source="zip"))


def test_other_compressions_are_rejected(zip_data, image_folder, tmp_path):
    write_zip(tmp_path / "zip", image_folder, "train", zipfile.ZIP_LZMA)
    assert "neither stored nor deflated" in refusal(zip_data)


def test_a_changed_byte_is_an_unreadable_image(zip_data, tmp_path):
    source = open_source(zip_data, "train", 3)
    offset, size = (int(source._locations[column][5]) for column in (1, 2))
    with open(tmp_path / "zip/train.zip", "r+b") as file:
        file.seek(offset + size)
        byte = file.read(1)
        file.seek(offset + size)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(Exception, match=r"checksum|invalid|incorrect|unknown"):
        source.load(5)
    source.load(4)


def test_a_name_may_contain_line_separators_of_unicode(image_folder, tmp_path):
    image = next((image_folder / "train" / "ant").iterdir())
    image.rename(image.with_name("a\u2028b.png"))
    write_zip(tmp_path / "zip", image_folder, "train")
    source = open_source(DataConfig(source="zip", root=str(tmp_path / "zip")), "train", 3)
    assert any("\u2028" in source.describe(index) for index in range(len(source)))
