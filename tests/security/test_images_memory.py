"""Images, archives, labels and logs: small files that expand to gigabytes, and endless files."""

import io
import json
import os
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from helpers.measured import measured
from PIL import Image

from data import decoding
from data.decoding import EncodedImage, UnreadableImageError, max_pixels
from data.real_labels import read_real_labels
from data.sources.archive import PLAIN, ArchivedImages, Member, index_members
from data.sources.folder import ImageFolder
from data.sources.zip import ZipImages
from tools.image_reader import read_image
from vil.config import DataConfig
from vil.errors import UserError

MB = 10**6


def encoded(image_format: str, side: int, **options) -> bytes:
    """A flat image, which takes few bytes."""
    file = io.BytesIO()
    Image.new("L" if image_format in ("PNG", "GIF") else "RGB", (side, side)).save(
        file, image_format, **options
    )
    return file.getvalue()


def decode(path: Path) -> tuple[int, ...]:
    return read_image(path, "RGB").decode().shape


@pytest.mark.parametrize(
    ("image_format", "side"), [("AVIF", 7000), ("JPEG2000", 6000), ("WEBP", 6000), ("PNG", 11000)]
)
def test_a_few_bytes_of_many_pixels(tmp_path: Path, image_format: str, side: int):
    path = tmp_path / "x"
    path.write_bytes(encoded(image_format, side, **({"lossless": True} if image_format == "WEBP" else {})))
    assert path.stat().st_size < 400_000
    outcome, grown = measured(decode, path)
    assert f"UnreadableImageError: {side}×{side} pixels are more than the " in outcome
    assert grown < 50 * MB


@pytest.mark.parametrize("image_format", decoding.FORMATS)
def test_memory_of_the_largest_allowed_image(image_format: str):
    """The measured peak is at most that of the table."""
    side, names = 3000, {"MPO": "JPEG"}
    content = encoded(names.get(image_format, image_format), side)
    outcome, grown = measured(lambda: EncodedImage(content, "RGB").decode().shape)
    assert outcome == f"returned {(side, side, 3)}"
    share = side**2 / (decoding.MAX_DECODED_BYTES // decoding._BYTES_PER_PIXEL.get(image_format, 14))
    assert grown < share * decoding.MAX_DECODED_BYTES * 1.1 + 20 * MB


def test_limits_leave_room_for_photographs():
    """ImageNet's largest has 50 megapixels; telephones make 108, in JPEG."""
    assert max_pixels("JPEG", 10**6) > 108_000_000
    for image_format in ("PNG", "TIFF", "WEBP", "AVIF", "JPEG2000"):
        assert max_pixels(image_format, 10**6) > 60_000_000
    assert max_pixels("WEBP", 100) == 24_000_000


@pytest.mark.parametrize("kind", ["fifo", "device", "sparse"])
@pytest.mark.parametrize("source", ["folder", "predict"])
def test_endless_images(tmp_path: Path, kind: str, source: str):
    path = tmp_path / "a" / "x.jpg"
    path.parent.mkdir()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    read = (
        (lambda: read_image(path, "RGB"))
        if source == "predict"
        else ImageFolder(tmp_path, ("a",), "RGB").read
    )
    outcome, grown = measured(read, *([] if source == "predict" else [0]), seconds=30)
    assert "is not a regular file" in outcome or "is larger than 536,870,912 bytes" in outcome
    assert grown < 50 * MB


def write_zip(folder: Path, content: bytes, declared: int | None = None) -> ArchivedImages:
    with zipfile.ZipFile(folder / "val.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/x.bmp", content)
    if declared is not None:
        raw = (folder / "val.zip").read_bytes()
        raw = raw.replace(len(content).to_bytes(4, "little"), declared.to_bytes(4, "little"))
        (folder / "val.zip").write_bytes(raw)
    (folder / "val_map.txt").write_text("val.zip@/a/x.bmp\t0\n")
    return ZipImages.open(DataConfig(source="zip", root=str(folder), train_split="val"), "val", "RGB")


def test_members_that_inflate(tmp_path: Path):
    small = write_zip(tmp_path, encoded("BMP", 1000))  # blank, 3 MB in 3 kB
    assert small.read(0).decode().shape == (1000, 1000, 3)
    large = write_zip(tmp_path, bytes(200 * MB))
    outcome, grown = measured(large.read, 0)
    assert "OSError: would inflate from" in outcome
    assert grown < 50 * MB
    lying = write_zip(tmp_path, bytes(200 * MB), declared=1000)
    outcome, grown = measured(lying.read, 0)
    assert "OSError: its checksum differs" in outcome
    assert grown < 50 * MB


@pytest.mark.parametrize("size", [1 << 40, (1 << 64) - 1])
@pytest.mark.parametrize("kind", [PLAIN, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_with_huge_declared_sizes(tmp_path: Path, size: int, kind: int):
    with (tmp_path / "x").open("wb") as file:
        file.truncate(1 << 41)
    index = index_members([Member(0, 0, size, "x", kind, 0, size)], [0], ("a",), [])
    images = ArchivedImages([tmp_path / "x"], index, ("a",), "RGB")
    outcome, grown = measured(images.read, 0)
    assert "OSError: is larger than 536,870,912 bytes" in outcome
    assert grown < 50 * MB


def test_a_member_ends_where_the_archive_says(tmp_path: Path):
    content = zlib.compress(bytes(100), wbits=-zlib.MAX_WBITS)
    (tmp_path / "x").write_bytes(b"PK\3\4" + bytes(22) + (0).to_bytes(4, "little") + content)
    member = Member(0, 0, len(content), "", zipfile.ZIP_DEFLATED, zlib.crc32(bytes(99)), 99)
    index = index_members([member], [0], ("a",), [])
    images = ArchivedImages([tmp_path / "x"], index, ("a",), "RGB")
    assert images.read(0) is not None
    with pytest.raises(UnreadableImageError):
        images.read(0).decode()


def relabelled(path: Path, folder: Path) -> int:
    from data.loaders import EvaluationImages
    from data.real_labels import RealLabelImages
    from data.transforms import evaluation_transform

    source = ImageFolder(folder, tuple(map(str, range(1000))), "RGB")
    transform = evaluation_transform(DataConfig(), image_size=8, in_chans=3)
    images = RealLabelImages(EvaluationImages(source, transform), str(path))
    return len(images[0].content[1])


def test_one_long_row_of_labels(tmp_path: Path):
    """50,000 rows, one of them with 100,000 labels: 40 GB in a table."""
    for name in range(1000):
        (tmp_path / "val" / str(name)).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "val" / str(name) / f"ILSVRC2012_val_{name + 1:08}.JPEG")
    rows = [[n % 1000] for n in range(50_000)]
    rows[7] = [n % 1000 for n in range(100_000)]
    (tmp_path / "real.json").write_text(json.dumps(rows))
    outcome, grown = measured(relabelled, tmp_path / "real.json", tmp_path / "val")
    assert outcome == "returned 1001"
    assert grown < 200 * MB


def test_labels_that_are_too_many(tmp_path: Path):
    (tmp_path / "real.json").write_text(json.dumps([[]] * 10_000_000))
    with pytest.raises(UserError, match=r"^data.real_labels: .*real.json: is larger than 16,777,216 bytes$"):
        read_real_labels(str(tmp_path / "real.json"))
    os.mkfifo(tmp_path / "fifo")
    outcome, _ = measured(read_real_labels, str(tmp_path / "fifo"), seconds=30)
    assert outcome == f"UserError: data.real_labels: {tmp_path}/fifo: is not a regular file"


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "config.yaml"])
@pytest.mark.parametrize("kind", ["device", "fifo", "sparse", "digits"])
def test_files_of_a_run(tmp_path: Path, name: str, kind: str):
    from tools.report_page.runs import open_run

    (tmp_path / "config.yaml").write_text("model: {name: vil}\n")
    (tmp_path / name).unlink(missing_ok=True)
    if kind == "device":
        (tmp_path / name).symlink_to("/dev/zero")
    elif kind == "fifo":
        os.mkfifo(tmp_path / name)
    elif kind == "sparse":
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 40)
    else:
        digits = "9" * 400
        content = {"metrics.jsonl": f'{{"kind": "train", "step": 1, "loss": {digits}}}\n',
                   "summary.json": f'[{{"top1": {digits}}}]', "config.yaml": f"seed: {digits}\n"}  # fmt: skip
        (tmp_path / name).write_text(content[name])
    outcome, grown = measured(lambda: open_run(tmp_path, str(tmp_path), "x").warnings, seconds=30)
    assert grown < 50 * MB
    if name == "config.yaml":
        assert outcome.startswith("UserError: ")
    else:
        assert outcome.startswith("returned ['")
        assert name in outcome
    assert "\n" not in outcome


