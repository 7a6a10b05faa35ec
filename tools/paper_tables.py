"""The paper's tables beside ours: Tables 1 and 2 and the published models of the ICCV 2021 paper.

    python tools/paper_tables.py                                    tables on the terminal, a few seconds
    python tools/paper_tables.py --markdown docs/reproduce.md       the same as a page, with explanations
    python tools/paper_tables.py --json tables.json                 one object per row
    python tools/paper_tables.py --device cuda --markdown gpu.md    also memory and speed, on a GPU

The paper's figures stand in tools/paper_tables.json; ours are taken from models that are built here. Exit
status 1 when one of the claims that open the page does not hold.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from string import Template
from typing import Any, Literal, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import timm
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import vil
from vil import command_line
from vil.config import ConfigError, Precision, StageConfig
from vil.evaluation import report
from vil.evaluation.benchmark import halved_until_it_fits, measure_memory
from vil.evaluation.complexity import measure_complexity
from vil.models import MultiScaleViT
from vil.models.released import ATTENTION_NAMES, parse_arch
from vil.models.zoo import stages_of
from vil.training import distributed
from vil.training.precision import autocast, grad_scaler

PAPER = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).with_suffix(".md")
WINDOW = 7
ZOO_NAMES = {
    "Tiny": "vil_tiny", "Small": "vil_small", "Medium-D": "vil_medium_deep", "Medium-W": "vil_medium_wide",
    "Base-D": "vil_base_deep", "Base-W": "vil_base_wide",
    "Tiny-3stage": "vil_tiny_3stage", "Small-3stage": "vil_small_3stage",
}  # fmt: skip
EXPLAINED = "S-E-ViT(full/16)"
"""The one row of Table 2 whose parameters are not the printed ones; a claim of its own says why."""
REPRODUCED = ("full", "vision_longformer", "linformer", "spatial_reduction")
"""Attentions of the published models whose printed FLOPs are those of the formula."""
UNMEASURED = """\
- **Memory by the paper's protocol** (training with mixed precision on a GPU) is unmeasured on this page. On a
  GPU, `python tools/paper_tables.py --device cuda --markdown gpu.md` puts it beside the printed figures, with
  images per second; `--memory` counts on a CPU what autograd keeps for the backward pass."""
MEASURED = "- **Memory** is that of training steps: {}."
COUNTED = (
    "bytes that autograd keeps for the backward pass, counted on a CPU in bfloat16. A GPU's peak is higher, "
    "and the scores of full attention are computed again here, not kept: this is not the paper's protocol"
)


@dataclass
class PaperTables:
    """The paper's tables beside ours: parameters, FLOPs, and on request memory and speed."""

    markdown: str | None = None
    """Write the page to this file."""
    json: str | None = None
    """Write the rows to this file."""
    device: str = "cpu"
    """auto, cpu or cuda; a GPU also measures memory per image and images per second of training steps."""
    memory: bool = False
    """On a CPU too: count what autograd keeps for the backward pass, for Table 2; takes minutes."""
    batch_size: int = 128
    """Images of a measured training step, halved until they fit."""


@dataclass(frozen=True)
class Architecture:
    """A model of ours as one row of a table has it."""

    stages: Sequence[StageConfig]
    image_size: int = 224
    mask: Literal["chunk", "exact"] = "chunk"
    pool: Literal["avg", "cls"] = "avg"

    def __call__(self) -> MultiScaleViT:
        """Builds the model."""
        model = vil.create_model(
            "vil", stages=list(self.stages), image_size=self.image_size, mask=self.mask, pool=self.pool
        )
        return cast(MultiScaleViT, model)

    def without_global_tokens(self) -> Architecture:
        """The same without global tokens in any stage."""
        stages = [dataclasses.replace(stage, global_tokens=0) for stage in self.stages]
        return dataclasses.replace(self, stages=stages, pool="avg")


