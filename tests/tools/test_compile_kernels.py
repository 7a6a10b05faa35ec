"""The kernels compile for GPUs that are not here, and take no more of them than is written down."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


def run(*options, interpreted=False):
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpreted:
        variables["TRITON_INTERPRET"] = "1"
    words = [sys.executable, ROOT / "tools" / "compile_kernels.py", *options]
    return subprocess.run(words, env=variables, capture_output=True, text=True, timeout=600)


def rows(*options):
    """One dictionary for each row of the table."""
    done = run(*options)
    assert done.returncode == 0, done.stderr
    heading, _, *lines = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()
    )
    return [dict(zip(heading, line)) for line in lines]


@pytest.mark.parametrize("capability", ["80", "90"])
def test_half_precision_fits(capability):
    """The head widths of every published ViL: no register spills, but for two registers of one kernel."""
    found = rows("--capabilities", capability, "--precisions", "bfloat16", "--widths", "32", "48", "64")
    assert [row["kernel"] for row in found] == ["forward", "query", "key", "global", "bias"] * 3
    for row in found:
        assert int(row["shared"]) < 100_000
        allowed = 8 if (row["kernel"], row["capability"], row["width"]) == ("key", "80", "48") else 0
        assert int(row["spilled"]) <= allowed, row
    loops = {row["kernel"]: int(row["loop"]) for row in found if row["width"] == "32"}
    assert 200 < loops["forward"] < 600  # four times as many where a bias is not read in one piece
    assert 200 < loops["key"] < 600


@pytest.mark.parametrize(
    "options",
    [
        (
            "--neighbors",
            "one",
            "--mask",
            "cyclic",
            "--sides",
            "60",
            "--precisions",
            "float16",
            "--widths",
            "8",
        ),
        ("--mask", "exact", "--window", "15", "--sides", "7", "--precisions", "float32", "--widths", "128"),
        ("--absolute", "--global_tokens", "0", "--sides", "14", "--precisions", "bfloat16", "--widths", "64"),
    ],
)
def test_every_kind_of_call_compiles(options):
    for row in rows("--capabilities", "90", *options):
        assert int(row["shared"]) < 100_000
        assert int(row["registers"]) > 0


def test_nothing_to_compile_for_the_interpreter():
    done = run(interpreted=True)
    assert done.returncode == 2
    assert done.stderr == "error: TRITON_INTERPRET: is set: nothing is compiled then\n"


def test_unknown_capability():
    done = run("--capabilities", "70")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--capabilities" in done.stderr
