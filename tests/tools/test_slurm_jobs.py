"""tools/dev/slurm_jobs.py, which needs Slurm: the batch script of the documentation, and missing programs."""

import subprocess
from pathlib import Path

import pytest

from tools.dev import slurm_jobs
from vil.errors import UserError


def test_the_batch_script_is_that_of_the_documentation_with_small_numbers(tmp_path: Path):
    script = slurm_jobs.batch_script(tmp_path / "job.out", tmp_path / "run")
    path = tmp_path / "job.sh"
    path.write_text(script)
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert script.startswith(f"#!/bin/bash\n#SBATCH --output={tmp_path / 'job.out'}\n#SBATCH --job-name")
    assert f"train.py --device cpu --schedule.epochs 1000 --output {tmp_path / 'run'} &\n" in script
    assert 'scancel --signal=TERM "$SLURM_JOB_ID"' in script
    assert "trap requeue USR1\n" in script  # not TERM, by which scancel ends the script


def test_a_script_of_other_options_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(slurm_jobs._CHANGES, "--nodes=3", "--nodes=2")
    with pytest.raises(ValueError, match="the batch script has 0 times '--nodes=3'"):
        slurm_jobs.batch_script(tmp_path / "job.out", tmp_path / "run")


def test_missing_programs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.which", lambda name: None if name == "munged" else f"/usr/bin/{name}")
    with (
        pytest.raises(UserError, match="the programs munged are missing"),
        slurm_jobs.slurm_cluster(tmp_path),
    ):
        pass
