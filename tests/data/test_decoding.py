"""Decoding: Pillow's pixels for every kind of image, and the scale that a crop needs."""

import io
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation

from data import decoding
from data.crops import RandomResizedCrop
from data.decoding import EncodedImage, UnreadableImageError, covering_scale
from data.transforms import train_transform
from vil.config import AugmentConfig, DataConfig
from vil.runtime.seeding import seeded


def smooth(size=(90, 70), mode="RGB"):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(size).convert(mode)


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rotated():
    """Return a JPEG whose EXIF orientation is a quarter turn."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(smooth(), exif=exif)


KINDS = {
    "rgb": encoded(smooth()),
    "progressive": encoded(smooth(), progressive=True),
    "444": encoded(smooth(), subsampling=0),
    "gray": encoded(smooth(mode="L")),
    "cmyk": encoded(smooth(mode="CMYK")),
    "rgb without YCbCr": encoded(smooth(), keep_rgb=True),
    "exif": rotated(),
    "tiny": encoded(smooth((1, 1))),
    "narrow": encoded(smooth((3, 400))),
    "png": encoded(smooth(), "PNG"),
    "palette": encoded(smooth().quantize(16), "PNG"),
    "palette, transparent": encoded(smooth().quantize(16), "PNG", transparency=b"\0\x80"),
    "alpha": encoded(smooth().convert("RGBA"), "PNG"),
    "gray and alpha": encoded(smooth(mode="L").convert("LA"), "PNG"),
    "1 bit": encoded(smooth(mode="1"), "PNG"),
    "gif": encoded(smooth(), "GIF"),
    "webp": encoded(smooth(), "WEBP"),
    "bmp": encoded(smooth(), "BMP"),
    "tiff": encoded(smooth(), "TIFF"),
}


@pytest.fixture(params=[True, False], ids=["simplejpeg", "pillow"])
def either_decoder(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(decoding, "simplejpeg", None)
    elif decoding.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")


@pytest.mark.usefixtures("either_decoder")
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_torchvisions_loader(kind, mode):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = Image.open(io.BytesIO(KINDS[kind])).convert(mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoded_image = EncodedImage(KINDS[kind], mode)
        assert encoded_image.size == expected.size
        assert (encoded_image.decode() == np.asarray(expected)).all()
        image = encoded_image.to_pil()
    assert (image.mode, image.size) == (mode, expected.size)
    assert (np.asarray(image) == np.asarray(expected)).all()
    for crop in ("random_resized", "pad_random", "resize_random"):
        channels = 3 if mode == "RGB" else 1
        transform = train_transform(AugmentConfig(crop=crop), DataConfig(), image_size=16, in_chans=channels)
        with seeded(0, "test", 0):
            assert transform(encoded_image).shape == (channels, 16, 16)


@pytest.mark.usefixtures("either_decoder")
@pytest.mark.parametrize("scale", decoding.SCALES)
def test_a_jpeg_is_decoded_at_a_scale(scale):
    encoded_image = EncodedImage(encoded(smooth((645, 483))), "RGB")
    pixels = encoded_image.decode(scale)
    assert pixels.shape == (-(-483 // scale), -(-645 // scale), 3)
    reference = np.asarray(encoded_image.to_pil().reduce(scale))
    assert np.abs(pixels.astype(int) - reference).mean() < 2


def test_both_decoders_agree_at_every_scale(monkeypatch):
    if decoding.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")
    content = encoded(smooth((645, 483)))
    fast = [EncodedImage(content, "RGB").decode(scale) for scale in decoding.SCALES]
    monkeypatch.setattr(decoding, "simplejpeg", None)
    for pixels, scale in zip(fast, decoding.SCALES):
        assert (EncodedImage(content, "RGB").decode(scale) == pixels).all()


@pytest.mark.parametrize(
    ("box", "scale"), [((224, 224), 1), ((447, 900), 1), ((448, 448), 2), ((896, 2000), 4), ((9000, 9000), 8)]
)
def test_the_scale_covers_the_crop(box, scale):
    assert covering_scale(box, 224) == scale


@pytest.mark.parametrize(("size", "most", "mean"), [((220, 160), 2, 0.5), ((1300, 900), 12, 2)])
def test_the_crop_equals_timms_but_for_rounding(size, most, mean):
    encoded_image = EncodedImage(encoded(smooth(size), quality=95), "RGB")
    for view in range(12):
        interpolation = ("bilinear", "bicubic")[view % 2]
        with seeded(0, "test", view):
            ours = RandomResizedCrop(112, (0.08, 1.0), (3 / 4, 4 / 3), interpolation)(encoded_image)
        with seeded(0, "test", view):
            timms = RandomResizedCropAndInterpolation(112, interpolation=interpolation)(
                encoded_image.to_pil()
            )
        difference = np.abs(ours.astype(int) - np.asarray(timms))
        assert difference.max() <= most
        assert difference.mean() < mean


def test_crops_of_photographs_differ_from_pillows_as_documented(photographs):
    """At full scale by rounding; at half scale by another filter, most at edges."""
    differences = {1: [], 2: []}
    for index, path in enumerate(sorted(Path(photographs).rglob("*.JPEG"))):
        encoded_image = EncodedImage(path.read_bytes(), "RGB")
        interpolation = ("bilinear", "bicubic")[index % 2]
        crop = RandomResizedCrop(224, (0.08, 1.0), (3 / 4, 4 / 3), interpolation)
        with seeded(0, "test", index):
            box, _ = crop.draw(*encoded_image.size)
        top, left, rows, columns = box
        sides = (left, top, left + columns, top + rows)
        filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
        pillows = encoded_image.to_pil().crop(sides).resize((224, 224), filters[interpolation])
        ours = crop.crop(encoded_image, box, interpolation)
        difference = np.abs(ours.astype(int) - np.asarray(pillows))
        differences[covering_scale((columns, rows), 224)].append((difference.mean(), difference.max()))
    full, half = (np.array(found) for found in differences.values())
    assert full[:, 0].mean() < 0.05
    assert np.median(full[:, 1]) == 1
    assert full[:, 1].max() <= 19
    assert 1 < half[:, 0].mean() < 4
    assert half[:, 1].max() <= 124


def test_a_photograph_of_100_megapixels_is_cropped_from_an_eighth_of_it(monkeypatch):
    content = encoded(Image.new("RGB", (11600, 8700), (200, 100, 50)))
    asked = []
    pixels = EncodedImage.decode
    monkeypatch.setattr(
        EncodedImage, "decode", lambda self, scale=1: asked.append(scale) or pixels(self, scale)
    )
    with warnings.catch_warnings(), seeded(0, "test", 0):
        warnings.simplefilter("error")
        crop = RandomResizedCrop(224, (0.5, 1.0), (3 / 4, 4 / 3), "bicubic")(EncodedImage(content, "RGB"))
    assert asked == [8]
    assert np.abs(crop.astype(int) - (200, 100, 50)).max() <= 3


@pytest.mark.usefixtures("either_decoder")
def test_damaged_images_raise_one_line_errors():
    whole = KINDS["rgb"]
    huge = bytearray(whole)
    index = huge.index(b"\xff\xc0") + 5
    huge[index : index + 4] = struct.pack(">HH", 65000, 65000)
    png = KINDS["png"]
    for content in (b"", b"text", whole[:20], whole[: len(whole) // 2], bytes(huge), png[:200], png[:40]):
        for action in (
            EncodedImage.to_pil,
            EncodedImage.decode,
            lambda encoded_image: encoded_image.decode(8),
        ):
            with pytest.raises(UnreadableImageError) as error:
                action(EncodedImage(content, "RGB"))
            assert str(error.value)
            assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------- more than 8 bits per sample

RAMP = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)


def tiff(values, bits, photometric=1, sample_format=1):
    """A little-endian gray TIFF of one strip, of `bits` per sample."""
    if bits == 12:  # two samples in three bytes
        pairs = values.reshape(-1, 2).astype(np.uint32)
        packed = (pairs[:, 0] << 12) | pairs[:, 1]
        strip = np.stack([packed >> 16, packed >> 8, packed], axis=1).astype(np.uint8).tobytes()
    else:
        strip = values.tobytes()
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height}
    tags |= {279: len(strip), 339: sample_format}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return (
        b"II*\0"
        + struct.pack("<I", 8 + len(strip))
        + strip
        + struct.pack("<H", len(tags))
        + entries
        + bytes(4)
    )


def pgm(values, highest):
    return f"P5 {values.shape[1]} {values.shape[0]} {highest}\n".encode() + values.astype(">u2").tobytes()


DEEP = {
    "png": encoded(Image.fromarray(RAMP), "PNG"),
    "tiff": encoded(Image.fromarray(RAMP), "TIFF"),
    "tiff, big endian": encoded(Image.fromarray(RAMP.astype(">u2")), "TIFF"),
    "tiff of 12 bits": tiff(RAMP >> 4, 12),
    "tiff, white is zero": tiff(65535 - RAMP, 16, photometric=0),
    "jpeg 2000": encoded(Image.fromarray(RAMP), "JPEG2000"),
    "pgm": pgm(RAMP, 65535),
    "pgm of 12 bits": pgm(RAMP >> 4, 4095),
}


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", DEEP)
def test_the_upper_eight_bits_of_deep_gray_images_are_kept(kind, mode):
    encoded_image = EncodedImage(DEEP[kind], mode)
    expected = (RAMP >> 8).astype(int)
    for pixels in (encoded_image.decode(), np.asarray(encoded_image.to_pil()), encoded_image.decode(8)):
        assert pixels.dtype == np.uint8
        gray = pixels[..., 0] if mode == "RGB" else pixels
        # a PGM of another maximum is scaled by it
        assert np.abs(gray.astype(int) - expected).max() <= (1 if kind == "pgm of 12 bits" else 0)
        assert mode == "L" or (pixels == pixels[..., :1]).all()


def test_deep_gray_images_in_memory_are_reduced():
    assert (EncodedImage(Image.fromarray(RAMP), "L").decode() == RAMP >> 8).all()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (encoded(Image.fromarray((RAMP / 65535).astype(np.float32)), "TIFF"), "floats"),
        (b"Pf 64 64 -1.0\n" + (RAMP / 65535).astype("<f4").tobytes(), "floats"),
        (encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "32-bit or signed integers"),
        (tiff(RAMP.astype(np.int16), 16, sample_format=2), "32-bit or signed integers"),
        (Image.fromarray(RAMP.astype(np.int32)), "32-bit or signed integers"),
    ],
)
def test_pixels_without_a_defined_range_are_rejected(content, kind):
    for action in (EncodedImage.to_pil, EncodedImage.decode, lambda encoded_image: encoded_image.decode(8)):
        with pytest.raises(UnreadableImageError, match=f"its pixels are {kind}, of no defined range"):
            action(EncodedImage(content, "RGB"))


def lossless_jpeg(values):
    """A lossless gray JPEG (SOF3, ITU-T T.81 annex H), each sample predicted by the one to its left."""
    predicted = np.full(values.shape, 128)
    predicted[:, 1:] = values[:, :-1]
    predicted[1:, 0] = values[:-1, 0]
    bits = ""
    for difference in (values.astype(int) - predicted).ravel().tolist():
        size = abs(difference).bit_length()
        bits += f"{size:04b}"  # the code of each size is itself
        if size:
            bits += f"{difference if difference > 0 else difference + (1 << size) - 1:0{size}b}"
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    height, width = values.shape
    table = bytes([0, 0, 0, 0, 9, *[0] * 12, *range(9)])  # nine codes of four bits
    segments = [
        (0xC3, struct.pack(">BHHB3B", 8, height, width, 1, 1, 0x11, 0)),
        (0xC4, table),
        (0xDA, bytes([1, 1, 0, 1, 0, 0])),
    ]
    head = b"".join(struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body for marker, body in segments)
    return b"\xff\xd8" + head + scan + b"\xff\xd9"


@pytest.mark.usefixtures("either_decoder")
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_lossless_jpeg_is_read_at_every_scale(mode):
    values = np.asarray(smooth((90, 70), "L"))
    encoded_image = EncodedImage(lossless_jpeg(values), mode)
    for scale in decoding.SCALES:
        pixels = encoded_image.decode(scale)
        assert (pixels == (values if mode == "L" else values[..., None])).all()
    with seeded(0, "test", 0):
        assert RandomResizedCrop(16, (0.9, 1.0), (3 / 4, 4 / 3), "bicubic")(encoded_image).shape[:2] == (
            16,
            16,
        )


def test_unsupported_variants_of_a_format_are_reported_as_such():
    twelve_bits = bytearray(KINDS["rgb"])
    twelve_bits[twelve_bits.index(b"\xff\xc0") + 4] = 12
    for content, reason in (
        (bytes(twelve_bits), "a JPEG image that cannot be decoded: .*12-bit"),
        (tiff(RAMP, 16, photometric=9), "a TIFF image that cannot be decoded: "),
        (b"text" * 9, "no image of JPEG"),
        (b"", "the file is empty"),
    ):
        with pytest.raises(UnreadableImageError, match=f"^{reason}") as error:
            EncodedImage(content, "RGB").to_pil()
        assert "\n" not in str(error.value)


def test_lab_becomes_gray():
    content = encoded(Image.new("LAB", (8, 8), (128, 128, 128)), "TIFF")
    gray, colors = (EncodedImage(content, mode).decode() for mode in ("L", "RGB"))
    assert (gray == np.asarray(Image.fromarray(colors).convert("L"))).all()
