"""tools/report.py: the page in a browser without network, and reading of run folders."""

from __future__ import annotations

import json
import re
import shutil
import sys

import pytest
import torch
import yaml

import train
from tools.report_page import figures, page
from tools.report_page.evaluation import Evaluation
from tools.report_page.main import main as report
from tools.report_page.runs import MAX_WARNINGS, differences, open_runs
from vil.command_line import main
from vil.config import TrainConfig
from vil.errors import UserError
from vil.evaluation.predictions import Mistake, Predictions
from vil.validation import stored_tree

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
EVIL = "<img src=x onerror=window.hacked=1>"
ENDS = "</script><script>window.hacked=1</script>"
STEPS = 30

pytestmark = pytest.mark.xdist_group("report")  # one worker, so that the run and the browser are shared


def write_run(folder, records=True, finished=False, **changes):
    """Write a run folder: half of its epochs, a damaged line, a spike, a record of an unknown kind."""
    folder.mkdir(parents=True)
    config = stored_tree(TrainConfig())
    config["model"] |= {"name": "vil_tiny", "image_size": 64, "num_classes": 10}
    for section, values in changes.items():
        config[section] |= values
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    if records:
        (folder / "metrics.jsonl").write_text("".join(lines()))
    if finished:
        result = {"top1": 71.0, "params": 6e6, "flops": 1.3e9, "train_memory_mb": 40.0, "memory": EVIL}
        (folder / "summary.json").write_text(json.dumps([result]))
    return folder


def lines():
    for step in range(1, STEPS + 1):
        times = {"step_time": 0.5, "data_wait": 0.1, "images_per_second": 100 + step, "time": 1e9 + 60 * step}
        loss = None if step == 7 else 2 / step  # what was not finite
        yield write(
            kind="train", step=step, loss=loss, lr=1e-3, grad_norm=1.0, skipped_steps=step // 8, **times
        )
        if step % 10 == 0:
            accuracy = {"top1": 50 + step, "ema_top1": 45 + step, "loss": 1.0, "ema_loss": 1.1}
            yield write(kind="validation", step=step, **accuracy, time=1e9 + 60 * step + 1)
    yield write(kind="spike", step=12, loss=9.0, samples=[EVIL, 2, 3])
    yield write(kind=EVIL, step=12)
    yield '{"kind": "train", "step": "damaged\n'
    yield '{"kind": "train", "step": 31, "being writ'


