"""Encoded images, decoded when their pixels are asked for, and only at the scale at which they are.

Pixels are those of Pillow's `Image.open(file).convert(mode)`, which is what torchvision's ImageFolder gives:
grey, CMYK and palette images become RGB (or grey) as Pillow converts them, transparency is dropped, and an
orientation in EXIF is not applied. Grey images of 16 bits are the exception: their upper 8 bits are kept, as
Pillow itself does with colours of 16 bits, where it turns grey values above 255 white. Floats and 32-bit
integers have no defined range, and are refused.

Ordinary JPEGs are decoded by simplejpeg where it is installed: the same libjpeg-turbo, hence the same pixels,
in three quarters of the time. Whatever it refuses is Pillow's to decode or to refuse.
"""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

try:
    import simplejpeg
except ImportError:  # no wheel for this machine: Pillow decodes everything
    simplejpeg = None

Mode = Literal["RGB", "L"]

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "JPEG2000", "AVIF")
"""Formats that are read, whatever a file is named. Pillow knows more; for one of them, PostScript, it runs a
program of its own, which nobody's images are to decide."""

MAX_ENCODED_BYTES = 1 << 29
"""Size of an encoded image: of 134 megapixels, RGB, not compressed."""

MAX_DECODED_BYTES = 1_600_000_000
"""Memory that decoding one image may take at its peak."""

_BYTES_PER_PIXEL = {"WEBP": 22, "JPEG2000": 25, "AVIF": 26, "TIFF": 22}
"""Peak memory per pixel from the file to RGB pixels, the decoder's own included, as measured with Pillow 12;
for AVIF with 10 bits and alpha, and TIFF in one strip, added up."""
_OTHER_BYTES_PER_PIXEL = 14

_MAX_PIXELS_PER_BYTE = 1000
"""Limit for formats in which a few bytes can stand for any number of pixels; photographs have below 200."""
_FREE_PIXELS = 24_000_000
"""Images up to this size may be as small as they like."""
_DENSE_FORMATS = ("WEBP", "JPEG2000", "AVIF")

SCALES = (8, 4, 2, 1)
"""Divisors at which libjpeg-turbo decodes a JPEG directly, by smaller and fast transforms."""


class UnreadableImageError(Exception):
    """An image that cannot be decoded; the text is one line that says why."""

    def __init__(self, error: BaseException) -> None:
        reason = getattr(error, "strerror", None) or str(error)  # without the path, which is named anyway
        super().__init__(" ".join(reason.split()) or type(error).__name__)


@contextmanager
def decoding() -> Iterator[None]:
    """Makes whatever is raised inside an UnreadableImageError.

    Decoders raise anything on damaged files: OSError, SyntaxError, struct.error, ...
    """
    try:
        yield
    except UnreadableImageError:
        raise
    except Exception as error:
        raise UnreadableImageError(error) from error