@dataclass
class Row:
    """One model of a table: what the paper prints and what ours is.

    Attributes:
        paper: the printed figures, as `tools/paper_tables.json` has them; decimals as printed.
        attention: the sparse attention, by our name.
        build: makes the model, with random weights, on the current default device.
        assumed: what had to be assumed about an architecture that was not published; empty where it was.
        params_m: millions of parameters.
        gflops: 10⁹ multiply-adds of one image.
        counted_params_m, counted_gflops: the same as the paper seems to count (`count_as_the_paper`); None
            where no such count is known.
        memory_mb: 10⁶ bytes per image of a training step; None where not asked for.
        images_per_second: of training steps; None where not measured.
    """

    table: Literal["2", "released"]
    model: str
    paper: Mapping[str, Any]
    attention: str
    position: str
    image_size: int
    build: Callable[[], nn.Module]
    params_m: float
    gflops: float
    counted_params_m: float | None
    counted_gflops: float | None
    assumed: str = ""
    memory_mb: float | None = None
    images_per_second: float | None = None


@dataclass(frozen=True)
class Claim:
    """Something that the tables show, and whether they do."""

    text: str
    holds: bool


def read_paper(path: Path = PAPER) -> dict[str, Any]:
    """The paper's figures; numbers with a point become Decimal, which keeps how many decimals are printed."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"), parse_float=Decimal)
    return content


# --- The models ---------------------------------------------------------------------------------------------


def table1(paper: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per size and stage: blocks, patch, heads and width in the paper and in the model of that name."""
    rows = []
    for size, stages in paper["table1"].items():
        with torch.device("meta"):
            model = cast(MultiScaleViT, vil.create_model(ZOO_NAMES[size]))
        ours = [
            {
                "blocks": len(stage.blocks),
                "patch": stage.patch_embed.patch,
                "heads": stage.blocks[0].attn.heads,
                "dim": stage.patch_embed.proj.out_channels,
            }
            for stage in model.stages
        ]
        rows.append({"table": "1", "size": size, "model": ZOO_NAMES[size], "paper": stages, "ours": ours})
    return rows


def table2(paper: Mapping[str, Any]) -> Iterator[Row]:
    """Table 2: absolute position, average pooling, 224² pixels, the exact window with w = 7."""
    for printed in paper["table2"]:
        size, blocks = printed["size"], printed["blocks"]
        name = f"vil_{size}_3stage" if len(blocks) == 3 else f"vil_{size}"
        attention = "full" if printed["attention"] == "full" else "vision_longformer"
        architecture: Architecture | Callable[[], nn.Module]
        if "DeiT" in printed["model"]:
            architecture = _Timm(f"deit_{size}_patch16_224")
        elif printed["kind"] == "flat":
            flat = stages_of(f"evit_{size}_patch16", position="absolute", blocks=blocks)
            architecture = Architecture(flat)
        else:
            stages = stages_of(name, attention=attention, blocks=blocks, position="absolute", window=WINDOW)  # type: ignore[arg-type]
            architecture = Architecture(stages, mask="exact")
        yield _row("2", printed, architecture, attention=attention, position="absolute", image_size=224)


def released(paper: Mapping[str, Any]) -> Iterator[Row]:
    """The published models: the chunk mask with w = 7 in every stage."""
    for printed in paper["released_models"]:
        name, _, words = printed["attention"].partition(",")
        attention = "global_only" if "only global" in words else ATTENTION_NAMES[name]
        if printed["arch"] is not None:
            stages, assumed = parse_arch(printed["arch"], attention), ""
        else:
            stages, assumed = assumed_stages(printed, paper["released_models"])
        stages = [dataclasses.replace(stage, window=WINDOW) for stage in stages]
        pool: Literal["avg", "cls"] = (
            "avg" if "average pooling" in words or not stages[-1].global_tokens else "cls"
        )
        size = printed["image_size"]
        yield _row(
            "released", printed, Architecture(stages, size, pool=pool),
            attention=attention, position=printed["position"], image_size=size, assumed=assumed,
        )  # fmt: skip