def write(**record):
    return json.dumps({"epoch": -(-record["step"] // 10), **record}) + "\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train three steps on the digits."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    argv = ["--schedule.epochs", "1", "--schedule.batch_size", "479", "--schedule.warmup_epochs", "0",
             "--data.workers", "0", "--log_every", "1", "--loggers", "[]", "--progress", "false",
             "--device", "cpu", "--model.blocks", "1", "1", "1"]  # fmt: skip
    train.main(["--output", str(folder), *argv])
    return folder


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


class Visit:
    """A page in the browser, with its requests and console messages."""

    def __init__(self, browser, path, width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page, self.requests, self.messages = context.new_page(), [], []
        context.route(re.compile("^(?!file:|data:|blob:)"), lambda route: route.abort())
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.goto(path.as_uri())

    def ready(self):
        self.page.wait_for_selector("html[data-ready]", state="attached")
        return self

    def drawn(self):
        """Return visible chart → number of lines, points and heat maps in its SVG."""
        signs = ".js-line[d*=L], .js-line[d*=H], .scatterlayer .point, .heatmaplayer image"
        script = f"""() => Object.fromEntries([...document.querySelectorAll(".chart")]
            .filter(e => e.offsetParent).map(e => [e.id, e.querySelectorAll("{signs}").length]))"""
        return self.page.evaluate(script)

    def evaluate(self, script):
        return self.page.evaluate(script)

    def set_color_scheme(self, scheme):
        """Change the color scheme and wait until the charts have been redrawn."""
        before = self.colors()[-1]
        self.page.emulate_media(color_scheme=scheme)
        for _ in range(200):  # not wait_for_function, which the page's policy refuses
            if self.colors()[-1] != before:
                return
            self.page.wait_for_timeout(50)
        pytest.fail(f"the charts do not follow the {scheme} color scheme")

    def external_requests(self):
        return [url for url in self.requests if not url.startswith(("file:", "data:", "blob:"))]

    def overflow(self):
        return self.evaluate("document.documentElement.scrollWidth - window.innerWidth")

    def colors(self):
        """Return colors of the page and of a chart."""
        return self.evaluate("""() => [getComputedStyle(document.body).backgroundColor,
            getComputedStyle(document.body).color,
            document.querySelector("#loss .xtick text").style.fill,
            document.querySelector("#loss .js-line").style.stroke]""")


@pytest.fixture(scope="module")
def reported(trained, tmp_path_factory):
    """Write the page of a trained run, and of a run in progress whose images are missing."""
    folder = tmp_path_factory.mktemp("pages")
    data = {"source": "folder", "root": ENDS, "workers": 0}
    other = write_run(folder / "other", data=data, schedule={"epochs": 6, "optimizer": EVIL})
    output = folder / "report.html"
    report([str(trained), str(other), "--output", str(output), "--mistakes", "6", "--device", "cpu"])
    return output


def test_all_charts_are_drawn_without_network(browser, reported):
    visit = Visit(browser, reported).ready()
    curves = {"loss", "top1", "lr", "grad-norm", "images-per-second", "data-wait", "skipped-steps"}
    assert set(visit.drawn()) == {*curves, "flops", "train-memory-mb", "classes-0", "confusion-0"}
    assert all(visit.drawn().values()), visit.drawn()
    traces = "document.getElementById('loss').data"
    names = visit.evaluate(f"{traces}.map(t => t.name)")
    assert names == ["digits"] * 3 + ["other"] * 4  # training, spike, validation, average
    assert visit.evaluate(f"{traces}.at(-4).x.length") == STEPS - 1  # one loss was not finite
    assert visit.evaluate(f"{traces}.at(-3).x") == [12]
    for axis, values in (
        ("images", [step * 1024 for step in (10, 20, 30)]),
        ("hours", [9 / 60, 19 / 60, 29 / 60]),
    ):
        visit.page.check(f"input[value={axis}]", force=True)
        assert visit.evaluate("document.getElementById('top1').data.at(-3).x") == pytest.approx(
            values, rel=0.01
        )
        assert all(visit.drawn().values()), axis
    visit.page.uncheck("input[value='1'][type=checkbox]", force=True)
    assert visit.evaluate(f"{traces}.map(t => t.visible)") == [True] * 3 + [False] * 4
    assert not visit.page.is_visible("tr[data-run='1']")
    assert visit.page.is_visible("tr[data-run='0']")
    visit.page.check("input[value='1'][type=checkbox]", force=True)
    assert visit.page.is_visible("tr[data-run='1']")
    visit.page.click("#configuration-tab-1")
    assert ENDS in visit.page.inner_text("#configuration-panel-1")
    assert not visit.page.is_visible("#configuration-panel-0")
    visit.page.keyboard.press("ArrowLeft")
    assert "source: digits" in visit.page.inner_text("#configuration-panel-0")
    shown = "[...document.querySelectorAll('.mistakes img')].map(i => i.complete && i.naturalWidth)"
    assert visit.evaluate(shown) == [32] * 6
    assert visit.evaluate("window.hacked") is None
    light = visit.colors()
    visit.set_color_scheme("dark")
    dark = visit.colors()
    assert all(one != other for one, other in zip(light, dark))
    assert visit.overflow() == 0
    assert visit.external_requests() == []
    assert visit.messages == []


def test_page_on_a_phone_in_the_dark_color_scheme(browser, reported):
    visit = Visit(browser, reported, 390, "dark").ready()
    assert all(visit.drawn().values())
    assert visit.overflow() == 0
    widths = visit.evaluate(
        "[...document.querySelectorAll('.main-svg')].map(e => e.getBoundingClientRect().right)"
    )
    assert max(widths) <= 390
    for run in (0, 1):
        visit.page.click(f"#configuration-tab-{run}")
        assert visit.overflow() == 0
    ground, text, tick, _ = (sum(map(int, re.findall(r"\d+", color)[:3])) for color in visit.colors())
    assert ground < 150 < 380 < min(text, tick)
    visit.set_color_scheme("light")
    assert (visit.overflow(), visit.external_requests(), visit.messages) == (0, [], [])


def test_no_button_of_a_chart_sends_it_away(browser, reported):
    """Plotly 7.1 adds a button that opens Plotly Cloud and sends the chart there, unless told otherwise."""
    visit = Visit(browser, reported).ready()
    opened = []
    visit.page.context.on("page", lambda page: opened.append(page.url))
    charts = "[...document.querySelectorAll('.chart')].filter(e => e.offsetParent)"
    titles = visit.evaluate(
        f"{charts}.map(e => [...e.querySelectorAll('.modebar-btn')].map(b => b.dataset.title))"
    )
    assert len(titles) == 11
    assert [title.split()[0] for title in titles[0]] == ["Download", "Zoom", "Pan", "Zoom", "Zoom", "Reset"]
    assert all(other == titles[0] for other in titles)
    for key in visit.drawn():
        visit.evaluate(f"document.querySelectorAll('#{key} .modebar-btn').forEach(b => b.click())")
    visit.page.wait_for_timeout(500)
    settings = f"{charts}.map(e => [e._context.showSendToCloud, e._context.plotlyServerURL])"
    assert all(values in ([False, ""], [None, ""]) for values in visit.evaluate(settings))
    assert visit.evaluate("document.querySelectorAll('[class*=cloud-dialog]').length") == 0
    assert (opened, visit.external_requests(), visit.messages) == ([], [], [])


def test_mode_bar_is_above_the_plot_in_the_colors_of_the_page(browser, reported):
    visit = Visit(browser, reported).ready()
    script = """() => [...document.querySelectorAll(".chart")].filter(e => e.offsetParent).map(e =>
        [e.querySelector(".nsewdrag").getBoundingClientRect().top
            - e.querySelector(".modebar").getBoundingClientRect().bottom,
         getComputedStyle(e.querySelector(".modebar-group")).backgroundColor,
         getComputedStyle(e.closest(".card")).backgroundColor])"""
    for scheme in ("light", "dark"):
        if scheme == "dark":
            visit.set_color_scheme(scheme)
        for space, bar, card in visit.evaluate(script):
            assert space >= 0
            assert bar == card


def test_cards_do_not_touch(browser, reported):
    for width in (1280, 390):
        visit = Visit(browser, reported, width).ready()
        boxes = visit.evaluate("""[...document.querySelectorAll(".card")].filter(e => e.offsetParent)
            .map(e => e.getBoundingClientRect()).map(b => [b.left, b.top, b.right, b.bottom])""")
        assert len(boxes) > 10
        for i, (left, top, right, bottom) in enumerate(boxes):
            for other in boxes[i + 1 :]:
                between = (other[0] - right, left - other[2], other[1] - bottom, top - other[3])
                assert max(between) >= 13.5  # of 14


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0.4, 24.0], ["0.5", "1", "2", "5", "10", "20"]),
        ([0.55], ["0.1", "0.2", "0.5", "1", "2", "5"]),
        ([2e3, 1e5], ["2,000", "5,000", "10,000", "20,000", "50,000", "100,000"]),
        ([0.01, 100.0], ["0.01", "0.1", "1", "10", "100"]),
    ],
)
def test_ticks_of_logarithmic_axes_are_full_numbers(browser, values, labels, tmp_path):
    assert memory_ticks(browser, values, tmp_path) == labels


