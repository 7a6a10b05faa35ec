"""tools/convert.py as a program, from a folder that is not the project's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vil
from tools import convert as program
from vil import load_released
from vil.config import ConfigError

ROOT = Path(__file__).parents[2]
CASE = ROOT / "tests" / "fixtures" / "parity" / "linformer_shared_kv"


def test_from_another_folder(tmp_path: Path) -> None:
    words = [CASE / "model_best.pth", "x.safetensors", "--released-config", CASE / "config.yaml"]
    line = [sys.executable, ROOT / "tools" / "convert.py", *words]
    ended = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("x.safetensors: ")
    converted = vil.create_model(None, checkpoint=tmp_path / "x.safetensors").eval()
    published, images = (
        load_released(CASE / "config.yaml", CASE / "model_best.pth"),
        torch.randn(2, 3, 64, 64),
    )
    with torch.no_grad():
        assert torch.equal(converted(images), published(images))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^none: no such file or folder$"):
        program.convert(["none", str(tmp_path / "x")])
