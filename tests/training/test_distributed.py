import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import forked, several_ranks
from helpers.run_files import is_equal, records
from helpers.tiny_run import CPU, load_last

from vil.errors import UserError
from vil.runtime import distributed

HERE = Path(__file__).parent

pytestmark = pytest.mark.xdist_group("distributed")  # one worker, so that the runs are shared


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The folders of the same runs with one process and with two."""
    folders = {size: tmp_path_factory.mktemp(f"world{size}") for size in (1, 2)}
    for folder in folders.values():
        several_ranks.train(folder / "moved", CPU, several_ranks.TinyModel(), max_steps=7)
    torchrun(2, folders[2], "all")
    several_ranks.main(folders[1])
    return folders


def torchrun(ranks: int, folder: Path, what: str) -> None:
    environment = os.environ | {
        "PYTHONPATH": f"{HERE.parents[1]}{os.pathsep}{HERE.parent}",
        "OMP_NUM_THREADS": "1",
        "PYTHON_EXEC": forked.python(),
    }
    program = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [
        forked.python(),
        *program,
        str(HERE.parent / "helpers" / "several_ranks.py"),
        str(folder),
        what,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr


def found(folder: Path, rank: int) -> dict:
    return json.loads((folder / f"rank{rank}.json").read_text())


@pytest.mark.parametrize("run", [*several_ranks.RUNS, "head", "token"])
def test_two_ranks_train_as_one(worlds: dict[int, Path], run: str):
    one, two = (records(worlds[size] / run, "train") for size in (1, 2))
    assert len(one) == len(two) == 15
    for key in ("loss", "grad_norm", "lr"):
        assert [r[key] for r in two] == pytest.approx([r[key] for r in one], abs=1e-4), key
    weights = [load_last(worlds[size] / run)["model"] for size in (1, 2)]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-4) for name in weights[0])
    assert not any(name.startswith("module.") for name in weights[1])


def test_two_ranks_count_each_image_once(worlds: dict[int, Path]):
    one, two = (records(worlds[size] / "plain", "validation") for size in (1, 2))
    assert [(r["images"], r["top1"]) for r in two] == [(r["images"], r["top1"]) for r in one]
    assert two[-1]["images"] == 30


def test_a_parameter_without_a_gradient_does_not_stop_two_ranks(worlds: dict[int, Path]):
    one, two = (records(worlds[size] / "idle", "train") for size in (1, 2))
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], abs=1e-4)


def test_running_statistics_are_those_of_all_ranks(worlds: dict[int, Path]):
    first, second = (found(worlds[2], rank)["running_mean"] for rank in (0, 1))
    assert first == second
    assert first == pytest.approx(found(worlds[1], 0)["running_mean"], abs=0.1)
    saved = load_last(worlds[2] / "norm")
    assert saved["model"]["norm.running_mean"].tolist() == first


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(worlds: dict[int, Path]):
    """Rank 1's loss is NaN in the second step, its gradient in the fourth."""
    faulty = records(worlds[2] / "faulty", "train")
    assert [r["step"] for r in faulty if r["grad_norm"] is None] == [2, 4]
    assert faulty[-1]["skipped_steps"] == 2
    assert found(worlds[2], 0)["faulty"] == found(worlds[2], 1)["faulty"]
    assert all(abs(value) < 100 for value in found(worlds[2], 0)["faulty"])


def test_two_ranks_continue_bit_identically(worlds: dict[int, Path]):
    """Also the statistics of batch norm, of which a checkpoint has one set."""
    for size in (1, 2):
        full, continued = (load_last(worlds[size] / name) for name in ("full", "continued"))
        for key in ("model", "ema"):
            assert is_equal(full[key], continued[key])


def test_three_ranks_continue_bit_identically(tmp_path: Path):
    """With three ranks the order of summation changes the last digits."""
    torchrun(3, tmp_path, "wide")
    full, continued = (load_last(tmp_path / name) for name in ("full", "continued"))
    for key in ("model", "ema"):
        assert is_equal(full[key], continued[key])
    lines = (
        [(r["loss"], r["grad_norm"]) for r in records(tmp_path / n, "train")] for n in ("full", "continued")
    )
    assert next(lines) == next(lines)


