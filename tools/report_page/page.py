"""Render the report: page.html.j2 with page.css, page.js and Plotly in one file.

A content security policy allows the page's two scripts by their hashes and embedded images, nothing else:
the page loads nothing from a network, and a script injected through a run's files would not be executed. All
texts of such files are escaped.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from tools.report_page import figures
from tools.report_page.evaluation import Evaluation
from tools.report_page.runs import Run, differences

FOLDER = Path(__file__).parent
MISSING = "–"

Result = Evaluation | str | None
"""An evaluation, the reason why it failed, or None if the runs were not evaluated."""


def render(runs: Sequence[Run], results: Sequence[Result], title: str) -> str:
    """Return the page with one result per run; the title is plain text."""
    evaluations = {i: result for i, result in enumerate(results) if isinstance(result, Evaluation)}
    by_classes: dict[tuple[str, ...], dict[int, Evaluation]] = {}
    for index, evaluation in evaluations.items():
        by_classes.setdefault(evaluation.class_names, {})[index] = evaluation
    curves, costs = figures.curve_charts(runs), figures.cost_charts(runs)
    groups = enumerate(by_classes.values())
    classes = [figures.class_accuracy_chart(f"classes-{i}", runs, group) for i, group in groups]
    confusions = {i: figures.confusion_chart(f"confusion-{i}", e) for i, e in evaluations.items()}
    charts = [*curves, *costs, *classes, *confusions.values()]
    data = {
        "runs": [{"batch_size": _batch_size(run), "clock": figures.clock(run)} for run in runs],
        "figures": {c.key: c.figure.to_plotly_json() for c in charts if c.figure is not None},
    }
    best = [run.best for run in runs]
    plotly, script = _script(get_plotlyjs()), _script(_read("page.js"))
    loader, undefined = jinja2.FileSystemLoader(FOLDER), jinja2.StrictUndefined
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=undefined
    )
    environment.filters |= {"number": _format_number, "prefixed": _format_prefixed}
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment.get_template("page.html.j2").render(
        policy=_security_policy(plotly, script),
        title=title,
        created=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        runs=runs,
        best=best,
        highest=max((b.top1 for b in best if b), default=None) if len(runs) > 1 else None,
        conditions=_measurement_conditions(runs),
        curves=curves,
        costs=costs,
        has_paper=any(run.is_imagenet for run in runs),
        is_evaluated=any(result is not None for result in results),
        failures={i: result for i, result in enumerate(results) if isinstance(result, str)},
        evaluations=evaluations,
        classes=classes,
        confusions=confusions,
        frequent={i: figures.frequent_confusions(e) for i, e in evaluations.items()},
        differences={key: list(_shown_values(row)) for key, row in differences(runs).items()},
        data=data,
        style=Markup(_read("page.css")),  # noqa: S704 - a file of this package
        plotly=plotly,
        script=script,
    )


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _script(text: str) -> Markup:
    """Return a script in the form that browsers hash, with the line ends of HTML."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "</script" in text.lower() or "<!--" in text:
        raise ValueError("the script contains the end of its HTML element")
    return Markup(text)  # noqa: S704 - Plotly and a file of this package


def _security_policy(*scripts: str) -> Markup:
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts)
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    return Markup(  # noqa: S704 - hashes
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _batch_size(run: Run) -> int | None:
    size = run.option("schedule", "batch_size")
    return size if isinstance(size, int) else None


def _measurement_conditions(runs: Sequence[Run]) -> str:
    """Return how and on which devices the training memory was measured."""
    summaries = (run.summary for run in runs if run.cost("train_memory_mb") is not None)
    text = "{memory}, training in {train_precision}, on {device}"
    return "; ".join(dict.fromkeys(text.format_map(defaultdict(lambda: None, s)) for s in summaries))


def _shown_values(values: Sequence[Any]) -> Iterator[tuple[str, bool]]:
    """Yield the text of an option's value in each run, and True if most of the runs have another."""
    keys = ["null" if v is None else json.dumps(v, ensure_ascii=False, default=str) for v in values]
    most_frequent, count = Counter(keys).most_common(1)[0]
    has_majority = 2 * count > len(keys)
    for value, key in zip(values, keys):
        yield value if isinstance(value, str) else key, has_majority and key != most_frequent


def _format_number(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)


def _format_prefixed(value: float | None) -> str:
    """Return three digits and a unit prefix: 24.7 M, 5.14 G."""
    if value is None:
        return MISSING
    for prefix, unit in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= unit:
            scaled = value / unit
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {prefix}"
    return f"{value:.0f}"
