"""docs/quickstart.ipynb: its cells run in order, on a run of one step."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

import train

ROOT = Path(__file__).parents[1]


def test_all_cells_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path / "docs")
    options = ["--schedule.max_steps", "1", "--data.workers", "0", "--device", "cpu", "--loggers", "[]"]
    train.main(["--output", "../runs/digits", "--data.train_fraction", "0.1", *options])
    matplotlib.use("Agg")
    plt.close("all")
    names: dict[str, object] = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
    assert names["class_names"] == tuple(map(str, range(10)))
    predictions = names["predictions"]
    assert isinstance(predictions, list)
    assert [len(classes) for classes in predictions] == [3] * 8
    figures = [plt.figure(number) for number in plt.get_fignums()]
    assert len(figures) == 3
    for figure in figures:  # something is drawn in each of them
        figure.canvas.draw()
        assert np.asarray(figure.canvas.buffer_rgba()).std() > 10
    plt.close("all")
