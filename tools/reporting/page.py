"""The report as one HTML page: tables here, charts by tools/reporting/figures.py and page.js.

The page forbids itself, by a content security policy, everything but its own two scripts, which the policy
names by their hashes, and images that it holds: it can reach no address, and a script that got into it by way
of a file would not run. What comes from files is escaped all the same.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from tools.reporting import figures
from tools.reporting.figures import Chart
from tools.reporting.mistakes import Evaluated
from tools.reporting.runs import Run, differences

FOLDER = Path(__file__).parent
MISSING = "–"

Result = Evaluated | str | None
"""An evaluation, or the line that says why there is none; None where none was asked for."""


def render(runs: Sequence[Run], results: Sequence[Result], title: str) -> str:
    """The page.

    Args:
        runs: the runs, in their order on the page.
        results: of each run.
        title: its heading, as plain text.
    """
    charts: list[Chart] = []
    sections = {
        "runs": ("Runs", _warnings(runs) + _runs_table(runs)),
        "curves": ("Curves", _axis_choice() + _cards(figures.curves(runs), charts)),
        "cost": ("Accuracy and cost", _cost(runs, charts)),
        "mistakes": ("Classes and mistakes", _mistakes(runs, results, charts)),
        "configuration": ("Configuration", _configurations(runs)),
    }
    body = "\n".join(
        f'<section id="{key}"><h2>{heading}</h2>\n{content}\n</section>'
        for key, (heading, content) in sections.items()
    )
    plotly, script = _script_text(get_plotlyjs()), _script_text(_part("page.js"))
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    return Template(_part("page.html")).substitute(
        policy=_policy(plotly, script),
        title=escape(title),
        about=f"{count} · read {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        style=_part("page.css"),
        links="".join(f'<a href="#{key}">{heading}</a>' for key, (heading, _) in sections.items()),
        chips="".join(_chip(number, run) for number, run in enumerate(runs)),
        body=body,
        data=_data(runs, charts),
        plotly=plotly,
        script=script,
    )


def _part(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _script_text(text: str) -> str:
    """A script as the browser will read it, whose hash is then that of the policy."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "</script" in text.lower() or "<!--" in text:
        raise ValueError("this script would end before its end")
    return text


