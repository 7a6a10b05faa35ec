"""Small .beton files, written without FFCV."""

import io
import json

import numpy as np
from PIL import Image

from data.beton import _ALLOCATION, _FIELD, _HEADER, _RECORDS, RAW, VERSION

PAGE = 1 << 14


def as_jpeg(image, quality=95):
    """The bytes of a JPEG."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


FIELDS = {"image": 2, "label": 1}
"""Names and kinds of the fields, as tools/write_ffcv.py writes them."""


def write_beton(path, contents, targets, class_names=None, fields=FIELDS, kinds=_RECORDS):
    """Writes images (Pillow's: as pixels; bytes with a size: as a JPEG) and their classes.

    `fields` are others than the usual: `label` has the classes, further integers count from 0.
    """
    record = np.dtype([(name, kinds[kind]) for name, kind in fields.items()], align=True)
    records, descriptors = np.zeros(len(contents), record), np.zeros(len(fields), _FIELD)
    descriptors["kind"] = list(fields.values())
    for field, name in zip(descriptors, fields):
        field["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
    for name, kind in fields.items():
        if kind in (0, 1):
            records[name] = targets if name in ("label", "Target") else range(len(contents))
    fields, image = descriptors, next(name for name, kind in fields.items() if kind == 2)
    place = -(-(_HEADER.itemsize + fields.nbytes + records.nbytes) // PAGE) * PAGE
    first, pages, allocations = place, b"", []
    for number, content in enumerate(contents):
        raw = isinstance(content, Image.Image)
        (width, height), stored = (content.size, content.tobytes()) if raw else content
        if place // PAGE != (place + len(stored) - 1) // PAGE:
            pages += bytes(PAGE - place % PAGE)
            place = first + len(pages)
        records[image][number] = RAW if raw else 0, width, height, place
        allocations.append((number, place, len(stored)))
        pages, place = pages + stored, place + len(stored)
    header = np.array([(VERSION, len(fields), PAGE, len(contents), place)], _HEADER)
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
