"""The figures of docs/attention.md show what the code does, and the page shows all of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from tools import draw_attention
from tools.draw_attention import Cell, draw_map, key_blocks, query_blocks, strips
from vil.attention.local import local_attention
from vil.attention.local.geometry import AROUND, Window
from vil.config import ConfigError

ROOT = Path(__file__).parents[2]
SIZE, SIDE = (13, 10), 4
CORNERS = [(0, 0), (0, 9), (12, 0), (12, 9)]
QUERIES = [*CORNERS, (0, 5), (6, 0), (12, 4), (7, 9), (6, 5)]
DRAWN_AS_SEEN = [Cell.SEEN, Cell.OWN, Cell.QUERY, Cell.SEEN_PADDING]


def drawn(window, query, neighbor=None):
    """(P, Q): the cells that the figure shows."""
    axes = Figure().subplots()
    draw_map(axes, window, query, neighbor)
    return torch.as_tensor(axes.collections[0].get_array().data)


def weights_of(query, **options):
    """(H, W): the weight of every token in one query's output, by the attention that models use."""
    tokens = SIZE[0] * SIZE[1]
    value = torch.zeros(1, 1, tokens, 2, requires_grad=True)
    nothing = torch.zeros(1, 1, 0, 2)
    key = torch.randn(1, 1, tokens, 2, generator=torch.Generator().manual_seed(0))
    output = local_attention(key, key, value, nothing, nothing, size=SIZE, window=SIDE, **options)
    output[0, 0, query[0] * SIZE[1] + query[1], 0].backward()
    return value.grad[0, 0, :, 0].view(SIZE)


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("mask", ["chunk", "exact", "cyclic"])
def test_maps_show_what_is_attended_to(mask, query):
    cells = drawn(Window(SIZE, SIDE, mask), query)
    assert cells.shape == (16, 12)  # whole chunks
    seen = torch.isin(cells, torch.tensor(DRAWN_AS_SEEN))
    assert torch.equal(seen[:13, :10], weights_of(query, mask=mask, backend="dense") > 0)
    assert torch.equal(seen[:13, :10], weights_of(query, mask=mask, backend="chunked") > 0)
    assert (cells == Cell.QUERY).nonzero().tolist() == [list(query)]
    padding = torch.isin(cells, torch.tensor([Cell.PADDING, Cell.SEEN_PADDING]))
    assert not padding[:13, :10].any()
    assert padding[13:].all()
    assert padding[:, 10:].all()
    assert bool((cells == Cell.SEEN_PADDING).any()) == (mask == "cyclic" and min(query) < SIDE)


@pytest.mark.parametrize("query", [*CORNERS, (6, 5)])
@pytest.mark.parametrize("neighbor", range(8))
def test_maps_show_the_neighbor(neighbor, query):
    cells = drawn(Window(SIZE, SIDE, "chunk", "one"), query, neighbor)
    seen = torch.isin(cells, torch.tensor(DRAWN_AS_SEEN))
    assert torch.equal(seen[:13, :10], weights_of(query, neighbors=neighbor) > 0)


def test_figures_of_masks_have_the_papers_counts():
    """A map of 5 × 5 chunks, w = 3: at a border a third is missing, in a corner five ninths."""
    labels = [axes.get_xlabel() for axes in draw_attention.draw_masks().axes]
    counts = [[81, 54, 36], [49, 7 * 5, 16], [81, 81, 81]]
    assert labels == [f"{count} keys" for row in counts for count in row]


def test_strips_are_those_of_the_page():
    page = (ROOT / "docs" / "attention.md").read_text()
    assert "one image 1, 6 and 1 columns, for eight 1, 2, 2, 2 and 1." in page.replace("\n", " ")
    assert [strip.count for strip in strips(1)] == [1, 6, 1]
    assert [strip.count for strip in strips(8)] == [1, 2, 2, 2, 1]


def test_kernels_go_through_what_is_seen():
    """Every place once, in blocks in their order; the neighbour after the own chunk."""
    pytest.importorskip("triton")
    numbers, on_map = key_blocks(Window((56, 56), 7), (0, 7))
    assert (numbers.flatten().diff() >= 0).all()
    assert numbers.min() == 0
    expected = torch.zeros(21, 21, dtype=torch.bool)
    expected[7:, :14] = True  # the upper right corner has nothing above and nothing to its right
    assert torch.equal(on_map, expected)
    for neighbor, (row, column) in enumerate(AROUND):
        numbers, _ = key_blocks(Window((56, 56), 7, "chunk", "one"), (4, 4), neighbor)
        own, other = numbers[7:14, 7:14], numbers[7 * row + 7 :, 7 * column + 7 :][:7, :7]
        assert (own >= 0).all()
        assert (other >= own.max()).all()
        assert int((numbers >= 0).sum()) == 2 * 49
    assert query_blocks(15).unique().tolist() == [0, 1, 2, 3]
    assert query_blocks(7).unique().tolist() == [0]


def test_program_writes_all_figures(tmp_path, capsys):
    pytest.importorskip("triton")
    folder = tmp_path / "new" / "figures"
    draw_attention.draw(["--folder", str(folder)])
    assert capsys.readouterr().out.split() == [f"{folder}/{name}.png" for name in draw_attention.FIGURES]
    for path in (folder / f"{name}.png" for name in draw_attention.FIGURES):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < 150_000


def test_page_shows_every_figure():
    shown = re.findall(r"!\[[^\]]+\]\(figures/(\w+)\.png\)", (ROOT / "docs" / "attention.md").read_text())
    assert sorted(shown) == sorted(draw_attention.FIGURES)
    for name in draw_attention.FIGURES:
        assert (ROOT / "docs" / "figures" / f"{name}.png").stat().st_size < 150_000


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--folder: cannot write there: .*file"):
        draw_attention.draw(["--folder", str(tmp_path / "file")])
