"""Small .beton files, written without FFCV."""

import io
import json

import numpy as np
from PIL import Image

from data.beton import _ALLOCATION, _FIELD, _HEADER, _RECORDS, RAW_MODE, VERSION

PAGE = 1 << 14


def as_jpeg(image, quality=95):
    """Return the bytes of a JPEG."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


FIELDS = {"image": 2, "label": 1}
"""Names and kinds of the fields, as tools/write_ffcv.py writes them."""


def write_beton(path, contents, targets, class_names=None, fields=FIELDS, kinds=_RECORDS):
    """Write images (Pillow's: as pixels; bytes with a size: as a JPEG) and their classes.

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
    offset = -(-(_HEADER.itemsize + fields.nbytes + records.nbytes) // PAGE) * PAGE
    first, pages, allocations = offset, b"", []
    for number, content in enumerate(contents):
        raw = isinstance(content, Image.Image)
        (width, height), stored = (content.size, content.tobytes()) if raw else content
        if offset // PAGE != (offset + len(stored) - 1) // PAGE:
            pages += bytes(PAGE - offset % PAGE)
            offset = first + len(pages)
        records[image][number] = RAW_MODE if raw else 0, width, height, offset
        allocations.append((number, offset, len(stored)))
        pages, offset = pages + stored, offset + len(stored)
    header = np.array([(VERSION, len(fields), PAGE, len(contents), offset)], _HEADER)
    start = header.tobytes() + fields.tobytes() + records.tobytes()
    table = np.array(allocations[::-1], _ALLOCATION).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(start + bytes(first - len(start)) + pages + table)
    if class_names is not None:
        path.with_suffix(".json").write_text(json.dumps({"class_names": list(class_names)}))


def convert_folder(source, path, jpeg=False):
    """Write the images of a source as pixels or as JPEGs; return the images or the JPEGs."""
    images = [source.load(index)[0] for index in range(len(source))]
    contents = [(image.size, as_jpeg(image)) for image in images] if jpeg else images
    write_beton(path, contents, source.targets, source.class_names)
    return contents