def assumed_stages(
    printed: Mapping[str, Any], others: Sequence[Mapping[str, Any]]
) -> tuple[list[StageConfig], str]:
    """Stages of a model whose architecture was not published in words, and what was assumed."""
    if depths := re.search(r"\((\d+(?:-\d+)+)\)", printed["name"]):
        blocks = [int(number) for number in depths[1].split("-")]
        stages = [
            StageConfig(
                dim=96 * 2**number,
                heads=3 * 2**number,
                blocks=count,
                patch=2 if number else 4,
                attention="vision_longformer" if number < 2 else "full",
                global_tokens=1 if number < 3 else 0,
            )
            for number, count in enumerate(blocks)
        ]
        return stages, (
            "Swin's widths 96, 192, 384, 768 and heads 3, 6, 12, 24; ViL attention in the first two stages, "
            "full in the others, one global token in all but the last, as in every other published ViL"
        )
    twin = next(
        other
        for other in others
        if (other["name"], other["image_size"]) == (printed["name"], printed["image_size"]) and other["arch"]
    )
    stages = [
        dataclasses.replace(stage, position=printed["position"])
        for stage in parse_arch(twin["arch"], ATTENTION_NAMES[printed["attention"]])
    ]
    return stages, f"the stages of {twin['name']} with {twin['position']} position at the same image size"


@dataclass(frozen=True)
class _Timm:
    """Makes a model of timm."""

    name: str

    def __call__(self) -> nn.Module:
        model: nn.Module = timm.create_model(self.name)
        return model


def _row(
    table: Literal["2", "released"],
    printed: Mapping[str, Any],
    build: Callable[[], nn.Module],
    *,
    image_size: int,
    **about: Any,
) -> Row:
    counted: tuple[float | None, float | None] = (None, None)
    prints_deit = printed.get("kind") == "flat"  # of flat models the paper repeats DeiT's own figures
    with torch.device("meta"):  # shapes without numbers: all that counting needs
        found = measure_complexity(build(), image_size, in_chans=3)
        if isinstance(build, Architecture) and not prints_deit:
            counted = count_as_the_paper(build)
    return Row(
        table,
        printed.get("model") or printed["name"],
        printed,
        build=build,
        image_size=image_size,
        params_m=found.params / 1e6,
        gflops=found.flops / 1e9,
        counted_params_m=counted[0],
        counted_gflops=counted[1],
        **about,
    )


def count_as_the_paper(architecture: Architecture) -> tuple[float, float | None]:
    """Millions of parameters and 10⁹ multiply-adds, counted so that they give the printed digits.

    Found by trial: the paper does not say how it counts.

    Parameters: without the norms of the patch embeddings and the tables of relative position, but with the
    random projections of performer, which are not trained. FLOPs: as if there were no global tokens, and with
    the two feature maps of performer counted twice. No count is known for the FLOPs of global-only attention.
    """
    model = architecture()
    left_out = (".patch_embed.norm.", ".bias_table", ".global_bias.")
    params = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if not any(part in name for part in left_out)
    )
    params += sum(buffer.numel() for name, buffer in model.named_buffers() if "random_projection" in name)
    if any(stage.attention == "global_only" for stage in architecture.stages):
        return params / 1e6, None
    bare = architecture.without_global_tokens()()
    flops = bare.multiply_adds()
    for stage, built in zip(architecture.stages, bare.stages):
        if stage.attention == "performer":
            tokens = built.size[0] * built.size[1]
            flops += stage.blocks * 2 * tokens * stage.random_features * stage.dim
    return params / 1e6, flops / 1e9


# --- Comparing ----------------------------------------------------------------------------------------------


def decimals(printed: Decimal | int) -> int:
    """How many decimals a figure is printed with."""
    return max(0, -int(Decimal(printed).as_tuple().exponent))


def same_digits(ours: float, printed: Decimal | int) -> bool:
    """Whether `ours` rounds to the printed figure; exactly between two it may round to either."""
    return abs(ours - float(printed)) <= 0.5 * 10 ** -decimals(printed) + 1e-9


def within(ours: float, printed: Decimal | int, *, absolute: float = 0.0, relative: float = 0.0) -> bool:
    """Whether `ours` is that close to the printed figure, or as close as its digits tell."""
    tolerance = max(absolute, relative * float(printed)) + 1e-9
    return abs(ours - float(printed)) <= tolerance or same_digits(ours, printed)


def percent(ours: float, printed: Decimal | int) -> float:
    """Deviation from the printed figure, in per cent of it."""
    return 100 * (ours / float(printed) - 1)


