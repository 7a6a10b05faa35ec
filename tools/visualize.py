"""Draws what a model attends to, on an image.

    python tools/visualize.py runs/digits image.png --output sheets
    python tools/visualize.py runs/digits image.png --query 8,8 --query 0,31 --blocks all --output sheets
    python tools/visualize.py --model configs/models/vil_small.yaml image.jpg --output sheets      untrained

For every stage: what each head attends to from each query, its window outlined on the image; what the global
tokens look at over the whole map; the attention rollout over the stage (Abnar & Zuidema, 2020); and the
learned relative bias tables. Queries are pixels of the image as the model sees it, resized and cropped. What
the sheets show is said in docs/visualize.md.
"""

from __future__ import annotations

import io
import sys
from argparse import ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.decoding import UnreadableImageError
from tools.opening import Opened, check_channels, data_section, open_checkpoint, read_picture
from vil import command_line
from vil.command_line import ToolParser, main, write_output
from vil.config import ConfigError, EvalConfig, in_section
from vil.models.multiscale_vit import MultiScaleViT
from vil.models.zoo import model_from_config
from vil.pictures import denormalised
from vil.runtime.files import refuse_input_as_output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLASSES = 1000
"""Of an untrained model whose configuration does not say how many."""


def visualize(words: Sequence[str]) -> None:
    """Reads the model and the image, and writes the sheets, one by one."""
    untrained = any(word.partition("=")[0] == "--model" for word in words)
    parser = ToolParser(prog="visualize.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    if not untrained:
        parser.add_checkpoint()
    parser.add_argument("image", help="the image: JPEG, PNG, WebP, GIF, BMP, PPM, TIFF, JPEG 2000 or AVIF")
    parser.add_argument("--model", metavar="YAML", help="in place of a checkpoint: an untrained model")
    parser.add_argument("--query", type=_pixel, action="append", metavar="ROW,COLUMN",
                        help="a pixel to look from; several may be given; default: the middle")  # fmt: skip
    parser.add_argument("--stages", type=int, nargs="+", metavar="N", help="counted from 1; default: all")
    parser.add_argument(
        "--blocks", choices=("last", "all"), default="last", help="of each stage; default: last"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="where to write the sheets"
    )
    arguments = vars(parser.parse_args(words))
    path, output = arguments.pop("image"), arguments.pop("output")
    inputs = [word for word in (path, arguments.get("checkpoint"), arguments.get("released_config")) if word]
    queries, stages, blocks = (arguments.pop(key) for key in ("query", "stages", "blocks"))
    config = arguments.pop("model")
    opened = open_untrained(config) if untrained else open_checkpoint(**arguments)
    model = opened.model
    if not isinstance(model, MultiScaleViT):
        reason = f"attention is shown of this project's models, not of {opened.config.name}"
        raise ConfigError(config or arguments["checkpoint"], reason)
    check_channels(opened.config, opened.title)
    side = opened.config.image_size
    queries = queries or [(side // 2, side // 2)]
    for row, column in queries:
        if max(row, column) >= side:
            raise ConfigError("--query", f"{row},{column} lies outside the model's {side}×{side} pixels")
    stages = stages or [*range(1, len(model.stages) + 1)]
    if not all(1 <= stage <= len(model.stages) for stage in stages):
        raise ConfigError("--stages", f"expected numbers from 1 to {len(model.stages)}, got {stages}")
    transform = opened.transform()
    try:
        images = transform(read_picture(path, opened.mode))[None]  # (1, C, H, W)
    except UnreadableImageError as error:
        raise ConfigError(path, f"cannot be read: {error}") from None
    picture = denormalised(images[0], transform.mean.flatten().tolist(), transform.std.flatten().tolist())
    title = f"{opened.title}: {Path(path).name}"
    for name, figure in sheets(model, images, picture, title, queries, sorted(set(stages)), blocks == "all"):
        refuse_input_as_output(output / f"{name}.png", inputs, "--output")
        write(figure, output / f"{name}.png")
        print(output / f"{name}.png", flush=True)


def open_untrained(path: str) -> Opened:
    """A configuration's model with its first weights, always the same. Raises ConfigError for a bad one."""
    config = command_line.parse(EvalConfig, ["--model", path], prog="visualize.py").config
    torch.manual_seed(0)
    with in_section("model"):
        model = model_from_config(config.model, CLASSES).eval()
    return Opened(model, config.model, data_section({}), None, f"{config.model.name}, untrained")


def sheets(
    model: MultiScaleViT,
    images: torch.Tensor,
    picture: torch.Tensor,
    title: str,
    queries: Sequence[tuple[int, int]],
    stages: Sequence[int],
    all_blocks: bool,
) -> Iterator[tuple[str, Figure]]:
    """The names and figures of all sheets, each drawn when it is asked for; prints what cannot be shown.

    Args:
        model: the model.
        images: (1, C, height, width), normalised.
        picture: (3, height, width) in 0..1, the same to look at.
        title: what the model and the image are.
        queries: pixels to look from.
        stages: numbers of the stages, from 1.
        all_blocks: show every block of a stage, not its last one alone.
    """
    from tools.visualizing import sheets as draw

    shown = draw.Shown(picture.permute(1, 2, 0).numpy(), title)
    maps, rollouts = model.attention_maps(images, queries), model.attention_rollout(images, queries)
    for number in stages:
        stage, of_stage = model.stages[number - 1], maps[number - 1]
        name, chosen = f"stage{number}", slice(None) if all_blocks else slice(-1, None)
        of_stage, attentions = of_stage[chosen], [*enumerate(block.attn for block in stage.blocks)][chosen]
        if not of_stage:
            print(f"stage {number}: has no blocks")
            continue
        if not of_stage[0].from_queries.on_map:
            print(
                f"stage {number}: {stage.config.attention} attends to mixtures of tokens, which have no place"
            )
            continue
        for index, (row, column) in enumerate(queries):
            yield f"{name}_query_{row}_{column}", draw.query_sheet(shown, of_stage, index, (row, column))
        if stage.num_global_tokens:
            yield f"{name}_globals", draw.globals_sheet(shown, of_stage)
        rollout = rollouts[number - 1]
        if rollout is not None:
            yield f"{name}_rollout", draw.rollout_sheet(shown, rollout, queries)
        else:
            print(f"stage {number}: no rollout, since keys of {stage.config.attention} are no tokens")
        bias = draw.bias_sheet(title.partition(": ")[0], number - 1, attentions)
        if bias is not None:
            yield f"{name}_bias", bias


def write(figure: Figure, path: Path) -> None:
    """Writes a PNG. Raises ConfigError where that cannot be done."""
    file = io.BytesIO()
    figure.savefig(file, dpi=100, format="png", facecolor="white", metadata={"Software": None})
    write_output(path, file.getvalue(), "--output")


def _pixel(word: str) -> tuple[int, int]:
    row, comma, column = word.partition(",")
    if not comma or not row.strip().isdecimal() or not column.strip().isdecimal():
        raise ArgumentTypeError(f"expected ROW,COLUMN in pixels, as 112,112, got {word!r}")
    return int(row), int(column)


if __name__ == "__main__":
    main(visualize)