def test_logarithmic_axes_without_powers_of_ten_have_ticks(browser, tmp_path):
    """Nor with 2 or 5 times such a power."""
    ticks = [float(label) for label in memory_ticks(browser, [10.1, 11.9], tmp_path)]
    assert ticks == sorted(set(ticks))
    assert len(ticks) >= 3


def memory_ticks(browser, values, folder):
    """Return the labels of the axis of the training memory, for runs with these values."""
    runs = open_runs([str(write_run(folder / f"{i}", finished=True)) for i in range(len(values))])
    for run, value in zip(runs, values):
        run.summary["train_memory_mb"] = value
    (folder / "x.html").write_text(page.render(runs, [None] * len(runs), "x"))
    visit = Visit(browser, folder / "x.html").ready()
    return visit.page.locator("#train-memory-mb .xtick text").all_text_contents()


def test_values_are_marked_where_most_runs_have_another_one(tmp_path):
    rates = (0.1, 0.2, 0.1, 0.3)
    runs = open_runs(
        [str(write_run(tmp_path / f"{i}", False, schedule={"lr": lr})) for i, lr in enumerate(rates)]
    )
    for shown, marked in ((runs[:2], []), (runs[:3], ["0.2"]), (runs, []), ([runs[0], *runs[2:]], ["0.3"])):
        text = page.render(shown, [None] * len(shown), "x")
        assert "Where more than half of the runs have the same value, the others are marked." in text
        assert re.findall(r'class="marked">([^<]*)<', text) == marked


