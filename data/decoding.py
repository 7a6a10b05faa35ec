"""Images that are decoded on demand, at the scale that is needed.

Pixels are those of Pillow's `Image.open(file).convert(mode)`, as in torchvision's ImageFolder: gray, CMYK and
palette images are converted to RGB (or gray) by Pillow, transparency is dropped, and an EXIF orientation is
not applied. Gray images of 16 bits are the exception: their upper 8 bits are kept, as Pillow does for colors
of 16 bits, whereas it maps gray values above 255 to white. Floats and 32-bit integers have no defined range,
and are rejected.

Ordinary JPEGs are decoded by simplejpeg if it is installed: by the same libjpeg-turbo, hence to the same
pixels, in three quarters of the time. Pillow decodes, or rejects, what simplejpeg rejects.
"""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
from PIL import Image, UnidentifiedImageError

from vil.config import Size, as_size
from vil.errors import error_reason
from vil.runtime.images import FORMATS, Mode, convert_image, supported_formats

try:
    import simplejpeg
except ImportError:  # no wheel for this machine: Pillow decodes everything
    simplejpeg = None

MAX_DECODED_BYTES = 1_600_000_000
"""Peak memory of decoding one image."""

_BYTES_PER_PIXEL = {"WEBP": 22, "JPEG2000": 25, "AVIF": 26, "TIFF": 22}
"""Peak memory per pixel from the file to RGB pixels, the decoder's included, as measured with Pillow 12;
computed for AVIF with 10 bits and alpha, and for TIFF in one strip."""
_DEFAULT_BYTES_PER_PIXEL = 14

_MAX_PIXELS_PER_BYTE = 1000
"""Limit for formats in which a few bytes can encode any number of pixels; photographs have below 200."""
_MIN_DENSE_LIMIT = 24_000_000
"""Pixels up to which that limit does not apply."""
_DENSE_FORMATS = ("WEBP", "JPEG2000", "AVIF")

SCALES = (8, 4, 2, 1)
"""Divisors at which libjpeg-turbo decodes a JPEG directly, by smaller and faster transforms."""


class UnreadableImageError(Exception):
    """An image that cannot be decoded; the text is the reason, on one line."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error_reason(error))  # without the path, which callers add


@contextmanager
def decoding_errors() -> Iterator[None]:
    """Convert exceptions of the block to UnreadableImageError.

    Decoders raise exceptions of any type for damaged files: OSError, SyntaxError, struct.error, ...
    """
    try:
        yield
    except UnreadableImageError:
        raise
    except Exception as error:
        raise UnreadableImageError(error) from error


class EncodedImage:
    """An encoded image of one of `FORMATS`, or an image of Pillow, and its target mode: RGB or L (gray)."""

    def __init__(self, content: bytes | Image.Image, mode: Mode) -> None:
        self._content = content
        self._mode = mode
        self._jpeg_size = None if isinstance(content, Image.Image) else _jpeg_size(content)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, from the header. Raises UnreadableImageError without a valid header."""
        if self._jpeg_size is not None:
            return self._jpeg_size
        with decoding_errors():
            return self._open().size

    def header(self) -> tuple[str, str]:
        """Return Pillow's format and mode, from the header. Raises UnreadableImageError if it is invalid."""
        with decoding_errors():
            image = self._open()
            return image.format or "", image.mode

    def decode(self, scale: int = 1) -> np.ndarray:
        """Return the pixels, (H, W, 3), or (H, W) for gray, uint8. Raises UnreadableImageError.

        If the format supports it, H and W are those of the image divided by `scale`, one of `SCALES`, and
        rounded up.
        """
        if self._jpeg_size is not None and self._mode == "RGB":
            width, height = (-(-side // scale) for side in self._jpeg_size)
            with suppress(ValueError):  # Pillow is more lenient, and has better messages
                pixels = simplejpeg.decode_jpeg(
                    self._content, "RGB", min_height=height, min_width=width, min_factor=scale
                )
                if pixels.shape == (height, width, 3):
                    return pixels
        with decoding_errors():
            image = self._open()
            if scale > 1:
                image.draft(None, (image.width // scale, image.height // scale))
                with suppress(OSError):  # lossless JPEGs have no reduced scales
                    return np.asarray(convert_image(image, self._mode))
                image = self._open()
            return np.asarray(convert_image(image, self._mode))

    def to_pil(self) -> Image.Image:
        """Return the whole image. Raises UnreadableImageError if it is damaged."""
        if self._jpeg_size is not None and self._mode == "RGB":
            return Image.fromarray(self.decode())
        with decoding_errors():
            return convert_image(self._open(), self._mode)

    def _open(self) -> Image.Image:
        if isinstance(self._content, Image.Image):
            return self._content
        with warnings.catch_warnings():
            # Pillow warns above 89 megapixels and raises above 179; the limits here are `max_pixels`.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            try:
                image = Image.open(io.BytesIO(self._content), formats=supported_formats())
            except UnidentifiedImageError:
                raise OSError(_identification_error(self._content)) from None
        limit = max_pixels(image.format or "", len(self._content))
        if image.width * image.height > limit:
            size = f"{image.width}×{image.height} pixels"
            raise OSError(f"{size} are more than the {limit:,} allowed for this {image.format} file")
        return image


def max_pixels(image_format: str, encoded_bytes: int) -> int:
    """Return how many pixels an image may have for decoding it to take at most `MAX_DECODED_BYTES`."""
    limit = MAX_DECODED_BYTES // _BYTES_PER_PIXEL.get(image_format, _DEFAULT_BYTES_PER_PIXEL)
    if image_format in _DENSE_FORMATS:
        limit = min(limit, max(_MIN_DENSE_LIMIT, _MAX_PIXELS_PER_BYTE * encoded_bytes))
    return limit


@functools.cache
def image_extensions() -> frozenset[str]:
    """Return the file extensions of the supported formats, in lower case: .jpg, .png, …"""
    known = Image.registered_extensions().items()
    return frozenset(end for end, name in known if name in supported_formats())


def _identification_error(content: bytes) -> str:
    """Return why Pillow identifies no image, as for an empty file or a 12-bit JPEG."""
    if not content:
        return "the file is empty"
    for name in supported_formats():
        factory, accepts = Image.OPEN[name]
        if accepts is None or accepts(content[:16]) is not True:
            continue
        try:
            factory(io.BytesIO(content), "")
        except Exception as error:
            return f"a {name} image that cannot be decoded: {error or type(error).__name__}"
    return f"no image of {', '.join(FORMATS)}"


def covering_scale(box: Size, size: int | Size) -> int:
    """Return the largest of `SCALES` at which a box (height, width) still covers `size`, or 1."""
    height, width = as_size(size)
    return next((scale for scale in SCALES if box[0] >= height * scale and box[1] >= width * scale), 1)


def _jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Return (width, height) of a JPEG that simplejpeg decodes as Pillow does, and None for other images."""
    if simplejpeg is None or content[:3] != b"\xff\xd8\xff":
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    is_too_large = width * height > max_pixels("JPEG", len(content))
    return None if is_too_large or colorspace not in ("YCbCr", "Gray") else (width, height)