def test_a_log_is_cut_without_invalid_lines(tmp_path: Path):
    from vil.training.metrics_log import cut_metrics

    good = '{"kind": "train", "step": 1, "loss": 0.5}\n'
    digits = '{"kind": "train", "step": 1, "loss": ' + "9" * 400 + "}\n"
    (tmp_path / "metrics.jsonl").write_text(good + digits + "[" * 100_000 + "\n" + good)
    assert len(cut_metrics(tmp_path / "metrics.jsonl", 5, True)) == 2
    assert (tmp_path / "metrics.jsonl").read_text() == good + good


def test_pixels_are_unchanged_by_the_limits():
    content = encoded("JPEG", 64)
    assert np.array_equal(EncodedImage(content, "RGB").decode(), np.zeros((64, 64, 3), np.uint8))


@pytest.mark.parametrize(
    ("image_size", "crop_pct", "key"), [(15000, 0.9, "model.image_size"), (224, 0.01, "data.crop_pct")]
)
def test_stored_sizes_of_images(tmp_path: Path, image_size: int, crop_pct: float, key: str):
    """Of a file of weights, whose options decide how images are resized."""
    from safetensors.torch import save_file

    from tools.programs.predict import main as predict
    from vil.config import ModelConfig, StageConfig
    from vil.models.zoo import model_from_config

    stage = StageConfig(dim=8, heads=2, blocks=1, patch=16, attention="full")
    small = ModelConfig(name="vil", stages=[stage], image_size=32, num_classes=3)
    stored = {**asdict(small), "image_size": image_size}
    metadata = {"model": json.dumps(stored), "data": json.dumps({"crop_pct": crop_pct})}
    save_file(model_from_config(small).state_dict(), tmp_path / "x.safetensors", metadata)
    (tmp_path / "x.png").write_bytes(encoded("PNG", 64))
    argv = [str(tmp_path / "x.safetensors"), str(tmp_path / "x.png"), "--device", "cpu", "--workers", "0"]
    outcome, _ = measured(predict, argv)
    assert outcome.startswith("UserError: ")
    assert key in outcome or "memory" in outcome  # the model itself may be refused before its images
