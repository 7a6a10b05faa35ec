"""tools/visualize.py: drawn windows equal the masks, files are complete, errors have one line."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from matplotlib.image import AxesImage
from PIL import Image

from tools.visualization import figures
from tools.visualization import main as program
from vil.checkpoints.safetensors_file import write_safetensors
from vil.checkpoints.weights import Weights
from vil.config import ModelConfig, StageConfig
from vil.errors import UserError
from vil.models.multiscale_vit import MultiScaleViT
from vil.models.zoo import model_from_config

STAGES = [
    StageConfig(dim=6, heads=3, patch=4, window=3, global_tokens=2, blocks=2),
    StageConfig(dim=8, heads=2, attention="spatial_reduction", reduction=2),
    StageConfig(dim=8, heads=2, attention="linformer", projected_tokens=4),
    StageConfig(dim=8, heads=2, attention="full", patch=1, global_tokens=0),
]  # fmt: skip
SIDE = 40  # maps of 10, 5, 2 and 2
CORNERS = [(0, 0), (0, 9), (9, 0), (9, 9), (0, 4), (5, 0), (9, 4), (4, 9), (4, 4)]


def local_model(mask):
    torch.manual_seed(0)
    config = ModelConfig(name="vil", stages=STAGES[:1], image_size=SIDE, num_classes=2, mask=mask)
    return MultiScaleViT(config).eval()


def write_checkpoint(path, **options):
    torch.manual_seed(0)
    config = ModelConfig(name="vil", image_size=SIDE, num_classes=3, stages=STAGES, **options)
    weights = model_from_config(config).state_dict()
    transform = {"crop_pct": 1.0, "mean": [0.5] * 3, "std": [0.25] * 3}
    write_safetensors(
        path, Weights("x", "run", "ema", weights, config, transform=transform, class_names=("a", "b", "c"))
    )
    return str(path)


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def inside(segments, size, side):
    """The positions that an outline, in pixels, goes around: to their left is an odd number of its edges."""
    crossed = np.zeros((size[0], size[1] + 1), dtype=int)
    for (x0, y0), (x1, y1) in segments:
        if x0 == x1:
            assert abs(y1 - y0) == side
            crossed[round(min(y0, y1) / side), round(x0 / side)] += 1
    return torch.from_numpy(np.cumsum(crossed, axis=1)[:, :-1] % 2 == 1)


def seen_by(query, mask, w=3, length=10):
    """The window of a query on a square map, by counting chunks and positions."""
    near = []
    for position in query:
        apart = [key // w - position // w for key in range(length)]
        chunks = -(-length // w)
        if mask == "cyclic":
            near.append([a % chunks in (0, 1, chunks - 1) for a in apart])
        else:
            near.append(
                [abs(a) <= 1 and (mask == "chunk" or abs(k - position) <= w) for k, a in enumerate(apart)]
            )
    return torch.tensor(near[0])[:, None] & torch.tensor(near[1])


@pytest.mark.parametrize("mask", ["chunk", "exact", "cyclic"])
def test_drawn_window_equals_the_mask(mask):
    """At every border and corner: what is outlined, and what is colored."""
    model = local_model(mask)
    maps = model.attention_maps(torch.randn(1, 3, SIDE, SIDE), [(4 * r, 4 * c) for r, c in CORNERS])[0]
    canvas = figures.Canvas(np.zeros((SIDE, SIDE, 3)), "model")
    for number, query in enumerate(CORNERS):
        figure = figures.query_figure(canvas, maps[-1:], number, (0, 0))
        panels = [axes for axes in figure.axes if "head" in axes.get_title()]
        assert len(panels) == 4  # three heads and their mean
        expected = seen_by(query, mask)
        for axes in panels:
            (lines,) = (c for c in axes.collections if isinstance(c, LineCollection))
            assert torch.equal(inside(lines.get_segments(), (10, 10), 4), expected)
            heat = [child for child in axes.get_children() if isinstance(child, AxesImage)][-1]
            assert torch.equal(torch.from_numpy(~np.ma.getmaskarray(heat.get_array())), expected)
            assert list(heat.get_extent()) == [0, SIDE, SIDE, 0]
        # The written totals of map, global tokens and padding sum up to 100 %.
        written = [float(part) for line in panels[0].get_xlabel().split("\n") for part in shares(line)]
        assert sum(written) == pytest.approx(100, abs=0.2)


def shares(line):
    """Percentages of a line, without the largest single one and those in brackets."""
    for part in re.sub(r"\(.*\)", "", line).split(","):
        name, number, _ = part.rsplit(maxsplit=2)
        if name.strip() != "max":
            yield number


def test_outline_of_two_regions():
    seen = torch.zeros(4, 5, dtype=torch.bool)
    seen[0, 0] = seen[2:, 3:] = True  # two parts, as where chunks wrap
    edges = figures.outline(seen)
    assert len(edges) == 4 + 8
    assert torch.equal(inside(edges, (4, 5), 1), seen)
    assert figures.outline(torch.zeros(2, 2, dtype=torch.bool)) == []


def test_bias_by_offset():
    """A bias that is large where the key is one row below and two columns right of the query."""
    for mask, reach in (("chunk", 5), ("exact", 3)):
        attention = local_model(mask).stages[0].blocks[0].attn
        with torch.no_grad():
            attention.bias_table.zero_()
            attention.bias_table[:, 5 - 1, 5 - 2] = 9.0  # query − key, 2w − 1 in the middle
        table = figures.bias_by_offset(attention)
        assert table.shape == (3, 2 * reach + 1, 2 * reach + 1)
        assert table[0].nonzero().tolist() == [[reach + 1, reach + 2]]
        # And it is this key that the weights favour.
        x, query = torch.randn(1, 2 + 100, 6), torch.tensor([2 + 44])
        with torch.no_grad():
            assert attention.attention_weights(x, (10, 10), query).to_map[0, 0, 0].argmax() == 56


def test_ticks_of_bias_tables_are_offsets():
    """Offsets of a map of 2 × 2 are −1, 0 and 1; the stage has no global tokens."""
    stage = StageConfig(dim=8, heads=1, patch=4, attention="full", blocks=1, global_tokens=0)
    model = MultiScaleViT(ModelConfig(name="vil", image_size=8, num_classes=2, stages=[stage]))
    figure = figures.bias_figure("title", 0, [(0, model.stages[0].blocks[0].attn)])
    axes = figure.axes[0]
    for axis in (axes.xaxis, axes.yaxis):
        assert [tick for tick in axis.get_ticklocs() if abs(tick) <= 1.5] == [-1, 0, 1]
    assert figure.get_supxlabel() == "key column − query column"


def test_figures_of_a_checkpoint(tmp_path, photo, capsys):
    checkpoint = write_checkpoint(tmp_path / "x.safetensors")
    argv = [checkpoint, "--query", "39,20", "--blocks", "all", photo]
    program.main([*argv, "--output", str(tmp_path / "new" / "sheets")])
    lines = capsys.readouterr().out.splitlines()
    names = {path.name for path in (tmp_path / "new" / "sheets").iterdir()}
    assert names == {
        *(f"stage{n}_query_39_20.png" for n in (1, 2, 4)),
        *("stage1_globals.png", "stage1_rollout.png", "stage1_bias.png", "stage2_globals.png"),
        *("stage4_rollout.png", "stage4_bias.png"),
    }
    assert {Path(line).name for line in lines if line.endswith(".png")} == names
    assert [line for line in lines if not line.endswith(".png")] == [
        "stage 2: no rollout, because keys of spatial_reduction are not tokens",
        "stage 3: keys of linformer have no position on the map",
    ]
    for name in names:
        with Image.open(tmp_path / "new" / "sheets" / name) as image:
            image.load()
            assert (image.format, min(image.size) > 200) == ("PNG", True)


def test_untrained_model_and_selected_stage(tmp_path, photo, capsys):
    config = tmp_path / "model.yaml"
    stages = (
        "[{dim: 6, heads: 3, patch: 4, window: 3}, {dim: 8, heads: 2, attention: full, global_tokens: 0}]"
    )
    config.write_text(f"name: vil\nimage_size: 32\nin_chans: 1\nstages: {stages}\n")
    folder = tmp_path / "sheets"
    folder.mkdir()
    (folder / "stage2_bias.png").write_text("an old one")
    argv = ["--model", str(config), photo, "--stages", "2", "--query", "3,31", "--query", "0,0"]
    program.main([*argv, "--output", str(folder)])
    assert sorted(path.name for path in folder.iterdir()) == [
        "stage2_bias.png", "stage2_query_0_0.png", "stage2_query_3_31.png", "stage2_rollout.png",
    ]  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())
    assert "stage2_query_0_0.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{photo}"], "command line: the following arguments are required: --output"),
        (["{x}", "{photo}", "--output", "{new}", "--query", "40,0"],
         "--query: 40,0 is outside the model input of 40×40 pixels"),
        (["{x}", "{photo}", "--output", "{new}", "--query", "4"], "expected ROW,COLUMN in pixels"),
        (["{x}", "{photo}", "--output", "{new}", "--query=-1,2"], "expected ROW,COLUMN in pixels"),
        (["{x}", "{photo}", "--output", "{new}", "--stages", "5"], "--stages: expected numbers from 1 to 4"),
        (["{x}", "{x}", "--output", "{new}"], "{x}: cannot be read: no image of "),
        (["{x}", "nothing.png", "--output", "{new}"], "nothing.png: cannot be read: No such file"),
        (["nothing", "{photo}", "--output", "{new}"], "nothing: no such file or folder"),
        (["{x}", "{photo}", "--output", "{photo}"],
         "--output: {photo}/stage1_query_20_20.png cannot be written"),
        (["--model", "{timm}", "{photo}", "--output", "{new}", "--weights", "ema"],
         "command line: --model: is untrained; --released-config, --weights and --run-checkpoint are for"),
        (["--model", "{timm}", "{photo}", "--output", "{new}", "--released-config", "none.yaml"],
         "command line: --model: is untrained; "),
        (["--model", "{timm}", "{photo}", "--output", "{new}"],
         "{timm}: only models of this project can be visualized, not timm/resnet10t"),
    ],
)  # fmt: skip
def test_invalid_arguments(tmp_path, photo, argv, message):
    names = {"x": write_checkpoint(tmp_path / "x.safetensors"), "photo": photo, "new": tmp_path / "new",
             "timm": tmp_path / "timm.yaml"}  # fmt: skip
    names["timm"].write_text("name: timm/resnet10t\nimage_size: 64\n")
    with pytest.raises(UserError) as error:
        program.main([argument.format(**names) for argument in argv])
    assert message.format(**names) in str(error.value)
    assert not (tmp_path / "new").exists()