def params_with_embedding_per_position(row: Row) -> float:
    """Millions of parameters if each position had an embedding of its own, as in DeiT."""
    with torch.device("meta"):
        model = cast(MultiScaleViT, row.build())
    change = 0
    for stage in model.stages:
        if stage.position is not None:
            rows, columns = stage.position.rows, stage.position.columns  # (H, C/2), (W, C/2)
            change += rows.shape[0] * columns.shape[0] * stage.config.dim - rows.numel() - columns.numel()
    return row.params_m + change / 1e6


def claims(sizes: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> list[Claim]:
    """What the tables show; the program fails where one does not hold."""
    second = [row for row in rows if row.table == "2"]
    published = [row for row in rows if row.table == "released" and row.attention in REPRODUCED]
    counted = [row for row in rows if row.counted_gflops is not None]
    explained = next(row for row in second if row.model == EXPLAINED)
    otherwise = params_with_embedding_per_position(explained)
    return [
        Claim(
            f"Table 1: blocks, patch, heads and width of every stage of {len(sizes)} models.",
            all(size["paper"] == size["ours"] for size in sizes),
        ),
        Claim(
            f"Table 2: parameters within 0.01 M, or exact as printed, in {len(second) - 1} of {len(second)} "
            "rows.",
            all(
                within(row.params_m, row.paper["params_m"], absolute=0.01)
                for row in second
                if row is not explained
            ),
        ),
        Claim(
            f"Table 2: the other row, {EXPLAINED}, has {explained.params_m:.2f} M for "
            f"{explained.paper['params_m']} M, and {otherwise:.2f} M with DeiT's position embedding.",
            same_digits(otherwise, explained.paper["params_m"]),
        ),
        Claim(
            f"Table 2: FLOPs within 1 %, or exact as printed, in all {len(second)} rows.",
            all(within(row.gflops, row.paper["gflops"], relative=0.01) for row in second),
        ),
        Claim(
            "Published models with full, Vision Longformer, linformer and spatial-reduction attention: FLOPs "
            f"within 1 % in all {len(published)} rows.",
            all(within(row.gflops, row.paper["gflops"], relative=0.01) for row in published),
        ),
        Claim(
            f"The paper's count (below): every printed digit of parameters and FLOPs in all {len(counted)} "
            "rows that have both, which is all but flat models and global-only attention.",
            all(
                same_digits(row.counted_params_m or 0.0, row.paper["params_m"])
                and same_digits(row.counted_gflops or 0.0, row.paper["gflops"])
                for row in counted
            ),
        ),
    ]


# --- Memory and speed ---------------------------------------------------------------------------------------


def measure(row: Row, device: torch.device, batch_size: int) -> None:
    """Fills in memory and, on a GPU, speed: training steps in 16-bit mixed precision, as in the paper."""
    precision: Precision = "float16" if device.type == "cuda" else "bfloat16"
    with torch.device(device):
        model = row.build()
    memory = measure_memory(
        model, row.image_size, 3, device=device, batch_size=batch_size,
        train_precision=precision, eval_precision=precision,
    )  # fmt: skip
    row.memory_mb = None if memory.train is None else memory.train / 1e6
    if device.type == "cuda":
        row.images_per_second = training_images_per_second(
            model, row.image_size, device, precision, batch_size
        )


def training_images_per_second(
    model: nn.Module, image_size: int, device: torch.device, precision: Precision, batch_size: int
) -> float | None:
    """Images per second of training steps: forward, backward and AdamW; the weights of `model` change.

    The batch is halved until the GPU's memory holds it; None where it does not hold one image.
    """
    from torch.utils.benchmark import Timer  # imported here: it warns on machines without a GPU

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    scaler = grad_scaler(precision, device)

    def step(images: torch.Tensor, targets: torch.Tensor) -> None:
        with autocast(precision, device):
            logits = model(images)  # (B, classes)
        scaler.scale(F.cross_entropy(logits.float(), targets)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    def speed(batch: int) -> float:
        optimizer.zero_grad()  # of a larger batch that failed half-way
        images = torch.zeros(batch, 3, image_size, image_size, device=device)
        targets = torch.zeros(batch, dtype=torch.int64, device=device)
        timer = Timer("step(images, targets)", globals={"step": step, "images": images, "targets": targets})
        return batch / timer.blocked_autorange(min_run_time=1.0).median

    return halved_until_it_fits(speed, batch_size)


# --- The page -----------------------------------------------------------------------------------------------


def show_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows (heading → cell) as a Markdown table that is also readable as text; figures stand at the right."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = [
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |"
        for line in lines
    ]
    rule = "|" + "|".join([":" + "-" * (widths[0] + 1), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([text[0], rule, *text[1:]])


def show_table1(sizes: Sequence[Mapping[str, Any]]) -> str:
    """Table 1, a row per model."""

    def stages(values: Sequence[Mapping[str, int]]) -> str:
        return ", ".join(f"{s['blocks']}/{s['patch']}/{s['heads']}/{s['dim']}" for s in values)

    return show_table(
        [
            {
                "size": size["size"],
                "model": f"`{size['model']}`",
                "paper": stages(size["paper"]),
                "ours": "the same" if size["ours"] == size["paper"] else stages(size["ours"]),
            }
            for size in sizes
        ]
    )


def show_rows(rows: Iterable[Row], memory: str = "") -> str:
    """Table 2 or the published models; `memory` heads the column of ours, which is left out without it."""
    rows, lines = list(rows), []
    timed = any(row.images_per_second is not None for row in rows)
    for row in rows:
        printed = row.paper
        line = {"model": row.model + (" ¹" if row.assumed else "")}
        if row.table == "released":
            line |= {"position": row.position, "pixels": f"{row.image_size}²"}
        line |= {
            "params M, paper": str(printed["params_m"]),
            "ours": f"{row.params_m:.3f}",
            "Δ": f"{row.params_m - float(printed['params_m']):+.3f}",
            "paper's count": _counted(row.counted_params_m, printed["params_m"]),
            "GFLOPs, paper": str(printed["gflops"]),
            "ours ": f"{row.gflops:.3f}",  # headings are keys; a space tells the two halves apart
            "Δ ": f"{percent(row.gflops, printed['gflops']):+.2f} %",
            "paper's count ": _counted(row.counted_gflops, printed["gflops"]),
        }
        if row.table == "2":
            line["MB, paper"] = str(printed["memory_mb"])
        if memory:
            line[memory] = "–" if row.memory_mb is None else f"{row.memory_mb:.1f}"
        if timed:
            speed = row.images_per_second
            line["images/s"] = "–" if speed is None else f"{speed:.0f}"
        top1 = printed["top1"] if isinstance(printed["top1"], list) else [printed["top1"]]
        line["Top-1 %, paper only"] = " / ".join("–" if value is None else str(value) for value in top1)
        lines.append(line)
    return show_table(lines)


def _counted(value: float | None, printed: Decimal | int) -> str:
    """The paper's count to the printed decimals, and whether it is the printed figure."""
    if value is None:
        return "–"
    return f"{printed} =" if same_digits(value, printed) else f"{value:.{decimals(printed)}f} ≠"


def show_claims(found: Sequence[Claim]) -> str:
    """The claims as a list."""
    return "\n".join(f"- {'holds' if claim.holds else '**FAILS**'}: {claim.text}" for claim in found)


def page(
    sizes: Sequence[Mapping[str, Any]],
    rows: Sequence[Row],
    found: Sequence[Claim],
    memory: str = "",
    machine: str = "",
) -> str:
    """The page: the text of tools/paper_tables.md with what was found.

    `memory` heads the column of our memory, and `machine` says how it was found; empty where it was not.
    """
    second = [row for row in rows if row.table == "2"]
    published = [row for row in rows if row.table == "released"]
    explained = next(row for row in second if row.model == EXPLAINED)
    excess = [percent(row.gflops, row.paper["gflops"]) for row in published if row.attention in REPRODUCED]
    relative = [r for r in published if r.position == "relative" and decimals(r.paper["params_m"])]
    unexplained = [
        f"{row.model}, {row.counted_params_m:.2f} M for {row.paper['params_m']} M"
        for row in published
        if row.counted_params_m and not same_digits(row.counted_params_m, row.paper["params_m"])
    ]
    assumptions: dict[str, list[str]] = {}
    for row in published:
        if row.assumed:
            assumptions.setdefault(row.assumed, []).append(row.model)

    def deviations(attention: str) -> str:
        return ", ".join(
            f"{row.model} {percent(row.gflops, row.paper['gflops']):+.1f} %"
            for row in published
            if row.attention == attention
        )

    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        claims=show_claims(found),
        window=WINDOW,
        table1=show_table1(sizes),
        table2=show_rows(second, memory),
        released=show_rows(published, memory),
        assumed="\n".join(f"- {' and '.join(models)}: {text}." for text, models in assumptions.items()),
        excess=f"{min(excess):.2f} to {max(excess):.2f}",
        explained=EXPLAINED,
        explained_ours=f"{explained.params_m:.2f}",
        explained_paper=explained.paper["params_m"],
        explained_otherwise=f"{params_with_embedding_per_position(explained):.2f}",
        relative_models=len(relative),
        relative_excess=f"{max(row.params_m - float(row.paper['params_m']) for row in relative):.2f}",
        performer=deviations("performer"),
        global_only=deviations("global_only"),
        unexplained="; ".join(unexplained) or "none",
        memory=MEASURED.format(machine) if memory else UNMEASURED,
    )


# --- The program --------------------------------------------------------------------------------------------


def as_json(row: Row) -> dict[str, Any]:
    """A row as plain values."""
    return {
        "table": row.table,
        "model": row.model,
        "attention": row.attention,
        "position": row.position,
        "image_size": row.image_size,
        "assumed": row.assumed or None,
        "paper": {
            key: _plain(row.paper.get(key))
            for key in ("params_m", "gflops", "memory_mb", "top1", "top1_std", "top5")
        },
        "ours": {
            "params_m": row.params_m,
            "gflops": row.gflops,
            "memory_mb": row.memory_mb,
            "training_images_per_second": row.images_per_second,
        },
        "deviation": {
            "params_m": row.params_m - float(row.paper["params_m"]),
            "gflops_percent": percent(row.gflops, row.paper["gflops"]),
        },
        "paper_count": {"params_m": row.counted_params_m, "gflops": row.counted_gflops},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return float(value) if isinstance(value, Decimal) else value


def run(words: Sequence[str]) -> None:
    """Builds, compares, prints and writes; exit status 1 where a claim fails."""
    command = command_line.parse(PaperTables, words, prog="tools/paper_tables.py")
    config = command.config
    try:
        if config.batch_size < 1:
            raise ConfigError("batch_size", f"expected at least 1, got {config.batch_size}")
        for key, path in (("markdown", config.markdown), ("json", config.json)):
            if path:
                _check_writable(key, path)
        with distributed.start(config.device) as process:
            device = process.device
    except ConfigError as error:
        raise command.locate(error) from error
    paper = read_paper()
    sizes, rows = table1(paper), [*table2(paper), *released(paper)]
    memory = machine = ""
    if config.memory or device.type == "cuda":
        # Counting takes a CPU long, so only where the paper prints a figure to compare with.
        chosen = [row for row in rows if device.type == "cuda" or row.table == "2"]
        for row in tqdm(chosen, desc="memory", unit="model", leave=False, disable=None):
            measure(row, device, config.batch_size)
        memory, machine = "MB, counted", COUNTED
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
            memory = "MB, measured"
            machine = f"the peak on one {name}, in float16, batches of up to {config.batch_size} images"
    found = claims(sizes, rows)
    print(show_table1(sizes), end="\n\n")
    for table in ("2", "released"):
        print(show_rows([row for row in rows if row.table == table], memory), end="\n\n")
    print(show_claims(found))
    if config.json:
        content = [*sizes, *map(as_json, rows)]
        content += [{"table": "claims", "text": claim.text, "holds": claim.holds} for claim in found]
        report.write_json(config.json, content)
    if config.markdown:
        command_line.write_output(
            Path(config.markdown), page(sizes, rows, found, memory, machine), "markdown"
        )
    if not all(claim.holds for claim in found):
        raise SystemExit(1)


def _check_writable(key: str, path: str) -> None:
    try:
        report.check_writable(path)
    except ConfigError as error:
        raise ConfigError(key, error.reason) from None


if __name__ == "__main__":
    command_line.main(run)