def test_a_run_continues_with_another_number_of_ranks(worlds: dict[int, Path]):
    """From one to two and from two to one: the same global batches in the same order, the same losses within
    rounding."""
    several_ranks.train(worlds[2] / "short", CPU, several_ranks.TinyModel())
    full = records(worlds[1] / "plain", "train")
    for folder in (worlds[2] / "moved", worlds[2] / "short"):
        moved = records(folder, "train")
        assert [r["step"] for r in moved] == [r["step"] for r in full]
        assert [r["loss"] for r in moved] == pytest.approx([r["loss"] for r in full], abs=1e-4)
        assert [r["loss"] for r in moved] != [r["loss"] for r in full]


def test_ranks_save_and_stop_after_the_same_step(worlds: dict[int, Path]):
    """Rank 1 alone receives SIGUSR1 in the fourth step and SIGTERM in the eighth; all act one step later."""
    ended = [found(worlds[2], rank)["stop"] for rank in (0, 1)]
    assert ended[0]["signum"] == ended[1]["signum"] == signal.SIGTERM
    assert (
        ended[0]["reason"]
        == ended[1]["reason"]
        == ("SIGTERM: saved after step 9; run the same command to continue")
    )
    assert (ended[0]["saved"], ended[1]["saved"]) == ([5, 5, 9], [])
    assert load_last(worlds[2] / "stop")["step"] == 9


def test_a_rank_that_ends_an_evaluation_ends_it_for_all(worlds: dict[int, Path]):
    assert [found(worlds[2], rank)["evaluation"] for rank in (0, 1)] == ["ended", "ended"]


def test_gradients_are_reduced_once_per_step(worlds: dict[int, Path]):
    """And once before the first step: see `distributed._rebuild_buckets`."""
    parameters = sum(p.numel() for p in several_ranks.TinyModel().parameters())
    assert [found(worlds[2], rank)["reductions"] for rank in (0, 1)] == [[parameters] * 2] * 2


def test_gradients_of_the_head_alone_are_reduced(worlds: dict[int, Path]):
    head = 8 * 4 + 4
    assert [found(worlds[2], rank)["head_reductions"] for rank in (0, 1)] == [[head] * 2] * 2


def test_weighted_losses_do_not_depend_on_micro_batches(worlds: dict[int, Path]):
    """They are normalized by the weights of the global batch."""
    for size in (1, 2):
        one, four = (records(worlds[size] / name, "train") for name in ("weighted", "weighted_parts"))
        assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in four], abs=1e-4)


def test_collectives(worlds: dict[int, Path]):
    for rank in (0, 1):
        result = found(worlds[2], rank)
        assert (result["rank"], result["world_size"], result["sum"]) == (rank, 2, 3)
        assert result["object"] == {"from": 0}
        assert result["main"] == 0
        assert result["error"] == "data.root: there is nothing"
    assert found(worlds[2], 0)["failure"] == "OSError: [Errno 28] No space left on device"
    assert found(worlds[2], 1)["failure"].startswith("LostRankError: rank 0 failed: OSError(28, ")


def test_one_process_needs_no_group():
    with distributed.start("cpu") as process:
        assert (process.rank, process.world_size, process.is_main) == (0, 1, True)
        assert process.device == torch.device("cpu")
        assert not distributed.is_distributed()
    assert distributed.all_reduce_sum(torch.tensor(3)).item() == 3
    assert distributed.broadcast_object("same") == "same"
    assert distributed.call_on_main(lambda: 4) == 4
    with pytest.raises(UserError, match=r"data\.root: there is nothing"):
        distributed.call_on_main(several_ranks.fail_on_main)


def test_unknown_devices():
    for device in ("gpu", "meta", "tpu:0"):
        with pytest.raises(UserError, match="device: expected auto, cpu or cuda"), distributed.start(device):
            pass


def test_missing_devices(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="no GPU on this machine"), distributed.start("cuda"):
        pass
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="there is no cuda:5"), distributed.start("cuda:5"):
        pass
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="4 processes on this machine"), distributed.start("cuda"):
        pass
    # Each process of srun --gpus-per-task=1 sees one GPU.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "1")
    assert distributed._choose_device("cuda", 3, 4) == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert distributed._choose_device("cuda", 3, 4) == torch.device("cuda", 3)


def test_only_errors_of_a_connection_are_those_of_a_lost_rank(monkeypatch: pytest.MonkeyPatch):
    error = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:41234")
    assert distributed.lost_rank_reason(error) is None  # of a run of one process
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    reason = distributed.lost_rank_reason(error)
    assert reason == "lost connection to another rank: Connection closed by peer [10.0.0.2]:41234"
    assert distributed.lost_rank_reason(RuntimeError("The size of tensor a (3) must match")) is None
    assert distributed.lost_rank_reason(ValueError("gloo")) is None
