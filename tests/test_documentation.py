"""The README and the docs agree with the code: figures, files, links."""

import contextlib
import re
import shutil
from pathlib import Path

import pytest
import torch

import vil

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_links_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / link).exists(), link
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