def test_untrusted_texts_are_escaped(browser, tmp_path):
    """Texts of runs, classes, options and records are escaped; an injected script is not executed."""
    runs = open_runs([str(write_run(tmp_path / name, finished=True)) for name in (EVIL, f"{EVIL} $x$ &lt;")])
    runs[0].warnings.append(EVIL)
    classes = (EVIL, ENDS.replace("/", ""), "<b>bold</b>")
    confusion = torch.tensor([[3, 2, 0], [0, 4, 1], [0, 0, 0]])
    mistakes = [Mistake(torch.zeros(1, 2, 2), 4, 0, 1, 0.9, 0.1)]
    evaluation = Evaluation(
        Predictions(torch.tensor([5, 5, 0]), confusion, mistakes, 0), classes, EVIL, ["data:,"]
    )
    text = page.render(runs, [evaluation, f"reason {EVIL}"], f"title {ENDS}")
    assert EVIL not in text
    assert ENDS not in text
    (tmp_path / "x.html").write_text(text.replace("</main>", f"<u></u>{ENDS}</main>"))
    visit = Visit(browser, tmp_path / "x.html").ready()
    assert all(visit.drawn().values())
    assert visit.page.text_content("h1") == f"title {ENDS}"
    assert visit.page.text_content(".chip") == EVIL
    ticks = "#confusion-0 .ytick text, #confusion-0 .xtick text, #classes-0 .ytick text"
    labels = visit.page.locator(ticks).all_text_contents()
    assert "<b>bold</b>" in labels
    assert any(label.startswith("<img src=x") for label in labels)
    assert visit.evaluate("document.querySelectorAll('u, img[src=x], .chart b').length") == 1  # ours
    assert visit.evaluate("window.hacked") is None
    assert visit.external_requests() == []
    refused = [text for text in visit.messages if "Content Security Policy" in text]
    assert len(refused) == len([text for text in visit.messages if "data:," not in text]) == 1


def test_requests_of_a_page_are_detected(browser, tmp_path):
    (tmp_path / "x.html").write_text("<img src='http://127.0.0.1:9/x.png'>")
    visit = Visit(browser, tmp_path / "x.html")
    assert visit.external_requests() == ["http://127.0.0.1:9/x.png"]
    assert visit.messages


def test_content_of_the_page(reported, trained, tmp_path, capsys):
    text = reported.read_text()
    assert "metrics.jsonl: line 36 is skipped: not a record of train.py" in text
    assert "line 37" not in text  # which is being written
    assert re.search(r"other is not evaluated: [^<]*other: the folder holds no ", text)
    assert "3 of 6, not finished" in text
    assert "<strong>80.00</strong> <small>raw, epoch 3</small>" in text
    (summary,) = json.loads((trained / "summary.json").read_text())
    means = f"balanced accuracy {summary['balanced_accuracy']:.2f} %, macro F1 {summary['macro_f1']:.2f} %"
    assert f"360 images, Top-1 {summary['top1']:.2f} %, {means}; best checkpoint" in text
    table = text[text.index("<h3>Precision and recall</h3>") :]
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", table[: table.index("</table>")])
    assert cells[:5] == ["class", "images", "precision", "recall", "F1"]
    for row, start in zip(summary["per_class"], range(5, 55, 5)):
        values = [f"{row[key]:.1f}" for key in ("precision", "recall", "f1")]
        assert cells[start : start + 5] == [row["class"], str(row["images"]), *values]
    values = [f"{summary[key]:.1f}" for key in ("macro_precision", "macro_recall", "macro_f1")]
    assert cells[55:] == ["macro average", "360", *values]
    table = text[text.index('<table class="keys">') :]
    assert '<th scope="row">schedule.optimizer</th>' in table
    assert '<th scope="row">model.position</th>' not in table
    output = tmp_path / "new" / "page.html"
    empty = write_run(tmp_path / "empty", records=False)
    report([str(empty), str(empty), "--no-predictions", "--output", str(output), "--title", "T & T"])
    out = capsys.readouterr().out
    assert re.fullmatch(rf"{re.escape(str(output))}: 1 run, \d\.\d MB\n", out)
    text = output.read_text()
    assert "<title>T &amp; T</title>" in text
    # Parameters and FLOPs of a run in progress, which has no summary.json, are counted.
    assert "0 of 300, not finished</td><td>6.32 M</td><td>111 M</td>" in text
    assert "vil_tiny, 64×64" in text
    assert "Not logged by these runs: Top-1 %, Loss, Learning rate" in text
    assert "--no-predictions" in text
    assert [path.name for path in output.parent.iterdir()] == ["page.html"]


