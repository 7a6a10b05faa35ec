"""The paper's tables beside ours: the committed page, the claims, and what the tool does with bad input."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vil
from tools import paper_tables
from vil.config import ConfigError, StageConfig

ROOT = Path(__file__).parents[2]
PAPER = paper_tables.read_paper()
SMALL = paper_tables.Architecture(
    [
        StageConfig(dim=16, heads=2, patch=4, window=2, position="absolute"),
        StageConfig(dim=32, heads=2, attention="full", position="absolute"),
    ],
    image_size=16,
)

pytestmark = pytest.mark.xdist_group("paper_tables")  # they share what is built below


@pytest.fixture(scope="module")
def sizes():
    return paper_tables.table1(PAPER)


@pytest.fixture(scope="module")
def rows():
    return [*paper_tables.table2(PAPER), *paper_tables.released(PAPER)]


@pytest.fixture(scope="module")
def written(sizes, rows, tmp_path_factory):
    """Output, page and rows of the one stated command; the models are those built above."""
    folder = tmp_path_factory.mktemp("paper_tables")
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(paper_tables, "table1", lambda paper: sizes)
        patch.setattr(paper_tables, "table2", lambda paper: [row for row in rows if row.table == "2"])
        patch.setattr(
            paper_tables, "released", lambda paper: [row for row in rows if row.table == "released"]
        )
        paper_tables.run(["--markdown", str(folder / "page.md"), "--json", str(folder / "tables.json")])
    return out.getvalue(), (folder / "page.md").read_text(), json.loads((folder / "tables.json").read_text())


def small_row(**changes):
    paper = {
        "params_m": Decimal("0.01"),
        "gflops": Decimal("0.10"),
        "top1": None,
        "memory_mb": Decimal("1.5"),
    }
    row = paper_tables.Row(
        "2", "small", paper, "vision_longformer", "absolute", 16, SMALL, 0.01, 0.1, None, None
    )
    return dataclasses.replace(row, **changes)


def test_the_committed_page_is_what_the_command_writes(written):
    assert written[1] == (ROOT / "docs" / "reproduce.md").read_text(), (
        "run python tools/paper_tables.py --markdown docs/reproduce.md"
    )


def test_page_and_terminal_show_every_row_and_every_claim(written):
    out, page, _ = written
    for text in (out, page):
        lines = [line.split("|")[1].split("¹")[0].strip() for line in text.splitlines() if line[:1] == "|"]
        for row in [*PAPER["table2"], *PAPER["released_models"]]:
            assert (row.get("model") or row["name"]) in lines
        assert text.count("- holds: ") == 6
    assert "FAILS" not in page
    assert "unmeasured" in page


def test_json_has_the_printed_figures_and_ours(written):
    *_, content = written
    by_table = {key: [r for r in content if r["table"] == key] for key in ("1", "2", "released", "claims")}
    assert [r["paper"] for r in by_table["1"]] == list(PAPER["table1"].values())
    for table, key in (("2", "table2"), ("released", "released_models")):
        assert len(by_table[table]) == len(PAPER[key])
        for row, printed in zip(by_table[table], PAPER[key]):
            assert row["paper"]["gflops"] == float(printed["gflops"])
            assert row["paper"]["params_m"] == float(printed["params_m"])
            assert row["deviation"]["params_m"] == row["ours"]["params_m"] - float(printed["params_m"])
    assert by_table["claims"]
    assert all(claim["holds"] for claim in by_table["claims"])


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
def test_rows_are_the_models_that_a_user_creates(rows, model, name, options):
    row = next(row for row in rows if row.model == model)
    with torch.device("meta"):
        ours = vil.create_model(name, position="absolute", **options)
    assert row.params_m == sum(parameter.numel() for parameter in ours.parameters()) / 1e6
    assert row.gflops == ours.multiply_adds() / 1e9


def test_spelled_out_architectures_are_used_and_the_others_assumed(rows):
    assumed = [row for row in rows if row.assumed]
    assert [row.paper["arch"] for row in assumed] == [None] * 4
    assert [row.model for row in rows if row.table == "released" and not row.paper["arch"]] == [
        row.model for row in assumed
    ]
    swin = assumed[-1].build()
    assert [(s.config.dim, s.config.heads, len(s.blocks)) for s in swin.stages] == [
        (96, 3, 2), (192, 6, 2), (384, 12, 18), (768, 24, 2),
    ]  # fmt: skip


def altered(rows, model, key, factor):
    """The rows with one printed figure multiplied."""
    index = next(i for i, row in enumerate(rows) if row.model == model)
    paper = {**rows[index].paper, key: rows[index].paper[key] * Decimal(factor)}
    return [*rows[:index], dataclasses.replace(rows[index], paper=paper), *rows[index + 1 :]]


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
def test_each_claim_fails_where_a_figure_differs(sizes, rows, claim, model, key, factor):
    assert not paper_tables.claims(sizes, altered(rows, model, key, factor))[claim].holds


def test_all_claims_hold_and_table_1_can_fail(sizes, rows):
    assert all(claim.holds for claim in paper_tables.claims(sizes, rows))
    stages = [{**sizes[0]["paper"][0], "dim": 49}, *sizes[0]["paper"][1:]]
    changed = [{**sizes[0], "paper": stages}, *sizes[1:]]
    assert [claim.holds for claim in paper_tables.claims(changed, rows)] == [False] + [True] * 5
    assert "1/4/1/49" in paper_tables.show_table1(changed)


def test_a_failing_claim_ends_with_status_1(sizes, rows, monkeypatch, capsys, tmp_path):
    wrong = altered(rows, "ViL-Base-Deep", "gflops", "1.1")
    monkeypatch.setattr(paper_tables, "table1", lambda paper: sizes)
    monkeypatch.setattr(paper_tables, "table2", lambda paper: iter(wrong[:20]))
    monkeypatch.setattr(paper_tables, "released", lambda paper: iter(wrong[20:]))
    with pytest.raises(SystemExit) as end:
        paper_tables.run(["--markdown", str(tmp_path / "page.md")])
    assert end.value.code == 1
    assert "**FAILS**: Published models" in capsys.readouterr().out
    assert "**FAILS**: Published models" in (tmp_path / "page.md").read_text()


@given(st.floats(0.01, 1000), st.integers(0, 4))
def test_what_rounds_to_a_figure_has_its_digits(value, places):
    printed = Decimal(f"{value:.{places}f}")
    assert paper_tables.decimals(printed) == places
    assert paper_tables.same_digits(value, printed)
    assert not paper_tables.same_digits(value + 1.01 * 10.0**-places, printed)


def test_closeness_follows_the_printed_digits():
    assert paper_tables.within(5.68, Decimal("5.7"), absolute=0.01)
    assert not paper_tables.within(5.64, Decimal("5.7"), absolute=0.01)
    assert paper_tables.within(6.39, Decimal("6.38"), absolute=0.01)
    assert not paper_tables.within(6.391, Decimal("6.38"), absolute=0.01)
    assert paper_tables.within(28.4, 28, relative=0.01)
    assert paper_tables.percent(1.01, Decimal("1.00")) == pytest.approx(1.0)


def test_memory_is_counted_on_a_cpu_and_shown():
    row = small_row()
    paper_tables.measure(row, torch.device("cpu"), batch_size=2)
    assert row.images_per_second is None
    # Two stages of (1 + 16) and (1 + 4) tokens keep at least their MLPs' hidden values, in 16 bits.
    assert row.memory_mb > 2 * (17 * 64 + 5 * 128) / 1e6
    assert row.memory_mb < 1
    shown = paper_tables.show_rows([row], "MB, counted")
    assert "MB, counted" in shown
    assert f"{row.memory_mb:.1f}" in shown
    assert "MB, counted" not in paper_tables.show_rows([row])


def test_memory_is_asked_for_where_the_paper_prints_it(sizes, rows, monkeypatch, capsys):
    asked = []

    def measure(row, device, batch_size):
        asked.append((row.table, device.type, batch_size))
        row.memory_mb = 1.0

    monkeypatch.setattr(paper_tables, "measure", measure)
    monkeypatch.setattr(paper_tables, "table1", lambda paper: sizes)
    copies = [dataclasses.replace(row) for row in rows]
    monkeypatch.setattr(paper_tables, "table2", lambda paper: iter(copies[:20]))
    monkeypatch.setattr(paper_tables, "released", lambda paper: iter(copies[20:]))
    paper_tables.run([])
    assert not asked
    assert "MB, counted" not in capsys.readouterr().out
    paper_tables.run(["--memory", "--batch_size", "7"])
    assert asked == [("2", "cpu", 7)] * 20
    assert "MB, counted" in capsys.readouterr().out


def test_the_page_says_what_measured(sizes, rows):
    found = paper_tables.claims(sizes, rows)
    timed = [dataclasses.replace(row, memory_mb=12.34, images_per_second=567.8) for row in rows]
    page = paper_tables.page(sizes, timed, found, "MB, measured", "peak on one Example GPU")
    assert "peak on one Example GPU" in page
    assert "unmeasured" not in page
    assert page.count("|         12.3 |") == page.count("|      568 |") == len(rows)


def test_speed_of_training_steps():
    model = SMALL()
    before = model.head.weight.detach().clone()
    speed = paper_tables.training_images_per_second(model, 16, torch.device("cpu"), "bfloat16", 2)
    assert speed > 0
    assert not torch.equal(before, model.head.weight)


def test_speed_halves_a_batch_that_does_not_fit(monkeypatch):
    seen = []

    class Hungry(torch.nn.Linear):
        def forward(self, images):
            seen.append(len(images))
            if len(images) > 3:
                raise torch.OutOfMemoryError("too many")
            return super().forward(images.flatten(1))

    model = Hungry(3 * 16 * 16, 2)
    assert paper_tables.training_images_per_second(model, 16, torch.device("cpu"), "float32", 10) > 0
    assert sorted(set(seen)) == [2, 5, 10]
    model.forward = lambda images: (_ for _ in ()).throw(torch.OutOfMemoryError("always"))
    assert paper_tables.training_images_per_second(model, 16, torch.device("cpu"), "float32", 2) is None


def test_a_model_that_does_not_fit_has_no_speed_beside_those_that_do(rows):
    timed = [dataclasses.replace(row, memory_mb=12.34, images_per_second=567.8) for row in rows[:2]]
    shown = paper_tables.show_rows([dataclasses.replace(timed[0], images_per_second=None), timed[1]], "MB")
    heading, _, first, second = ([cell.strip() for cell in line.split("|")] for line in shown.splitlines())
    column = heading.index("images/s")
    assert (first[column], second[column]) == ("–", "568")
    assert len(first) == len(second) == len(heading)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_and_speed_on_a_gpu():
    row = small_row()
    paper_tables.measure(row, torch.device("cuda"), batch_size=64)
    assert row.memory_mb > 2 * (17 * 64 + 5 * 128) / 1e6
    assert row.images_per_second > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch_size", "0"], "batch_size: expected at least 1, got 0"),
        (["--device", "tpu"], "device: expected auto, cpu or cuda, got 'tpu'"),
        (["--markdown", "{folder}"], "markdown: {folder} cannot be written: Is a directory"),
        (["--json", "{folder}"], "json: {folder} cannot be written: Is a directory"),
        (["--jsn", "x"], "--jsn: unknown option; did you mean --json?"),
        (["--memory", "often"], "memory: expected true or false, got 'often'"),
        (["extra"], "extra"),
    ],
)
def test_bad_input_is_refused_before_any_work(words, message, tmp_path, monkeypatch):
    monkeypatch.setattr(paper_tables, "read_paper", lambda: pytest.fail("work was begun"))
    with pytest.raises(ConfigError) as error:
        paper_tables.run([word.format(folder=tmp_path) for word in words])
    assert message.format(folder=tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        paper_tables.run(["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert all(f"--{field.name}" in out for field in dataclasses.fields(paper_tables.PaperTables))
