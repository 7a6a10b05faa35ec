"""Draw what a model attends to in an image.

    python tools/visualize.py runs/digits image.png --output figures
    python tools/visualize.py runs/digits image.png --query 8,8 --query 0,31 --blocks all --output figures
    python tools/visualize.py --model configs/models/vil_small.yaml image.jpg --output figures     untrained

For every stage: attention from each query per head, with the outline of its window; attention from the
global tokens; attention rollout over the stage (Abnar & Zuidema, 2020); and the learned relative bias tables.
Queries are pixels of the model input, which is resized and cropped. docs/visualize.md explains the figures.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from data.decoding import UnreadableImageError
from tools.image_reader import ImageReader
from tools.png import as_png
from tools.visualization import figures
from vil import command_line
from vil.checkpoints.open import open_weights
from vil.command_line import ToolParser, bounded_int
from vil.config import EvalConfig, ModelConfig
from vil.errors import COMMAND_LINE, UserError, errors_in_section
from vil.models.multiscale_vit import MultiScaleViT
from vil.models.zoo import model_from_config
from vil.runtime.console import print_line
from vil.runtime.files import refuse_input_as_output, write_output
from vil.runtime.images import denormalize

DEFAULT_CLASSES = 1000
"""Classes of an untrained model whose configuration leaves them open."""


def main(argv: Sequence[str]) -> None:
    """Open the model, read the image and write the figures one by one."""
    arguments = _parser().parse_intermixed_args(argv)
    if (arguments.checkpoint is None) == (arguments.model is None):
        raise UserError(COMMAND_LINE, "expected a checkpoint, or --model for an untrained model")
    if arguments.model is not None:
        choices = (arguments.released_config, arguments.weights, arguments.run_checkpoint)
        if choices != (None, "auto", "best"):
            reason = "is untrained; --released-config, --weights and --run-checkpoint are for a checkpoint"
            raise UserError("--model", reason, COMMAND_LINE)
        model, config = build_untrained(arguments.model)
        options: Mapping[str, Any] = {}
        model_path, title = arguments.model, f"{config.name}, untrained"
    else:
        weights = open_weights(
            arguments.checkpoint, arguments.released_config, arguments.run_checkpoint, arguments.weights
        )
        model = weights.build_model()
        config, options, model_path = weights.require_model(), weights.transform, arguments.checkpoint
        title = f"{Path(model_path).name or model_path}, {weights.kind} weights"
    if not isinstance(model, MultiScaleViT):
        raise UserError(model_path, f"only models of this project can be visualized, not {config.name}")
    height, width = config.size
    queries = arguments.query or [(height // 2, width // 2)]
    for row, column in queries:
        if row >= height or column >= width:
            reason = f"{row},{column} is outside the model input of {height}×{width} pixels"
            raise UserError("--query", reason)
    stages = sorted(set(arguments.stages or range(1, len(model.stages) + 1)))
    if stages[-1] > len(model.stages):
        raise UserError("--stages", f"expected numbers from 1 to {len(model.stages)}, got {stages}")
    reader = ImageReader(config, options, model_path)
    try:
        images = reader(arguments.image)[None]  # (1, C, H, W)
    except UnreadableImageError as error:
        raise UserError(arguments.image, f"cannot be read: {error}") from None
    pixels = denormalize(images[0], reader.mean, reader.std).permute(1, 2, 0).numpy()  # (H, W, 3)
    canvas = figures.Canvas(pixels, f"{title}: {Path(arguments.image).name}")
    inputs = [path for path in (arguments.image, arguments.checkpoint, arguments.released_config) if path]
    outputs = draw_figures(model, images, canvas, queries, stages, arguments.blocks == "all")
    for name, figure in outputs:
        path = arguments.output / f"{name}.png"
        refuse_input_as_output(path, inputs, "--output")
        write_output(path, as_png(figure, dpi=100), "--output")
        print_line(str(path))


def build_untrained(path: str) -> tuple[torch.nn.Module, ModelConfig]:
    """Build the model of a configuration with reproducible random weights, in eval mode."""
    config = command_line.parse(EvalConfig, ["--model", path], prog="visualize.py").config.model
    torch.manual_seed(0)
    with errors_in_section("model"):
        return model_from_config(config, DEFAULT_CLASSES).eval(), config


def draw_figures(
    model: MultiScaleViT,
    images: torch.Tensor,
    canvas: figures.Canvas,
    queries: Sequence[tuple[int, int]],
    stages: Sequence[int],
    all_blocks: bool,
) -> Iterator[tuple[str, Figure]]:
    """Yield (name, figure) for normalized images (1, C, H, W), of all blocks or of the last one of a stage.

    Print a line for each figure that a stage cannot have.
    """
    maps, rollouts = model.attention_maps(images, queries), model.attention_rollout(images, queries)
    blocks_shown = slice(None) if all_blocks else slice(-1, None)
    for number in stages:
        stage, name = model.stages[number - 1], f"stage{number}"
        blocks = maps[number - 1][blocks_shown]
        if not blocks:
            print_line(f"stage {number}: no blocks")
            continue
        if not blocks[0].from_queries.has_positions:
            print_line(f"stage {number}: keys of {stage.config.attention} have no position on the map")
            continue
        for index, pixel in enumerate(queries):
            yield f"{name}_query_{pixel[0]}_{pixel[1]}", figures.query_figure(canvas, blocks, index, pixel)
        if stage.num_global_tokens:
            yield f"{name}_globals", figures.global_token_figure(canvas, blocks)
        rollout = rollouts[number - 1]
        if rollout is not None:
            yield f"{name}_rollout", figures.rollout_figure(canvas, rollout, queries)
        else:
            print_line(f"stage {number}: no rollout, because keys of {stage.config.attention} are not tokens")
        attentions = [*enumerate(block.attn for block in stage.blocks)][blocks_shown]
        bias = figures.bias_figure(canvas.title.partition(": ")[0], number - 1, attentions)
        if bias is not None:
            yield f"{name}_bias", bias


def _parser() -> ToolParser:
    parser = ToolParser(prog="visualize.py", description=__doc__)
    parser.add_checkpoint("?")
    add = parser.add_argument
    add("image", help="the image: JPEG, PNG, WebP, GIF, BMP, PPM, TIFF, JPEG 2000 or AVIF")
    add("--model", metavar="YAML", help="an untrained model instead of a checkpoint")
    add("--query", type=_pixel, action="append", metavar="ROW,COLUMN", help="repeatable (default: center)")
    add("--stages", type=bounded_int(1), nargs="+", metavar="N", help="numbers from 1 (default: all)")
    add("--blocks", choices=("last", "all"), default="last", help="default: last")
    add("--output", type=Path, required=True, metavar="FOLDER", help="folder of the figures")
    return parser


def _pixel(text: str) -> tuple[int, int]:
    row, comma, column = text.partition(",")
    if not comma or not row.strip().isdecimal() or not column.strip().isdecimal():
        raise ArgumentTypeError(f"expected ROW,COLUMN in pixels, e.g. 112,112, got {text!r}")
    return int(row), int(column)
