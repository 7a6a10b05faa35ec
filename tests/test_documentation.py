"""The README, the docs, the heads of configs and the help agree with the code: figures, files, links."""

import ast
import contextlib
import re
import shutil
from pathlib import Path

import pytest
import torch

import vil
from data.sources import SOURCES
from tools.dev import checkpoint_cost
from tools.gpu_check.program import SECTIONS
from vil.attention import ATTENTIONS
from vil.command_line import resolve_train_command
from vil.models.zoo import model_from_config

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
README = (ROOT / "README.md").read_text()
CONFIGS = ROOT / "configs"
PROGRAMS = [*sorted((ROOT / "tools").glob("**/*.py")), ROOT / "train.py", ROOT / "eval.py"]
TRAINING_IMAGES = {
    "cifar10": 50_000, "cifar10_short": 10_000, "digits": 1437, "vil_22k_90": 14_197_122,
}  # fmt: skip
"""Schedule -> images of an epoch in the head of its file; of all others ImageNet's."""


def on_meta(name, **options):
    with torch.device("meta"):
        return vil.create_model(name, **options)


def test_table_of_models():
    rows = re.findall(r"^\| `(\w+)` \| ([\d, ]+) \| ([\d.]+) M \| ([\d.]+) G \|", README, re.MULTILINE)
    assert [name for name, *_ in rows] == vil.list_models()
    for name, blocks, params, gigas in rows:
        model = on_meta(name)
        assert blocks == ", ".join(str(len(stage.blocks)) for stage in model.stages)
        assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}" == params
        assert f"{model.multiply_adds() / 1e9:.2f}" == gigas


def scores_and_sums(model):
    """Multiply-adds of the first two stages' attention without its projections."""
    total = 0
    for stage in model.stages[:2]:
        tokens = stage.num_global_tokens + stage.size[0] * stage.size[1]
        total += sum(b.attn.multiply_adds(stage.size) - 4 * tokens * b.attn.dim**2 for b in stage.blocks)
    return total


def test_table_of_resolutions():
    rows = re.findall(
        r"^\| (\d+)² \| ([\d.]+) G \| ([\d.]+) G \| ([\d.]+) G \| ([\d.]+) G \|", README, re.MULTILINE
    )
    assert len(rows) == 3
    for size, *figures in rows:
        models = [on_meta("vil_small", image_size=int(size), attention=a) for a in ("full", None)]
        costs = [*(m.multiply_adds() for m in models), *(scores_and_sums(m) for m in models)]
        assert [f"{cost / 1e9:.2f}" for cost in costs] == figures


def head(path):
    """Return the comments at the beginning of a file of configs/."""
    return re.match(r"(?:#.*\n)*", path.read_text())[0]


def config_files(pattern):
    """Return the files of configs/ whose head matches a pattern."""
    return [path for path in sorted(CONFIGS.rglob("*.yaml")) if re.search(pattern, head(path))]


COSTS = r"([\d.]+) M parameters, ([\d.]+) ([GM]) multiply-adds"
MODELS = [
    path
    for path in config_files(COSTS)
    if path.parent.name != "schedules" and "\nname: timm/" not in path.read_text()
]


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_cost_in_the_head_of_a_model(path):
    params, cost, unit = re.search(COSTS, head(path)).groups()
    levels = ["--config", str(path)] if path.parent.name == "ablations" else []
    base = "vil_tiny" if levels else str(path)
    config = resolve_train_command(["--model", base, *levels, "--data.root", "x"]).config.model
    with torch.device("meta"):
        model = model_from_config(config, 10 if config.image_size == 32 else 1000)
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.{decimals(params)}f}" == params
    assert f"{model.multiply_adds() / {'G': 1e9, 'M': 1e6}[unit]:.{decimals(cost)}f}" == cost


def decimals(number):
    return len(number.partition(".")[2])


STEPS = r"(\d+) epochs,? of ([\d,]+) steps"


@pytest.mark.parametrize("path", config_files(STEPS), ids=lambda path: path.stem)
def test_steps_in_the_head_of_a_schedule(path):
    epochs, steps = re.search(STEPS, head(path)).groups()
    schedule = resolve_train_command(["--schedule", str(path)]).config.schedule
    assert schedule.epochs == int(epochs)
    assert TRAINING_IMAGES.get(path.stem, 1_281_167) // schedule.batch_size == int(steps.replace(",", ""))


def test_steps_in_the_head_of_small_data():
    path = CONFIGS / "schedules" / "small_data.yaml"
    schedule = resolve_train_command(["--schedule", str(path)]).config.schedule
    few, many = (f"{schedule.epochs * (images // schedule.batch_size):,}" for images in (500, 5000))
    assert f"with 500 images {few} steps, with 5,000 images {many}" in head(path)
    fine_tuning = resolve_train_command(["--schedule", "finetune"]).config.schedule
    assert fine_tuning.epochs / schedule.epochs == 1 / 5
    assert "needs a fifth of the epochs" in re.sub(r"\n# ", " ", head(path))


def anchors(page):
    """Return the anchors of the headings of a page, as GitHub names them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_help_fits_on_lines(path):
    # A backslash at the end of a line of a docstring joins it with the next one.
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert max(map(len, text.splitlines()), default=0) <= 110


def test_help_of_a_program_that_passes_its_options_on(capsys):
    with pytest.raises(SystemExit):
        checkpoint_cost.main(["--help"])
    assert "Measure the cost of checkpoints" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("models.md", ATTENTIONS),
        ("data.md", [name for name in SOURCES if not name.endswith("/")]),
        ("gpu.md", SECTIONS),
    ],
)
def test_tables_name_every_entry(page, names):
    cells = re.findall(r"^\| ([^|]+) \|", (ROOT / "docs" / page).read_text(), re.MULTILINE)
    described = set(re.findall(r"`([^`]+)`", " ".join(cells)))
    assert not set(names) - described


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_links_exist(page):
    text = page.read_text()
    for link, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
        target = page.parent / link if link else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), f"{link}#{anchor}"
    for path in re.findall(r"(?:configs|tools|docs)/[\w/]+\.(?:ya?ml|py|md|png)", text):
        assert (ROOT / path).exists(), path


def test_python_in_the_readme_runs(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "tests" / "fixtures" / "version_0_1_0" / "run", tmp_path / "runs" / "digits")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        # Models of the zoo are large; the run is read from a file, which needs real memory.
        with contextlib.nullcontext() if "vil.load(" in block else torch.device("meta"):
            exec(compile(block, "README.md", "exec"), {})
