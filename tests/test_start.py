"""The start of programs on several ranks: by srun, with other options or images, and failures."""

import os
import re
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import forked
from helpers.sample_images import write_image_folder

import train as program
from vil.command_line import file_origin, resolve_train_command, run_program
from vil.errors import UserError
from vil.runtime import launch, rendezvous
from vil.runtime.consistency import InconsistentRanksError
from vil.validation import STORED

ROOT = Path(__file__).parents[1]
MODEL = ["--model", str(ROOT / "configs/models/vil_32.yaml"), "--device", "cpu"]
DATA = ["--data.source", "folder", "--data.workers", "0"]
RUN = ["--schedule.epochs=1", "--schedule.batch_size=4", "--schedule.warmup_epochs=0", "--loggers=[]"]


def srun(folder: Path, name: str, *argvs: list[str], tasks: int | None = None) -> list[tuple[int, str]]:
    """Run a program with one command line per rank, as srun starts it; return statuses and errors.

    With `tasks`, srun would have started that number.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank, argv in enumerate(argvs):
        variables = {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "MASTER_PORT": port,
            "SLURM_STEP_ID": "0",
            "SLURM_NTASKS": str(tasks or len(argvs)),
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": "0",
            "SLURM_NODEID": str(rank),
            "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
            "SLURM_JOB_NODELIST": "localhost",
        }
        command = [forked.python(), str(ROOT / name), *argv]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=folder, env={**os.environ, **variables}, **streams))
    errors = [process.communicate(timeout=200)[1] for process in processes]
    return [(process.returncode, error) for process, error in zip(processes, errors)]


def test_srun_starts_the_ranks_of_one_run_with_a_root_of_each(tmp_path: Path):
    for name in ("one", "two"):
        write_image_folder(tmp_path / name)
    argvs = [[*MODEL, *DATA, *RUN, "--output=run", "--data.root", str(tmp_path / n)] for n in ("one", "two")]
    assert [status for status, _ in srun(tmp_path, "train.py", *argvs)] == [0, 0]
    assert (tmp_path / "run" / "summary.json").exists()
    next((tmp_path / "two").glob("val/*/*")).unlink()
    continued = [*RUN, "--schedule.epochs=2"]
    argvs = [[*argv, *continued] for argv in argvs]
    hosts = f"rank 1 ({socket.gethostname()})", f"rank 0 ({socket.gethostname()})"
    size = sum(1 for _ in (tmp_path / "one").glob("val/*/*"))
    line = f"data.root: {hosts[0]} has {size - 1} validation images, {hosts[1]} has {size}\n"
    assert srun(tmp_path, "train.py", *argvs) == [(2, f"error: command line: {line}")] * 2
    argvs = [[*MODEL, *DATA, "--data.root", str(tmp_path / name)] for name in ("one", "two")]
    line = line.replace("validation images", "images in data set 1")
    assert srun(tmp_path, "eval.py", *argvs) == [(2, f"error: command line: {line}")] * 2


def test_a_rank_that_fails_early_ends_the_others_and_options_that_differ_are_named(tmp_path: Path):
    host = socket.gethostname()
    (first, second) = srun(tmp_path, "train.py", ["--seed=1"], ["--seed=x"])
    assert second == (2, "error: command line: seed: expected an integer of at least 0, got 'x'\n")
    line = "command line: seed: expected an integer of at least 0, got 'x'"
    assert first == (2, f"error: rank 1 ({host}) failed: {line}\n")
    given = ["--seed=1", "--schedule.lr=0.5", "--data.workers=0"], ["--seed=2", "--schedule.lr=0.1"]
    expected = "".join(
        f"error: {key}: {other} of rank 1 ({host}) differs from {own} of rank 0 ({host})\n"
        for key, own, other in (("schedule.lr", "0.5", "0.1"), ("seed", "1", "2"))
    )
    assert srun(tmp_path, "train.py", *given) == [(2, expected)] * 2


@pytest.mark.parametrize("name", ["train.py", "eval.py"])
def test_the_start_ends_after_start_timeout(tmp_path: Path, name: str):
    ((status, error),) = srun(tmp_path, name, [*MODEL, "--start_timeout=0.5"], tasks=2)
    start = "error: start_timeout: still waiting for rank 1 of 2"
    assert status == 1
    assert re.fullmatch(rf"{start} \(not connected to localhost:\d+, .*\) after \d s\n", error)


def agree(monkeypatch: pytest.MonkeyPatch, is_continued: bool, *argv: str):
    """Return the configuration of a rank with this command line, if rank 0 has other values."""
    rank0 = resolve_train_command(
        ["--data.root=/zero", "--data.workers=1", "--data.index=/zero/index", "--device=cuda", "--output=run"]
    )
    monkeypatch.setattr(program, "call_on_main", lambda function: (rank0.config, is_continued))
    return program.synchronize_config(resolve_train_command(["--output=run", *argv]))


def test_a_rank_keeps_the_options_of_its_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    own = ("--data.root=/one", "--data.workers=3", "--data.index=off", "--device=cpu")
    config = agree(monkeypatch, False, *own, "--seed=9")
    assert (config.data.root, config.data.workers, config.data.index) == ("/one", 3, "off")
    assert (config.device, config.seed) == ("cpu", 0)
    config = agree(monkeypatch, True, "--data.root=/one")
    assert (config.data.root, config.data.workers, config.data.index) == ("/one", 1, "/zero/index")
    assert config.device == "cuda"
    assert agree(monkeypatch, True, "--data.index=/one/index").data.index == "/one/index"


def test_options_of_initial_weights_and_of_the_default_output_are_not_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """A continued run has the stored model on rank 0, and the default output depends on data.root."""
    monkeypatch.chdir(tmp_path)
    given = []
    monkeypatch.setattr(program.consistency, "check_options", given.append)
    command = resolve_train_command(["--data.root=/one", "--model.pool=cls"])
    program.synchronize_config(command)
    program.synchronize_config(
        replace(command, origins={**command.origins, "model.window": file_origin(STORED)})
    )
    program.synchronize_config(resolve_train_command(["--output=run"]))
    assert given[0].assigned == {"data.root": "/one", "model.pool": "cls"}
    assert given[0].values["schedule.lr"] == command.config.schedule.lr
    assert set(given[0].values) - set(given[1].values) == {"model.window"}
    assert "output" not in given[0].values
    assert given[2].values["output"] == "run"


def test_each_difference_is_one_line(capsys: pytest.CaptureFixture[str]):
    def fail() -> None:
        raise InconsistentRanksError(["a: 1 differs", "b: 2\ndiffers"])

    with pytest.raises(SystemExit) as caught:
        run_program(fail)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: a: 1 differs\nerror: b: 2 differs\n"


@pytest.mark.parametrize("has_printed", [False, True])
def test_an_error_is_shared_and_not_printed_by_every_restart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], has_printed: bool
):
    def fail() -> None:
        raise UserError("lr", "wrong")

    reported = []
    variables = {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
        "LOCAL_WORLD_SIZE": "2",
    }
    variables |= {
        "TORCHELASTIC_RUN_ID": "x",
        "TORCHELASTIC_MAX_RESTARTS": "3",
        "TORCHELASTIC_RESTART_COUNT": "1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "_is_rendezvous_complete", False)
    monkeypatch.setattr(rendezvous, "report_failure", lambda *values: reported.append(values))
    monkeypatch.setattr(rendezvous, "is_repeated_failure", lambda line: has_printed)
    with pytest.raises(SystemExit) as caught:
        run_program(fail)
    assert caught.value.code == 2
    assert capsys.readouterr().err == ("" if has_printed else "error: lr: wrong\n")
    assert reported == [("error: lr: wrong", 2)]
