"""Small .beton files, written without FFCV."""

import io
import json

import numpy as np
from PIL import Image

from data.beton import _ALLOCATION, _FIELD, _HEADER, _IMAGE, RAW, VERSION

PAGE = 1 << 14


def as_jpeg(image, quality=95):
    """The bytes of a JPEG."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def write_beton(path, contents, targets, class_names=None):
    """Writes images (Pillow's: as pixels; bytes with a size: as a JPEG) and their classes."""
    record = np.dtype([("0", _IMAGE), ("1", "<i8")], align=True)
    records, fields = np.zeros(len(contents), record), np.zeros(2, _FIELD)
    fields["kind"] = 2, 1
    for field, name in zip(fields, (b"image", b"label")):
        field["name"][: len(name)] = np.frombuffer(name, np.uint8)
    place = -(-(_HEADER.itemsize + fields.nbytes + records.nbytes) // PAGE) * PAGE
    first, pages, allocations = place, b"", []
    for number, (content, target) in enumerate(zip(contents, targets)):
        raw = isinstance(content, Image.Image)
        (width, height), stored = (content.size, content.tobytes()) if raw else content
        if place // PAGE != (place + len(stored) - 1) // PAGE:
            pages += bytes(PAGE - place % PAGE)
            place = first + len(pages)
        records[number] = (RAW if raw else 0, width, height, place), target
        allocations.append((number, place, len(stored)))
        pages, place = pages + stored, place + len(stored)
    header = np.array([(VERSION, 2, PAGE, len(contents), place)], _HEADER)
    start = header.tobytes() + fields.tobytes() + records.tobytes()
    table = np.array(allocations[::-1], _ALLOCATION).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(start + bytes(first - len(start)) + pages + table)
    if class_names is not None:
        path.with_suffix(".json").write_text(json.dumps({"class_names": list(class_names)}))


def convert_folder(source, path, jpeg=False):
    """Writes the images of a source, all as pixels, or all as JPEGs; returns the JPEGs' bytes."""
    images = [source.load(index)[0] for index in range(len(source))]
    contents = [(image.size, as_jpeg(image)) for image in images] if jpeg else images
    write_beton(path, contents, source.targets, source.class_names)
    return contents