def _policy(*scripts: str) -> str:
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts)
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _data(runs: Sequence[Run], charts: Sequence[Chart]) -> str:
    """What page.js draws, as JSON that cannot end the element it stands in."""
    about = [{"batch_size": _batch_size(run), "clock": figures.clock(run)} for run in runs]
    drawn = {c.key: c.figure.to_plotly_json() for c in charts if c.figure is not None}
    text = json.dumps({"runs": about, "figures": drawn}, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _batch_size(run: Run) -> int | None:
    size = run.option("schedule", "batch_size")
    return size if isinstance(size, int) else None


def _swatch(number: int) -> str:
    return f'<span class="swatch" style="--own:var(--run-{number % 10})"></span>'


def _chip(number: int, run: Run) -> str:
    box = f'<input type="checkbox" value="{number}" checked>'
    return f'<label class="chip">{box}{_swatch(number)}{escape(run.name)}</label>'


# --- Runs ---------------------------------------------------------------------------------------------------


def _warnings(runs: Sequence[Run]) -> str:
    return "".join(f'<p class="notice">{escape(text)}</p>' for run in runs for text in run.warnings)


def _runs_table(runs: Sequence[Run]) -> str:
    bests = [run.best for run in runs]
    highest = max((best.top1 for best in bests if best), default=None)
    rows = []
    for number, (run, best) in enumerate(zip(runs, bests)):
        shown = MISSING
        if best:
            shown = f"{best.top1:.2f}"
            shown = f"<strong>{shown}</strong>" if best.top1 == highest and len(runs) > 1 else shown
            when = "" if best.epoch is None else f", epoch {escape(str(best.epoch))}"
            shown += f" <small>{escape(best.weights)}{when}</small>"
        skipped = run.last("train", "skipped_steps")
        rows.append(
            [
                f'<th scope="row" class="text">{_swatch(number)} {escape(run.name)}</th>',
                _cell(shown),
                _cell(_amount(run.last("validation", "top1"), ".2f")),
                _cell(_amount(run.last("validation", "ema_top1"), ".2f")),
                _cell(escape(run.progress)),
                _cell(_scaled(run.cost("params"))),
                _cell(_scaled(run.cost("flops"))),
                _cell(_amount(run.cost("train_memory_mb"), ".2f")),
                _cell(_amount(run.speed, ",.0f")),
                _cell(_amount(run.cost("images_per_second"), ",.0f")),
                _cell(_amount(skipped, ",.0f")),
                _cell(escape(str(run.option("model", "name", "?"))), "text"),
                _cell(escape(run.data), "text"),
            ]
        )
    headings = ["run", "best Top-1, %", "last, raw", "last, EMA", "epochs", "parameters", "FLOPs",
                "memory, MB", "training, images/s", "evaluation, images/s", "skipped steps", "model",
                "images"]  # fmt: skip
    head = "".join(
        f'<th scope="col"{" class=text" if heading in ("run", "model", "images") else ""}>{heading}</th>'
        for heading in headings
    )
    lines = "".join(f'<tr data-of="{number}">{"".join(row)}</tr>' for number, row in enumerate(rows))
    kinds = dict.fromkeys(
        f"{run.summary.get('memory')}, training in {run.summary.get('train_precision')}, on "
        f"{run.summary.get('device')}"
        for run in runs
        if run.cost("train_memory_mb") is not None
    )
    how = f" ({escape('; '.join(kinds))})" if kinds else ""
    note = (
        f"FLOPs: multiply-adds of an image. Memory: of an image in training{how}. Training speed: median of "
        "the log; evaluation speed and memory as measured at the end of a run."
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
        f'<p class="caption">{note}</p>'
    )


def _cell(content: str, kind: str = "") -> str:
    return f'<td class="{kind}">{content}</td>' if kind else f"<td>{content}</td>"


def _amount(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)


def _scaled(value: float | None) -> str:
    """Three digits and a prefix: 24.7 M, 5.14 G."""
    if value is None:
        return MISSING
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            amount = value / size
            return f"{amount:.{2 if amount < 10 else 1 if amount < 100 else 0}f} {unit}"
    return f"{value:.0f}"


# --- Charts -------------------------------------------------------------------------------------------------


def _axis_choice() -> str:
    labels = "".join(
        f'<label><input type="radio" name="axis" value="{name}"{" checked" if name == "steps" else ""}>{name}'
        "</label>"
        for name in ("steps", "images", "hours")
    )
    return f'<div class="choice" role="group" aria-label="Horizontal axis">{labels}</div>'


def _cards(made: Sequence[Chart], charts: list[Chart]) -> str:
    """The charts as cards; adds those that have a figure to `charts`."""
    drawn = [chart for chart in made if chart.figure is not None]
    charts += drawn
    lacking = ", ".join(chart.title for chart in made if chart.figure is None)
    note = f'<p class="empty">Not logged by these runs: {escape(lacking)}.</p>' if lacking else ""
    return f'<div class="cards">{"".join(map(_card, drawn))}</div>{note}'


def _card(chart: Chart) -> str:
    """A chart that has a figure, under its heading."""
    layout = chart.figure.layout
    kind = " wide" if chart.wide else ""
    caption = f'<p class="caption">{escape(chart.caption)}</p>' if chart.caption else ""
    style = f' style="height:{layout.height:.0f}px"' if layout.height else ""
    legend = " legend" if layout.showlegend else ""
    place = f'<div class="chart{kind}{legend}" id="{chart.key}"{style}></div>'
    return f'<div class="card{kind}"><h3>{escape(chart.title)}</h3>{caption}{place}</div>'


def _cost(runs: Sequence[Run], charts: list[Chart]) -> str:
    note = (
        "Stars: these runs, at their best. The others are the paper's printed figures on ImageNet, trained "
        "at 224² unless stated; bars are its standard deviations. Runs on other images, or measured "
        "otherwise, stand beside them for their cost."
    )
    return f'<p class="about">{note}</p>' + _cards(figures.costs(runs), charts)


# --- Classes and mistakes -----------------------------------------------------------------------------------


def _mistakes(runs: Sequence[Run], results: Sequence[Result], charts: list[Chart]) -> str:
    if all(result is None for result in results):
        return '<p class="notice">Left out: the report was made with --no-predictions.</p>'
    done = {number: result for number, result in enumerate(results) if isinstance(result, Evaluated)}
    parts = [
        f'<p class="notice">{escape(runs[number].name)} is not evaluated: {escape(result)}</p>'
        for number, result in enumerate(results)
        if isinstance(result, str)
    ]
    groups: dict[tuple[str, ...], dict[int, Evaluated]] = {}
    for number, evaluated in done.items():
        groups.setdefault(evaluated.class_names, {})[number] = evaluated
    by_class = [
        figures.class_accuracy(f"classes-{place}", runs, group) for place, group in enumerate(groups.values())
    ]
    if by_class:
        parts.append(_cards(by_class, charts))
    if done:
        panels = {number: _panel(number, result, charts) for number, result in done.items()}
        parts.append('<h3 class="part">Run by run</h3>' + _tabs("mistakes", runs, panels))
    return "".join(parts)


def _panel(number: int, evaluated: Evaluated, charts: list[Chart]) -> str:
    chart = figures.confusion(f"confusion-{number}", evaluated)
    charts.append(chart)
    found = evaluated.predictions
    total = int(found.images.sum())
    about = (
        f"{total:,} images, Top-1 {found.top1:.2f} %, best checkpoint, {escape(evaluated.weights)} weights."
    )
    if found.unreadable:
        about += f" {found.unreadable:,} more could not be read."
    pairs = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="text">{escape(taken)}</td><td>{count:,}</td>'
        f"<td>{share:.1f}</td></tr>"
        for name, taken, count, share in figures.confused_pairs(evaluated)
    )
    table = (
        '<div class="card"><h3>Most frequent confusions</h3><div class="scroll"><table><thead><tr>'
        '<th scope="col">class</th><th scope="col" class="text">taken for</th><th scope="col">images</th>'
        f'<th scope="col">% of class</th></tr></thead><tbody>{pairs}</tbody></table></div></div>'
    )
    items = "".join(_mistake(mistake, address, evaluated) for mistake, address in
                    zip(found.mistakes, evaluated.pictures))  # fmt: skip
    gallery = (
        '<div class="card"><h3>Most confident mistakes</h3><p class="caption">The class of the image, what '
        "it was taken for, and how surely; its own class had the probability in brackets.</p>"
        f'<ul class="mistakes">{items}</ul></div>'
    )
    if not pairs:
        table = '<div class="card"><p class="empty">No image was taken for another class.</p></div>'
    if not found.mistakes:
        gallery = ""
    return f'<p class="about">{about}</p><div class="split">{_card(chart)}{table}</div>{gallery}'


