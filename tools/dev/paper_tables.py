"""Compare the models with the paper: Tables 1 and 2 and the published models of the ICCV 2021 paper.

    python -m tools.dev.paper_tables                                    print the tables; a few seconds
    python -m tools.dev.paper_tables --markdown docs/reproduce.md       also write the page

The paper's results are in tools/paper_results.json; ours are counted on models that are built here. Exit
status 1 if one of the claims at the top of the page does not hold.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path
from string import Template
from typing import Any, Literal, cast

import timm
import torch
from torch import nn

import vil
from tools.markdown_table import markdown_table
from tools.paper_results import read_paper_results
from vil import command_line
from vil.checkpoints.published_config import ATTENTION_NAMES, parse_arch
from vil.command_line import ToolParser
from vil.config import ModelConfig, StageConfig
from vil.evaluation.complexity import measure_complexity
from vil.models import MultiScaleViT
from vil.models.zoo import config_from_options, resolve_stages
from vil.runtime.console import print_text
from vil.runtime.files import write_output

PAGE_TEMPLATE = Path(__file__).with_suffix(".md")
WINDOW = 7
ZOO_NAMES = {
    "Tiny": "vil_tiny",
    "Small": "vil_small",
    "Medium-D": "vil_medium_deep",
    "Medium-W": "vil_medium_wide",
    "Base-D": "vil_base_deep",
    "Base-W": "vil_base_wide",
    "Tiny-3stage": "vil_tiny_3stage",
    "Small-3stage": "vil_small_3stage",
}
DEIT_PARAMS_MODEL = "S-E-ViT(full/16)"
"""The row of Table 2 that prints the parameters of DeiT-S; a claim explains the difference."""
REPRODUCED = ("full", "vision_longformer", "linformer", "spatial_reduction")
"""Attentions of the published models whose printed FLOPs the formula reproduces."""
NOT_COUNTED = (".patch_embed.norm.", ".bias_table", ".global_bias.")
"""Parts of the names of parameters that the paper's count leaves out."""


@dataclass
class Row:
    """A model of a table.

    Attributes:
        printed: the row of tools/paper_results.json.
        attention: the attention of the sparse stages, by our name.
        paper_params_m, paper_gflops: the same by the paper's count (`count_like_paper`); None if unknown.
        assumption: what is assumed about an architecture that was not published; else empty.
    """

    table: Literal["2", "released"]
    model: str
    printed: Mapping[str, Any]
    attention: str
    build: partial[nn.Module]
    params_m: float
    gflops: float
    paper_params_m: float | None = None
    paper_gflops: float | None = None
    assumption: str = ""


@dataclass(frozen=True)
class Claim:
    """A statement about the tables and whether it holds."""

    text: str
    holds: bool


# --- Models -------------------------------------------------------------------------------------------------


