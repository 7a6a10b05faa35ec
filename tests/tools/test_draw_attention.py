"""The figures of docs/attention.md agree with the local attention, and the page shows all of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from tools.dev import draw_attention
from tools.dev.draw_attention import Cell, draw_map
from vil.attention.local import chunked, local_attention
from vil.attention.local.geometry import Inputs, LocalAttentionSpec
from vil.errors import UserError

ROOT = Path(__file__).parents[2]
SIZE, WINDOW = (13, 10), 4
CORNERS = [(0, 0), (0, 9), (12, 0), (12, 9)]
QUERIES = [*CORNERS, (0, 5), (6, 0), (12, 4), (7, 9), (6, 5)]
VISIBLE_CELLS = [Cell.VISIBLE, Cell.SAME_CHUNK, Cell.QUERY, Cell.VISIBLE_PADDING]


def drawn_cells(spec, query, neighbor=None):
    """Return (P, Q), the cells that the figure shows."""
    axes = Figure().subplots()
    draw_map(axes, spec, query, neighbor)
    return torch.as_tensor(axes.collections[0].get_array().data)


def attention_weights(query, **options):
    """Return (H, W), the weight of each token in the output for a query, by the attention of the models."""
    tokens = SIZE[0] * SIZE[1]
    value = torch.zeros(1, 1, tokens, 2, requires_grad=True)
    empty = torch.zeros(1, 1, 0, 2)
    key = torch.randn(1, 1, tokens, 2, generator=torch.Generator().manual_seed(0))
    output = local_attention(key, key, value, empty, empty, size=SIZE, window=WINDOW, **options)
    output[0, 0, query[0] * SIZE[1] + query[1], 0].backward()
    return value.grad[0, 0, :, 0].view(SIZE)


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("mask", ["chunk", "exact", "cyclic"])
def test_maps_show_the_keys_with_attention_weights(mask, query):
    cells = drawn_cells(LocalAttentionSpec(SIZE, WINDOW, mask), query)
    assert cells.shape == (16, 12)  # whole chunks
    visible = torch.isin(cells, torch.tensor(VISIBLE_CELLS))
    assert torch.equal(visible[:13, :10], attention_weights(query, mask=mask, backend="dense") > 0)
    assert torch.equal(visible[:13, :10], attention_weights(query, mask=mask, backend="chunked") > 0)
    assert (cells == Cell.QUERY).nonzero().tolist() == [list(query)]
    padding = torch.isin(cells, torch.tensor([Cell.PADDING, Cell.VISIBLE_PADDING]))
    assert not padding[:13, :10].any()
    assert padding[13:].all()
    assert padding[:, 10:].all()
    assert bool((cells == Cell.VISIBLE_PADDING).any()) == (mask == "cyclic" and min(query) < WINDOW)


@pytest.mark.parametrize("query", [*CORNERS, (6, 5)])
@pytest.mark.parametrize("neighbor", range(8))
def test_maps_show_the_neighbor(neighbor, query):
    cells = drawn_cells(LocalAttentionSpec(SIZE, WINDOW, "chunk", "one"), query, neighbor)
    visible = torch.isin(cells, torch.tensor(VISIBLE_CELLS))
    assert torch.equal(visible[:13, :10], attention_weights(query, neighbors=neighbor) > 0)


def test_the_figure_of_masks_has_the_papers_counts():
    """A map of 5 × 5 chunks, w = 3: at a border a third is missing, in a corner five ninths."""
    labels = [axes.get_xlabel() for axes in draw_attention.FIGURES["masks"]().axes]
    counts = [[81, 54, 36], [49, 7 * 5, 16], [81, 81, 81]]
    assert labels == [f"{count} keys" for row in counts for count in row]


def stage_strips(batch_size):
    """Return the strips of stage 1 of ViL-Small: 56 × 56 tokens, 3 heads × 32, w = 7, G = 1."""
    tokens = torch.empty(batch_size, 3, 56**2, 32, device="meta")
    global_tokens = torch.empty(batch_size, 3, 1, 32, device="meta")
    inputs = Inputs(tokens, tokens, tokens, global_tokens, global_tokens)
    return chunked._ChunkedAttention(inputs, LocalAttentionSpec((56, 56), 7), None).strips


def test_the_page_names_the_strips():
    page = (ROOT / "docs" / "attention.md").read_text()
    assert "one image 1, 6 and 1 columns, for eight 1, 2, 2, 2 and 1." in page.replace("\n", " ")
    assert [strip.count for strip in stage_strips(1)] == [1, 6, 1]
    assert [strip.count for strip in stage_strips(8)] == [1, 2, 2, 2, 1]


def test_the_program_writes_all_figures(tmp_path, capsys):
    folder = tmp_path / "new" / "figures"
    draw_attention.main(["--folder", str(folder)])
    assert capsys.readouterr().out.split() == [f"{folder}/{name}.png" for name in draw_attention.FIGURES]
    for path in (folder / f"{name}.png" for name in draw_attention.FIGURES):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < 150_000


def test_the_page_shows_all_figures():
    shown = re.findall(r"!\[[^\]]+\]\(figures/(\w+)\.png\)", (ROOT / "docs" / "attention.md").read_text())
    assert sorted(shown) == sorted([*draw_attention.FIGURES, "kernel", "strips"])
    for name in shown:
        assert (ROOT / "docs" / "figures" / f"{name}.png").stat().st_size < 150_000


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(draw_attention, "FIGURES", {"masks": Figure})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^--folder: .*file/masks.png cannot be written: File exists$"):
        draw_attention.main(["--folder", str(tmp_path / "file")])
