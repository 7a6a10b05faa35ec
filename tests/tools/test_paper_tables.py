"""tools/dev/paper_tables.py: the committed page, the claims, and how closely figures must agree."""

from __future__ import annotations

import dataclasses
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vil
from tools.dev import paper_tables
from tools.paper_results import read_paper_results
from vil.errors import UserError

ROOT = Path(__file__).parents[2]
PAPER = read_paper_results()

pytestmark = pytest.mark.xdist_group("paper_tables")  # they share the models that are built below


@pytest.fixture(scope="module")
def sizes():
    return paper_tables.table1_rows(PAPER)


@pytest.fixture(scope="module")
def rows():
    return [*paper_tables.table2_rows(PAPER), *paper_tables.published_rows(PAPER)]


@pytest.fixture
def run(sizes, rows, monkeypatch):
    """Return a function that runs the program without building the models again."""

    def run(argv, rows=rows):
        monkeypatch.setattr(paper_tables, "table1_rows", lambda paper: sizes)
        monkeypatch.setattr(paper_tables, "table2_rows", lambda paper: [r for r in rows if r.table == "2"])
        published = [row for row in rows if row.table == "released"]
        monkeypatch.setattr(paper_tables, "published_rows", lambda paper: published)
        paper_tables.main(argv)

    return run


def test_committed_page_is_the_output_of_the_command(run, tmp_path, capsys):
    run(["--markdown", str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text()
    assert page == (ROOT / "docs" / "reproduce.md").read_text(), (
        "run python -m tools.dev.paper_tables --markdown docs/reproduce.md"
    )
    for text in (capsys.readouterr().out, page):
        names = [line.split("|")[1].split("¹")[0].strip() for line in text.splitlines() if line[:1] == "|"]
        for printed in [*PAPER["table2"], *PAPER["released_models"]]:
            assert (printed.get("model") or printed["name"]) in names
        assert text.count("- holds: ") == 6


@pytest.mark.parametrize(
    ("model", "name", "options"),
    [
        ("S-ViL-1,2,8,1", "vil_small", {"mask": "exact"}),
        ("Ti-ViL-2,9,1", "vil_tiny_3stage", {"mask": "exact"}),
        ("S-Full-1,1,9,1", "vil_small", {"attention": "full", "blocks": (1, 1, 9, 1)}),
        ("Ti-E-ViT(full/16)", "evit_tiny_patch16", {}),
        ("ViL-Base-Wide", "vil_base_wide", {"image_size": 384}),
        ("Small partial linformer", "vil_small", {"attention": "linformer", "projected_tokens": 256}),
        ("Small partial performer", "vil_small", {"attention": "performer", "random_features": 256}),
    ],
)
def test_rows_are_the_models_that_create_model_builds(rows, model, name, options):
    row = next(row for row in rows if row.model == model)
    with torch.device("meta"):
        ours = vil.create_model(name, position="absolute", **options)
    assert row.params_m == sum(parameter.numel() for parameter in ours.parameters()) / 1e6
    assert row.gflops == ours.multiply_adds() / 1e9


def test_only_unpublished_architectures_are_assumed(rows):
    assumed = [row for row in rows if row.assumption]
    assert [row.printed["arch"] for row in assumed] == [None] * 4
    assert [row.model for row in rows if row.table == "released" and not row.printed["arch"]] == [
        row.model for row in assumed
    ]
    swin = assumed[-1].build.keywords["stages"]
    assert [(stage.dim, stage.heads, stage.blocks) for stage in swin] == [
        (96, 3, 2),
        (192, 6, 2),
        (384, 12, 18),
        (768, 24, 2),
    ]


def with_scaled_figure(rows, model, key, factor):
    """Return the rows with one printed figure multiplied."""
    index = next(i for i, row in enumerate(rows) if row.model == model)
    printed = {**rows[index].printed, key: rows[index].printed[key] * Decimal(factor)}
    return [*rows[:index], dataclasses.replace(rows[index], printed=printed), *rows[index + 1 :]]


@pytest.mark.parametrize(
    ("claim", "model", "key", "factor"),
    [
        (1, "Ti-DeiT/16", "params_m", "1.05"),
        (1, "S-ViL-1,10,1", "params_m", "1.001"),
        (2, "S-E-ViT(full/16)", "params_m", "1.01"),
        (3, "S-DeiT/16", "gflops", "1.02"),
        (3, "Ti-Full-2,9,1", "gflops", "0.99"),
        (4, "ViL-Base-Deep", "gflops", "1.02"),
        (4, "Small srformer/64", "gflops", "0.98"),
        (5, "Small performer", "gflops", "1.002"),
        (5, "ViL-Swin-Small (2-2-18-2)", "gflops", "0.998"),
        (5, "Small partial performer", "params_m", "0.99"),
    ],
)
def test_a_claim_fails_if_a_figure_differs(sizes, rows, claim, model, key, factor):
    changed = with_scaled_figure(rows, model, key, factor)
    assert not paper_tables.check_claims(sizes, changed)[claim].holds


def test_all_claims_hold_and_table_1_can_fail(sizes, rows):
    assert all(claim.holds for claim in paper_tables.check_claims(sizes, rows))
    stages = [{**sizes[0]["printed"][0], "dim": 49}, *sizes[0]["printed"][1:]]
    changed = [{**sizes[0], "printed": stages}, *sizes[1:]]
    assert [claim.holds for claim in paper_tables.check_claims(changed, rows)] == [False] + [True] * 5
    assert "1/4/1/49" in paper_tables.show_table1(changed)


def test_a_failing_claim_exits_with_status_1(run, rows, capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_:
        run(
            ["--markdown", str(tmp_path / "page.md")],
            with_scaled_figure(rows, "ViL-Base-Deep", "gflops", "1.1"),
        )
    assert exit_.value.code == 1
    assert "**FAILS**: Published models" in capsys.readouterr().out
    assert "**FAILS**: Published models" in (tmp_path / "page.md").read_text()


@given(st.floats(0.01, 1000), st.integers(0, 4))
def test_a_value_has_the_digits_of_the_figure_that_it_rounds_to(value, decimals):
    printed = Decimal(f"{value:.{decimals}f}")
    assert paper_tables.decimals(printed) == decimals
    assert paper_tables.has_same_digits(value, printed)
    assert not paper_tables.has_same_digits(value + 1.01 * 10.0**-decimals, printed)


def test_the_tolerance_is_at_least_the_printed_digits():
    assert paper_tables.is_within(5.68, Decimal("5.7"), absolute=0.01)
    assert not paper_tables.is_within(5.64, Decimal("5.7"), absolute=0.01)
    assert paper_tables.is_within(6.39, Decimal("6.38"), absolute=0.01)
    assert not paper_tables.is_within(6.391, Decimal("6.38"), absolute=0.01)
    assert paper_tables.is_within(28.4, 28, relative=0.01)


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--jsn", "x"], "unrecognized arguments: --jsn x"), (["extra"], "unrecognized arguments: extra")],
)
def test_a_bad_command_line_is_refused_before_any_work(argv, message, monkeypatch):
    monkeypatch.setattr(paper_tables, "read_paper_results", lambda: pytest.fail("work was started"))
    with pytest.raises(UserError, match=message):
        paper_tables.main(argv)


def test_a_page_that_cannot_be_written_is_one_line(run, tmp_path):
    with pytest.raises(UserError) as error:
        run(["--markdown", str(tmp_path)])
    assert str(error.value) == f"--markdown: {tmp_path} cannot be written: Is a directory"
