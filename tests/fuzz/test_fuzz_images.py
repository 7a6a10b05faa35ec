"""Truncated and corrupted images, and small files with many pixels: an image, or an UnreadableImageError."""

import io
import struct
import subprocess
import zlib

import numpy as np
import pytest
from helpers.mutations import EXAMPLES, bounded
from PIL import Image

from data.decoding import FORMATS, EncodedImage, UnreadableImageError, decoding_errors
from data.transforms import evaluation_transform, train_transform
from vil.config import AugmentConfig, DataConfig

KINDS = {
    "JPEG": {}, "progressive": {"progressive": True}, "PNG": {}, "WEBP": {}, "lossless": {"lossless": True},
    "TIFF": {}, "deflated": {"compression": "tiff_adobe_deflate"}, "GIF": {}, "BMP": {}, "PPM": {},
}  # fmt: skip
WRITTEN_AS = {"progressive": "JPEG", "lossless": "WEBP", "deflated": "TIFF"}


def encoded(kind, size=(24, 17)):
    pixels = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, WRITTEN_AS.get(kind, kind), **KINDS[kind])
    return file.getvalue()


def decode(use, content):
    """Decode an image; fail unless it is returned or refused with one line."""
    with bounded():
        try:
            found = np.asarray(use(EncodedImage(content, "RGB"))).ndim
        except UnreadableImageError as error:
            found = str(error)
    assert found == 3 or (found and "\n" not in found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")  # of Pillow, about what is wrong with a file: it is read all the same
def test_damaged_images(kind):
    whole, random = encoded(kind), np.random.default_rng(3)
    assert EncodedImage(whole, "RGB").decode().shape == (17, 24, 3)
    for number in range(EXAMPLES or 60):
        content = bytearray(whole)
        if number % 2:
            del content[random.integers(len(content)) :]
        else:
            for place in random.integers(min(len(content), 400), size=random.integers(1, 4)):
                content[place] ^= 1 << random.integers(8)
        for use in (EncodedImage.decode, EncodedImage.to_pil, lambda picture: picture.decode(8)):
            decode(use, bytes(content))


def png(width, height):
    """Return a PNG of so many pixels, all black: a thousandth of them in bytes."""

    def chunk(name, content):
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width // 8 + 1) * min(height, 1000)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_more_pixels_than_a_photograph_has():
    with bounded(), pytest.raises(UnreadableImageError, match="exceeds limit"):
        EncodedImage(png(50_000, 50_000), "RGB").decode()


@pytest.mark.parametrize("size", [(1, 40_000), (40_000, 1)])
@pytest.mark.parametrize("crop", ["none", "pad_random", "resize_random", "random_resized"])
def test_a_line_of_pixels_is_cut_before_it_is_enlarged(size, crop):
    """Resized as a whole, it would have 256 × 10,240,000 pixels."""
    data = DataConfig()
    transforms = [
        evaluation_transform(data, image_size=224, in_chans=3),
        train_transform(AugmentConfig(crop=crop), data, image_size=224, in_chans=3),
    ]
    with bounded():
        for transform in transforms:
            assert transform(EncodedImage(encoded("PNG", size), "RGB")).shape == (3, 224, 224)


def test_postscript_is_not_run(monkeypatch):
    """Pillow passes PostScript to an interpreter, regardless of the name of the file."""

    def refuse(*arguments, **options):
        raise AssertionError(f"started {arguments}")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    assert Image.open(io.BytesIO(content)).format == "EPS"
    with pytest.raises(UnreadableImageError, match=f"no image of {FORMATS[0]}"), decoding_errors():
        EncodedImage(content, "RGB").decode()
