"""Report what a data set contains, before training on it.

    python tools/inspect_data.py photos                   root/<class>/<image>, or root/train and root/val
    python tools/inspect_data.py photos --json report.json --sheet sheet.png
    python tools/inspect_data.py /datasets/imagenet --source zip --splits train

The table has images per class and split, sizes, file formats, gray and deep images, unreadable files, exact
and near duplicates within and across splits, and class imbalance. Exact duplicates have equal pixels; near
duplicates have perceptual hashes (pHash of the package ImageHash, 64 bits) that differ in at most
--near-distance bits. Duplicates of another class or in another split come first: they are wrong labels, or
make the validation too optimistic. The sheet shows the first images of each class.

Exit status: 0, or 1 if an image cannot be read; 2 for invalid arguments or a data set that cannot be opened.
"""

from __future__ import annotations

import json
import os
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path

from data import refuse_images_as_outputs
from data.sources import SOURCES
from tools.data_inspection.contact_sheet import contact_sheet
from tools.data_inspection.duplicates import HASH_BITS, MAX_NEAR_DISTANCE, find_duplicates
from tools.data_inspection.images import open_splits, read_images
from tools.data_inspection.report import Report, as_json, as_text
from vil.command_line import ToolParser, bounded_int
from vil.config import Size
from vil.runtime.console import print_line
from vil.runtime.files import check_outputs, check_writable, write_output


def main(argv: Sequence[str]) -> None:
    """Inspect a data set; print the table, and write the JSON file and the sheet.

    Raises:
        UserError: an argument or the data set cannot be used.
        SystemExit: with status 1 if an image cannot be read.
    """
    arguments = _parser().parse_args(argv)
    outputs = {"--json": arguments.json, "--sheet": arguments.sheet}
    check_outputs(outputs, ())
    refuse_images_as_outputs(outputs, [arguments.root])
    for option, path in outputs.items():
        if path is not None:
            check_writable(path, option)
    sources = open_splits(arguments.root, arguments.source, arguments.splits)
    images = list(read_images(sources, arguments.workers))
    class_names = next(iter(sources.values())).class_names
    duplicates = find_duplicates(images, arguments.near_distance)
    report = Report(images, class_names, arguments.image_size, duplicates)
    if arguments.json is not None:
        write_output(arguments.json, json.dumps(as_json(report), indent=1) + "\n", "--json")
    if arguments.sheet is not None:
        write_output(arguments.sheet, contact_sheet(sources, arguments.columns), "--sheet")
    for line in as_text(report).splitlines():
        print_line(line)  # also into a pipe that is closed, as of head
    if report.unreadable:
        raise SystemExit(1)


def _parser() -> ToolParser:
    parser = ToolParser(prog="inspect_data.py", description=__doc__)
    add, workers = parser.add_argument, min(4, os.cpu_count() or 1)
    add("root", help="folder of the data set, as data.root")
    add("--source", default="folder", help=f"as data.source: {', '.join(SOURCES)} (default: folder)")
    splits_help = "as data.train_split and data.val_split; default: those that exist of train and val, or "
    splits_help += "the images of the root itself"
    add("--splits", nargs="+", metavar="NAME", help=splits_help)
    size_help = "PIXELS or HEIGHT,WIDTH of the model: smaller images are counted (default: 224)"
    add("--image-size", type=_image_size, default=224, metavar="PIXELS", help=size_help)
    distance_help = f"largest number of differing bits of {HASH_BITS} (default: 4)"
    near = bounded_int(0, MAX_NEAR_DISTANCE)
    add("--near-distance", type=near, default=4, metavar="BITS", help=distance_help)
    add("--json", type=Path, metavar="FILE", help="write the full report, with every file name")
    add("--sheet", type=Path, metavar="FILE", help="write a PNG with the first images of each class")
    add("--columns", type=bounded_int(1, 30), default=8, metavar="N", help="images per class of the sheet")
    add("--workers", type=bounded_int(0), default=workers, metavar="N", help="processes that read images")
    return parser


def _image_size(text: str) -> int | Size:
    sides = tuple(map(bounded_int(1), text.split(",")))
    if len(sides) > 2:
        raise ArgumentTypeError(f"expected PIXELS or HEIGHT,WIDTH, e.g. 160,224, got {text!r}")
    return sides[0] if len(set(sides)) == 1 else (sides[0], sides[1])