def table1_rows(paper: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return blocks, patch, heads and width of each stage in the paper and in our model, for each size."""
    rows = []
    for size, printed in paper["table1"].items():
        keys = ("blocks", "patch", "heads", "dim")
        stages = resolve_stages(ModelConfig(ZOO_NAMES[size]))
        ours = [{key: getattr(stage, key) for key in keys} for stage in stages]
        rows.append({"size": size, "model": ZOO_NAMES[size], "printed": printed, "ours": ours})
    return rows


def table2_rows(paper: Mapping[str, Any]) -> Iterator[Row]:
    """Yield Table 2: absolute position, average pooling, 224² pixels, the exact window with w = 7."""
    for printed in paper["table2"]:
        size, blocks = printed["size"], printed["blocks"]
        attention: Literal["full", "vision_longformer"]
        attention = "full" if printed["attention"] == "full" else "vision_longformer"
        build: partial[nn.Module]
        if "DeiT" in printed["model"]:
            build = partial(timm.create_model, f"deit_{size}_patch16_224")
        elif printed["kind"] == "flat":
            options = {"name": f"evit_{size}_patch16", "position": "absolute", "blocks": blocks}
            stages = resolve_stages(config_from_options(options))
            build = partial(vil.create_model, "vil", stages=stages)
        else:
            name = f"vil_{size}_3stage" if len(blocks) == 3 else f"vil_{size}"
            options = {"attention": attention, "blocks": blocks, "position": "absolute", "window": WINDOW}
            stages = resolve_stages(config_from_options({"name": name, **options}))
            build = partial(vil.create_model, "vil", stages=stages, mask="exact")
        yield _row("2", printed, attention, build, 224)


def published_rows(paper: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the published models: the chunk mask with w = 7 in every stage."""
    for printed in paper["released_models"]:
        name, _, remark = printed["attention"].partition(",")
        attention = "global_only" if "only global" in remark else ATTENTION_NAMES[name]
        if printed["arch"] is not None:
            stages, assumption = parse_arch(printed["arch"], attention), ""
        else:
            stages, assumption = _assume_stages(printed, paper["released_models"])
        stages = [dataclasses.replace(stage, window=WINDOW) for stage in stages]
        pool = "avg" if "average pooling" in remark or not stages[-1].global_tokens else "cls"
        size = printed["image_size"]
        build = partial(vil.create_model, "vil", stages=stages, image_size=size, pool=pool)
        yield _row("released", printed, attention, build, size, assumption)


def _assume_stages(
    printed: Mapping[str, Any], models: Sequence[Mapping[str, Any]]
) -> tuple[list[StageConfig], str]:
    """Return the stages of a model whose architecture was not published, and the assumption about them."""
    if depths := re.search(r"\((\d+(?:-\d+)+)\)", printed["name"]):
        stages = [
            StageConfig(
                dim=96 * 2**index,
                heads=3 * 2**index,
                blocks=int(blocks),
                patch=2 if index else 4,
                attention="vision_longformer" if index < 2 else "full",
                global_tokens=1 if index < 3 else 0,
            )
            for index, blocks in enumerate(depths[1].split("-"))
        ]
        return stages, (
            "Swin's widths 96, 192, 384, 768 and heads 3, 6, 12, 24; ViL attention in the first two stages, "
            "full in the others, one global token in all but the last, as in every other published ViL"
        )
    key = printed["name"], printed["image_size"]
    twin = next(m for m in models if (m["name"], m["image_size"]) == key and m["arch"])
    stages = parse_arch(twin["arch"], ATTENTION_NAMES[printed["attention"]])
    stages = [dataclasses.replace(stage, position=printed["position"]) for stage in stages]
    return stages, f"the stages of {twin['name']} with {twin['position']} position at the same image size"


def _row(
    table: Literal["2", "released"],
    printed: Mapping[str, Any],
    attention: str,
    build: partial[nn.Module],
    image_size: int,
    assumption: str = "",
) -> Row:
    with torch.device("meta"):  # counting needs shapes only
        model = build()
        complexity = measure_complexity(model, image_size, in_chans=3)
        has_count = printed.get("kind") != "flat"  # the paper repeats DeiT's figures for flat models
        count = count_like_paper(build, model) if has_count else (None, None)
    name, sizes = printed.get("model") or printed["name"], (complexity.params / 1e6, complexity.flops / 1e9)
    return Row(table, name, printed, attention, build, *sizes, count[0], count[1], assumption)


def count_like_paper(build: partial[nn.Module], model: nn.Module) -> tuple[float, float | None]:
    """Return millions of parameters and 10⁹ multiply-adds, counted so that they give the printed digits.

    The paper does not describe its count; this one was found by trial.

    Parameters: without the norms of the patch embeddings and the tables of relative position, but with the
    random projections of Performer, which are not trained. FLOPs: as if there were no global tokens, and with
    the two feature maps of Performer counted twice. No count is known for the FLOPs of global-only attention.
    """
    stages = build.keywords["stages"]
    parameters = model.named_parameters()
    params = sum(p.numel() for name, p in parameters if not any(part in name for part in NOT_COUNTED))
    params += sum(buffer.numel() for name, buffer in model.named_buffers() if "random_projection" in name)
    if any(stage.attention == "global_only" for stage in stages):
        return params / 1e6, None
    without_global = [dataclasses.replace(stage, global_tokens=0) for stage in stages]
    local = cast(MultiScaleViT, partial(build, stages=without_global, pool="avg")())
    flops = local.multiply_adds()
    for stage, built in zip(stages, local.stages):
        if stage.attention == "performer":
            flops += stage.blocks * 2 * built.size[0] * built.size[1] * stage.random_features * stage.dim
    return params / 1e6, flops / 1e9


def params_with_embedding_per_position(row: Row) -> float:
    """Return millions of parameters if each position had its own embedding, as in DeiT."""
    with torch.device("meta"):
        model = cast(MultiScaleViT, row.build())
    change = 0
    for stage in model.stages:
        if stage.position is not None:
            rows, columns = stage.position.rows, stage.position.columns  # (H, C/2), (W, C/2)
            change += rows.shape[0] * columns.shape[0] * stage.config.dim - rows.numel() - columns.numel()
    return row.params_m + change / 1e6


# --- Comparison ---------------------------------------------------------------------------------------------


def decimals(printed: Decimal | int) -> int:
    """Return the number of decimals of a printed figure."""
    return max(0, -int(Decimal(printed).as_tuple().exponent))


def has_same_digits(ours: float, printed: Decimal | int) -> bool:
    """Return True if `ours` rounds to the printed figure; a value halfway between two rounds to both."""
    return abs(ours - float(printed)) <= 0.5 * 10 ** -decimals(printed) + 1e-9


def is_within(ours: float, printed: Decimal | int, *, absolute: float = 0.0, relative: float = 0.0) -> bool:
    """Return True if `ours` is within a tolerance of the printed figure, or has its digits."""
    tolerance = max(absolute, relative * float(printed)) + 1e-9
    return abs(ours - float(printed)) <= tolerance or has_same_digits(ours, printed)


def check_claims(sizes: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> list[Claim]:
    """Return the claims of the page."""
    table2 = [row for row in rows if row.table == "2"]
    published = [row for row in rows if row.table == "released" and row.attention in REPRODUCED]
    counted = [row for row in rows if row.paper_gflops is not None]
    deit = next(row for row in table2 if row.model == DEIT_PARAMS_MODEL)
    others = [row for row in table2 if row is not deit]
    deit_params_m = params_with_embedding_per_position(deit)

    def flops_agree(rows: Sequence[Row]) -> bool:
        return all(is_within(row.gflops, row.printed["gflops"], relative=0.01) for row in rows)

    return [
        Claim(
            f"Table 1: blocks, patch, heads and width of every stage of {len(sizes)} models.",
            all(size["printed"] == size["ours"] for size in sizes),
        ),
        Claim(
            f"Table 2: parameters within 0.01 M, or exact as printed, in {len(others)} of {len(table2)} "
            "rows.",
            all(is_within(row.params_m, row.printed["params_m"], absolute=0.01) for row in others),
        ),
        Claim(
            f"Table 2: the other row, {deit.model}, has {deit.params_m:.2f} M for "
            f"{deit.printed['params_m']} M, and {deit_params_m:.2f} M with DeiT's position embedding.",
            has_same_digits(deit_params_m, deit.printed["params_m"]),
        ),
        Claim(
            f"Table 2: FLOPs within 1 %, or exact as printed, in all {len(table2)} rows.", flops_agree(table2)
        ),
        Claim(
            "Published models with full, Vision Longformer, Linformer and spatial-reduction attention: FLOPs "
            f"within 1 % in all {len(published)} rows.",
            flops_agree(published),
        ),
        Claim(
            f"The paper's count (below): every printed digit of parameters and FLOPs in all {len(counted)} "
            "rows that have both, which is all but flat models and global-only attention.",
            all(
                has_same_digits(row.paper_params_m or 0.0, row.printed["params_m"])
                and has_same_digits(row.paper_gflops or 0.0, row.printed["gflops"])
                for row in counted
            ),
        ),
    ]


# --- Page ---------------------------------------------------------------------------------------------------


def show_table1(sizes: Sequence[Mapping[str, Any]]) -> str:
    """Return Table 1, a row per model."""

    def show(stages: Sequence[Mapping[str, int]]) -> str:
        return ", ".join(f"{s['blocks']}/{s['patch']}/{s['heads']}/{s['dim']}" for s in stages)

    rows = [
        {
            "size": size["size"],
            "model": f"`{size['model']}`",
            "paper": show(size["printed"]),
            "ours": "the same" if size["ours"] == size["printed"] else show(size["ours"]),
        }
        for size in sizes
    ]
    return markdown_table(rows)


def show_rows(rows: Sequence[Row]) -> str:
    """Return Table 2 or the table of published models."""
    cells = []
    for row in rows:
        printed = row.printed
        line = {"model": row.model + (" ¹" if row.assumption else "")}
        if row.table == "released":
            line |= {"position": printed["position"], "pixels": f"{printed['image_size']}²"}
        line |= {
            "params M, paper": str(printed["params_m"]),
            "ours": f"{row.params_m:.3f}",
            "Δ": f"{row.params_m - float(printed['params_m']):+.3f}",
            "paper's count": _show_count(row.paper_params_m, printed["params_m"]),
            "GFLOPs, paper": str(printed["gflops"]),
            "ours ": f"{row.gflops:.3f}",  # headings are keys; the space makes them different
            "Δ ": f"{100 * (row.gflops / float(printed['gflops']) - 1):+.2f} %",
            "paper's count ": _show_count(row.paper_gflops, printed["gflops"]),
        }
        if row.table == "2":
            line["MB, paper"] = str(printed["memory_mb"])
        top1 = printed["top1"] if isinstance(printed["top1"], list) else [printed["top1"]]
        line["Top-1 %, paper only"] = " / ".join("–" if value is None else str(value) for value in top1)
        cells.append(line)
    return markdown_table(cells)


def _show_count(value: float | None, printed: Decimal | int) -> str:
    """Return the paper's count to the printed decimals, and = or ≠ the printed figure."""
    if value is None:
        return "–"
    return f"{printed} =" if has_same_digits(value, printed) else f"{value:.{decimals(printed)}f} ≠"


def show_page(sizes: Sequence[Mapping[str, Any]], rows: Sequence[Row], claims: Sequence[Claim]) -> str:
    """Return the page: tools/dev/paper_tables.md with claims, tables and assumptions."""
    assumptions: dict[str, list[str]] = {}
    for row in rows:
        if row.assumption:
            assumptions.setdefault(row.assumption, []).append(row.model)
    return Template(PAGE_TEMPLATE.read_text(encoding="utf-8")).substitute(
        claims="\n".join(f"- {'holds' if c.holds else '**FAILS**'}: {c.text}" for c in claims),
        table1=show_table1(sizes),
        table2=show_rows([row for row in rows if row.table == "2"]),
        published=show_rows([row for row in rows if row.table == "released"]),
        assumptions="\n".join(f"- {' and '.join(models)}: {text}." for text, models in assumptions.items()),
    )


def main(argv: Sequence[str]) -> None:
    """Build the models, compare, print and write; exit with status 1 if a claim fails."""
    parser = ToolParser(prog="python -m tools.dev.paper_tables", description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the page to this file")
    arguments = parser.parse_args(argv)
    paper = read_paper_results()
    sizes, rows = table1_rows(paper), [*table2_rows(paper), *published_rows(paper)]
    claims = check_claims(sizes, rows)
    page = show_page(sizes, rows, claims)
    print_text(page)
    if arguments.markdown:
        write_output(arguments.markdown, page, "--markdown")
    if not all(claim.holds for claim in claims):
        raise SystemExit(1)


if __name__ == "__main__":
    command_line.main(main)