def test_missing_checkpoint_is_reported_in_one_line(trained, tmp_path, capsys):
    copy = shutil.copytree(trained, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints")
    report([str(copy), "--output", str(tmp_path / "x.html")])
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("copy is not evaluated: ")
    assert last.startswith(str(tmp_path / "x.html"))


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["{}/none"], "error: {}/none: no such folder"),
        (["{}"], "error: {}: the folder holds no run of train.py: config.yaml is missing"),
        ([], "error: command line: the following arguments are required: RUN"),
        (
            ["{}", "--mistakes", "-1"],
            "error: command line: argument --mistakes: expected an integer of at least 0, got '-1'",
        ),
        (["{}", "--output", "{}"], "error: --output: {} cannot be written: Is a directory"),
    ],
)
def test_invalid_arguments(argv, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report.py", *(argument.format(tmp_path) for argument in argv)])
    with pytest.raises(SystemExit) as ended:
        main(report)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith(line.format(tmp_path))
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_run_names_are_the_shortest_unique_path_ends(tmp_path):
    paths = [write_run(tmp_path / name, records=False) for name in ("a/seed0", "b/seed0", "b/seed1")]
    assert [run.name for run in open_runs(list(map(str, paths)))] == ["a/seed0", "b/seed0", "b/seed1"]
    assert [run.name for run in open_runs([str(paths[0]), str(paths[2])])] == ["seed0", "seed1"]
    (paths[0] / "config.yaml").write_text("- a list")
    with pytest.raises(UserError, match=r"a/seed0/config\.yaml: expected a mapping"):
        open_runs([str(paths[0])])
    (paths[1] / "summary.json").write_text("[]")
    (run,) = open_runs([str(paths[1])])
    assert run.warnings == [f"{paths[1]}/summary.json is ignored: not a result of eval.py"]


def test_differences_of_configurations(tmp_path):
    stage = {"dim": 48, "heads": 2, "window": 2}
    first = write_run(tmp_path / "first", model={"stages": [stage]}, schedule={"lr": 0.1})
    second = write_run(tmp_path / "second", model={"stages": [stage | {"window": 3}, stage]})
    old = yaml.safe_load((first / "config.yaml").read_text())
    del old["schedule"]["clip_mode"]  # an option younger than the run, which had what is now its default
    old["output"] = "elsewhere"
    (first / "config.yaml").write_text(yaml.safe_dump(old))
    assert differences(open_runs([str(first), str(second)])) == {
        "model.stages[0].window": [2, 3],
        "model.stages[1].dim": [None, 48],
        "model.stages[1].heads": [None, 2],
        "model.stages[1].window": [None, 2],
        "schedule.lr": [0.1, 0.001],
    }


def test_long_curves_show_means():
    points = [(step, float(step % 2)) for step in range(1, 4001)]
    steps, values = figures.average_points(points, 1000)
    assert (len(steps), set(values), steps[0], steps[-1]) == (1000, {0.5}, 2.5, 3998.5)
    assert figures.average_points(points[:3]) == ([1, 2, 3], [1, 0, 1])
    assert figures.average_points([]) == ([], [])


def test_models_of_the_paper():
    models = figures.paper_models()
    assert {model["group"] for model in models} == set(figures.PAPER_GROUPS)
    (model,) = [model for model in models if model["name"] == "S-ViL-1,2,8,1"]
    values = [model[key] for key in ("group", "top1", "flops", "train_memory_mb")]
    assert values == ["vil", 82.0, pytest.approx(4.86e9), 116.8]
    assert (
        len([model for model in models if model["train_memory_mb"]]) == 20
    )  # two without accuracy, two with two


def test_the_models_of_the_paper_are_shown_beside_runs_on_imagenet(tmp_path):
    changes = {
        "digits": {},
        "named": {"data": {"source": "folder", "root": "/data/imagenet"}, "model": {"num_classes": 100}},
        "other": {"data": {"source": "folder", "root": "/data/birds"}, "model": {"num_classes": 1000}},
        "hub": {"data": {"source": "hfds/ILSVRC/imagenet-1k"}, "model": {"num_classes": 1000}},
        "folder": {"data": {"source": "folder", "root": "/data/ILSVRC2012"}, "model": {"num_classes": 1000}},
    }
    folders = [str(write_run(tmp_path / name, finished=True, **change)) for name, change in changes.items()]
    runs = open_runs(folders)
    assert [run.is_imagenet for run in runs] == [False, False, False, True, True]
    for shown, has_paper in ((runs[:3], False), (runs[2:4], True)):
        for chart in figures.cost_charts(shown):
            assert any("paper" in trace.meta for trace in chart.figure.data) == has_paper
            assert chart.figure.layout.showlegend == has_paper
        content = page.render(shown, [None] * len(shown), "x")
        assert ("the paper's models as printed" in content) == has_paper
    (unfinished,) = open_runs([str(write_run(tmp_path / "new", records=False))])
    assert [chart.figure for chart in figures.cost_charts([unfinished])] == [None, None]


def test_worst_of_many_classes_are_shown():
    classes = 1000
    confusion = torch.diag(torch.full((classes,), 50))
    confusion[7, 8], confusion[500, 3] = 20, 30
    evaluation = Evaluation(
        Predictions(confusion.sum(dim=1), confusion, [], 0), tuple(f"c{n}" for n in range(classes)), "raw", []
    )
    matrix = figures.confusion_chart("x", evaluation).figure
    labels = matrix.layout.yaxis.ticktext
    assert len(labels) == figures.MAX_CONFUSED_CLASSES
    assert {"c3", "c7", "c8", "c500"} <= set(labels)
    row, column = labels.index("c500"), labels.index("c3")
    assert matrix.data[0].z[row][column] == 37.5
    assert figures.frequent_confusions(evaluation) == [
        ("c500", "c3", 30, 37.5),
        ("c7", "c8", 20, 100 * 20 / 70),
    ]
    bars = figures.class_accuracy_chart("y", [NamedRun()], {0: evaluation}).figure
    assert len(bars.data[0].x) == figures.MAX_CLASSES
    assert {"c7", "c500"} <= set(bars.layout.yaxis.ticktext)


def diagonal(classes):
    """Return an evaluation of images that are all predicted correctly."""
    confusion = torch.eye(classes, dtype=torch.int64)
    names = tuple(f"class {n}" for n in range(classes))
    return Evaluation(Predictions(confusion.sum(dim=1), confusion, [], 0), names, "raw", [])


def test_charts_of_few_and_of_many_classes_stand_side_by_side(browser, tmp_path):
    """Each begins below its title, which names its run, although they have different heights."""
    runs = open_runs([str(write_run(tmp_path / name)) for name in ("few", "many")])
    path = tmp_path / "report.html"
    path.write_text(page.render(runs, [diagonal(3), diagonal(30)], "title"))
    visit = Visit(browser, path).ready()
    tops = visit.evaluate("""[...document.querySelectorAll(".classes > .card")].map(card =>
        [card.querySelector("h3").innerText, card.querySelector(".chart").getBoundingClientRect().top
            - card.getBoundingClientRect().top])""")
    (few, few_top), (many, many_top) = tops
    assert (few, many) == ("Accuracy by class: few", "Accuracy by class: many")
    assert few_top == many_top < 80


class NamedRun:
    name = "run"


def test_a_run_of_images_that_are_not_square_is_named_by_both_sides(tmp_path):
    run = write_run(tmp_path / "run", model={"image_size": [64, 96]})
    assert open_runs([str(run)])[0].model == "vil_tiny, 64×96"


def test_a_log_with_many_damaged_lines_counts_most_of_them(tmp_path):
    run = write_run(tmp_path / "run", records=False)
    warnings = open_runs([str(run)])[0].warnings
    assert warnings == []  # there is no log yet
    (run / "metrics.jsonl").write_text(
        "damaged\n" * (MAX_WARNINGS + 3) + write(kind="train", step=1, loss=2.0)
    )
    (opened,) = open_runs([str(run)])
    assert opened.last("train", "loss") == 2.0
    shown = [f"line {number} is skipped: not a record of train.py" for number in range(1, MAX_WARNINGS + 1)]
    messages = [warning.partition("metrics.jsonl: ")[2] for warning in opened.warnings]
    assert messages == [*shown, "3 more lines are skipped"]
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    (opened,) = open_runs([str(run)])
    assert opened.last("train", "loss") is None
    assert opened.warnings[0].endswith("metrics.jsonl: cannot be read: Is a directory")


def test_names_that_are_not_utf8_do_not_end_the_report(tmp_path):
    """Such as class folders; a title takes the same way into the page."""
    write_run(tmp_path / "run")
    argv = [str(tmp_path / "run"), "--no-predictions", "--title", "ant \udcff"]
    report([*argv, "--output", str(tmp_path / "report.html")])
    assert b"ant \xff" in (tmp_path / "report.html").read_bytes()