class Picture:
    """An image whose size is known and whose pixels are not decoded yet.

    Args:
        content: an encoded image of one of `FORMATS`, or an image.
        mode: RGB or L (grey): what it is converted to.
    """

    def __init__(self, content: bytes | Image.Image, mode: Mode) -> None:
        self._content = content
        self._mode = mode
        self._jpeg_size = None if isinstance(content, Image.Image) else _jpeg_size(content)
        self._image = content if isinstance(content, Image.Image) else None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, from the header. Raises UnreadableImageError where there is none."""
        if self._jpeg_size is not None:
            return self._jpeg_size
        with decoding():
            return self._opened().size

    def pixels(self, scale: int = 1) -> np.ndarray:
        """The pixels, (H, W, 3) or, for grey, (H, W), uint8.

        Args:
            scale: one of `SCALES`. H and W are those of the image divided by it, rounded up, if the format
                can be decoded so; else those of the image.

        Raises:
            UnreadableImageError: the image is damaged.
        """
        if self._jpeg_size is not None and self._mode == "RGB":
            width, height = (-(-side // scale) for side in self._jpeg_size)
            try:
                decoded = simplejpeg.decode_jpeg(
                    self._content, "RGB", min_height=height, min_width=width, min_factor=scale
                )
                if decoded.shape == (height, width, 3):
                    return decoded
            except ValueError:
                pass  # Pillow is more lenient, and says more about what is wrong
        with decoding():
            image = self._opened()
            if scale == 1:
                return np.asarray(_converted(image, self._mode))
            image.draft(None, (image.width // scale, image.height // scale))
            try:
                return np.asarray(_converted(image, self._mode))
            except OSError:  # lossless JPEGs have no reduced scales
                return np.asarray(_converted(self._opened(), self._mode))

    def image(self) -> Image.Image:
        """The whole image. Raises UnreadableImageError where it is damaged."""
        if self._jpeg_size is not None and self._mode == "RGB":
            return Image.fromarray(self.pixels())
        with decoding():
            return _converted(self._opened(), self._mode)

    def _opened(self) -> Image.Image:
        if self._image is not None:
            return self._image
        assert isinstance(self._content, bytes)
        with warnings.catch_warnings():
            # Above 89 megapixels Pillow warns, above 179 it refuses: the first is no news to a training run.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            try:
                image = Image.open(io.BytesIO(self._content), formats=_known_formats())
            except UnidentifiedImageError:
                raise OSError(_why_unidentified(self._content)) from None
        limit = max_pixels(image.format or "", len(self._content))
        if image.width * image.height > limit:
            size = f"{image.width}×{image.height} pixels"
            raise OSError(f"{size} are more than the {limit:,} that such a {image.format} file may have")
        return image


def max_pixels(image_format: str, encoded_bytes: int) -> int:
    """Return how many pixels an image may have, so that decoding it takes at most `MAX_DECODED_BYTES`."""
    limit = MAX_DECODED_BYTES // _BYTES_PER_PIXEL.get(image_format, _OTHER_BYTES_PER_PIXEL)
    if image_format in _DENSE_FORMATS:
        limit = min(limit, max(_FREE_PIXELS, _MAX_PIXELS_PER_BYTE * encoded_bytes))
    return limit


@functools.cache
def _known_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def extensions() -> tuple[str, ...]:
    """How the names of files of `FORMATS` end, in lower case: .jpg, .png, …"""
    return tuple(end for end, name in Image.registered_extensions().items() if name in _known_formats())


def _why_unidentified(content: bytes) -> str:
    """Return why Pillow opens nothing: its own reason, as for a 12-bit JPEG, if the format is one of ours."""
    if not content:
        return "the file is empty"
    for name in _known_formats():
        factory, accepts = Image.OPEN[name]
        if accepts is None or accepts(content[:16]) is not True:
            continue
        try:
            factory(io.BytesIO(content), "")
        except Exception as error:
            return f"a {name} image that cannot be decoded: {error or type(error).__name__}"
    return f"no image of {', '.join(FORMATS)}"


def covering_scale(box: tuple[int, int], size: int) -> int:
    """The greatest of `SCALES` at which a box of (width, height) keeps `size` pixels on both sides."""
    return next((scale for scale in SCALES if min(box) >= size * scale), 1)


def _jpeg_size(content: bytes) -> tuple[int, int] | None:
    """(Width, height) of a JPEG that simplejpeg decodes as Pillow does; None for all that Pillow reads."""
    if simplejpeg is None or content[:3] != b"\xff\xd8\xff":
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    is_bomb = width * height > max_pixels("JPEG", len(content))
    return None if is_bomb or colorspace not in ("YCbCr", "Gray") else (width, height)


def _converted(image: Image.Image, mode: Mode) -> Image.Image:
    with warnings.catch_warnings():
        # "Palette images with transparency should be converted to RGBA": nothing here looks through an image.
        warnings.filterwarnings("ignore", message="Palette images with Transparency")
        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            image = _eight_bits(image)
        elif image.mode == "LAB":
            image = image.convert("RGB")  # the only mode that Pillow converts it to
        return image.convert(mode)


_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF 6.0, section 8


def _eight_bits(image: Image.Image) -> Image.Image:
    """Reduce a grey image of 16 bits, or of as many as a TIFF declares, to its upper 8.

    Raises:
        ValueError: its values have no defined range.
    """
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):  # these hold 16 bits
        kind = "floats" if image.mode == "F" else "32-bit or signed integers"
        raise ValueError(f"its pixels are {kind}, of no defined range; 8 or 16 bits without sign are read")
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
    values = (np.asarray(image) >> (bits - 8)).astype(np.uint8)  # (H, W)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # which Pillow applies to at most 8 bits
        values = 255 - values
    return Image.fromarray(values)