def _mistake(mistake: Any, address: str, evaluated: Evaluated) -> str:
    names = evaluated.class_names
    taken = names[mistake.predicted] if mistake.predicted < len(names) else f"row {mistake.predicted}"
    kind = "small" if address.startswith("data:image/png") else ""
    own = escape(names[mistake.target])
    return (
        f'<li><img class="{kind}" src="{address}" alt="image {mistake.number} of the validation set">'
        f"<span>{own} <small>({100 * mistake.target_probability:.0f} %)</small></span>"
        f'<span class="taken">{escape(taken)}, {100 * mistake.confidence:.1f} %</span></li>'
    )


def _tabs(key: str, runs: Sequence[Run], panels: Mapping[int, str]) -> str:
    """One of the panels at a time, by run."""
    tabs, shown = [], []
    for place, (number, content) in enumerate(panels.items()):
        tab, panel, first = f"{key}-tab-{number}", f"{key}-panel-{number}", place == 0
        tabs.append(
            f'<button role="tab" id="{tab}" aria-controls="{panel}" aria-selected="{str(first).lower()}" '
            f'tabindex="{0 if first else -1}" style="--own:var(--run-{number % 10})">{_swatch(number)}'
            f"{escape(runs[number].name)}</button>"
        )
        shown.append(
            f'<div role="tabpanel" id="{panel}" aria-labelledby="{tab}"{"" if first else " hidden"}>{content}'
            "</div>"
        )
    return f'<div role="tablist" aria-label="Runs">{"".join(tabs)}</div>{"".join(shown)}'


# --- Configurations -----------------------------------------------------------------------------------------


def _configurations(runs: Sequence[Run]) -> str:
    panels = {number: f"<pre>{escape(run.text)}</pre>" for number, run in enumerate(runs)}
    return (
        _differences_table(runs) + '<h3 class="part">config.yaml</h3>' + _tabs("configuration", runs, panels)
    )


def _differences_table(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return ""
    rows = differences(runs)
    if not rows:
        return '<p class="notice">The runs have the same configuration.</p>'
    head = "".join(
        f'<th scope="col" class="text" data-of="{number}">{_swatch(number)} {escape(run.name)}</th>'
        for number, run in enumerate(runs)
    )
    body = "".join(
        f'<tr><th scope="row">{escape(key)}</th>{"".join(_values(row))}</tr>' for key, row in rows.items()
    )
    return (
        "<p class='about'>The options in which the runs differ. Marked are values other than the most "
        "frequent one.</p>"
        f'<div class="scroll"><table class="keys"><thead><tr><th scope="col">option</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _values(row: Sequence[Any]) -> Iterable[str]:
    """The cells of an option; values other than the most frequent one are marked."""
    shown = ["null" if value is None else json.dumps(value, ensure_ascii=False, default=str) for value in row]
    usual = Counter(shown).most_common(1)[0][0]  # of equally frequent ones the first
    for number, text in enumerate(shown):
        kind = ' class="marked"' if text != usual else ""
        plain = row[number] if isinstance(row[number], str) else text
        yield f'<td data-of="{number}"{kind}>{escape(plain)}</td>'
