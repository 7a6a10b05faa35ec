import os
import pickle
import random
import resource
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from vil.checkpoints import checkpoint_files
from vil.checkpoints.training_state import (
    copy_training_state,
    library_versions,
    read_training_state,
    write_training_state,
)
from vil.errors import UserError

CONFIG = {"model": {"name": None}, "schedule": {"betas": (0.9, 0.999)}, "data": {}}


def make_state(value: float = 1.0) -> dict:
    return {
        "model": {"weight": torch.full((1000,), value)},
        "ema": None,
        "optimizer": {"state": {}, "param_groups": []},
        "scaler": {},
        "step": 7,
        "finished_step": 7,
        "watched": {"skipped": 0, "skipped_in_a_row": 0, "losses": [0.5]},
        "epoch": 1,
        "best": {"top1": 50.0, "weights": "raw", "epoch": 1},
        "class_names": ["cat", "dog"],
        "config": CONFIG,
        "versions": library_versions(),
    }


def test_round_trip(tmp_path: Path):
    write_training_state(tmp_path / "last.pt", make_state(2.0))
    state = read_training_state(tmp_path / "last.pt")
    assert torch.equal(state["model"]["weight"], torch.full((1000,), 2.0))
    assert state["config"] == CONFIG
    assert state["versions"]["torch"] == str(torch.__version__)
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "last.pt.sha256"}


@pytest.mark.parametrize("failing", ["torch.save", "os.fsync", "os.replace"])
def test_a_failure_while_saving_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
):
    path = tmp_path / "last.pt"
    write_training_state(path, make_state(1.0))

    def fail(*arguments: object) -> None:
        if failing == "torch.save":
            arguments[1].write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(OSError, match="No space left"):
        write_training_state(path, make_state(2.0))
    assert read_training_state(path)["model"]["weight"][0] == 1.0
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "last.pt.sha256"}


def test_a_disk_that_fills_up_while_saving_keeps_the_old_file(tmp_path: Path):
    """PyTorch's writer turns the error of the file into another one."""
    path = tmp_path / "last.pt"
    write_training_state(path, make_state(1.0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_training_state(path, {**make_state(2.0), "model": {"weight": torch.zeros(100_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_training_state(path)["model"]["weight"][0] == 1.0
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "last.pt.sha256"}


def test_a_copied_checkpoint_keeps_its_content(tmp_path: Path):
    best, last = tmp_path / "best.pt", tmp_path / "last.pt"
    write_training_state(last, make_state(1.0))
    write_training_state(best, make_state(2.0))
    for _ in range(2):
        copy_training_state(best, last)
        assert read_training_state(last)["model"]["weight"][0] == 2.0
    write_training_state(last, make_state(3.0))
    assert read_training_state(best)["model"]["weight"][0] == 2.0


def test_the_digest_is_one_that_the_usual_tool_reads(tmp_path: Path):
    write_training_state(tmp_path / "last.pt", make_state())
    checked = subprocess.run(
        ["sha256sum", "--check", "last.pt.sha256"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert checked.stdout == "last.pt: OK\n"


class _KilledError(BaseException):
    pass


@pytest.mark.parametrize("is_new", [True, False])
def test_a_kill_anywhere_in_a_save_keeps_an_intact_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_new: bool
):
    """The process ends before its first, second, third … call that changes the disk."""
    path, calls, end = tmp_path / "best.pt", 0, 0

    def dying(original):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == end:
                raise _KilledError
            return original(*arguments, **options)

        return call

    for module, name in ((os, "replace"), (os, "fsync"), (torch, "save"), (Path, "open")):
        monkeypatch.setattr(module, name, dying(getattr(module, name)))
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: None)  # who is killed tidies nothing
    survived = []
    for moment in range(1, 40):
        for file in tmp_path.iterdir():
            os.unlink(file)
        end = 0
        if not is_new:
            write_training_state(path, make_state(1.0))
        calls, end = 0, moment
        try:
            write_training_state(path, make_state(2.0))
        except _KilledError:
            survived.append(moment)
        end = 0
        if moment not in survived:
            break
        if path.exists():
            checkpoint_files.check_digest(path, required=True)
            assert read_training_state(path)["model"]["weight"][0] in ((2.0,) if is_new else (1.0, 2.0))
        assert path.exists() or is_new
    assert read_training_state(path)["model"]["weight"][0] == 2.0
    assert len(survived) > 5


def test_every_truncation_and_flipped_bit_is_detected(tmp_path: Path):
    """200 cuts and 200 flips: each loads the same to the bit, or is refused with one line."""
    path = tmp_path / "last.pt"
    write_training_state(path, make_state())
    whole, rng = path.read_bytes(), random.Random(0)
    damaged = [whole[: rng.randrange(len(whole))] for _ in range(200)]
    for _ in range(200):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(
            UserError, match=r"last\.pt: damaged: does not match its digest in last\.pt\.sha256$"
        ):
            read_training_state(path)
    path.write_bytes(whole)
    digest = checkpoint_files.digest_file(path)
    text = digest.read_bytes()
    for position in range(len(text)):
        digest.write_bytes(text[:position] + bytes([text[position] ^ 4]) + text[position + 1 :])
        with suppress(UserError):  # a flip in the name of the file does no harm
            assert read_training_state(path)["model"]["weight"][0] == 1.0


MALFORMED = [
    ("model", None),
    ("model", {1: torch.zeros(1)}),
    ("model", {"weight": "text"}),
    ("ema", 3),
    ("optimizer", None),
    ("scaler", {"scale": None}),
    ("step", -1),
    ("step", 1.0),
    ("step", True),
    ("epoch", None),
    ("order_version", 3),
    ("order_version", True),
    ("best", [97.0]),
    ("best", {"top1": 97.0, "epoch": 1}),
    ("best", {"weights": "raw", "epoch": 1}),
    ("best", {"top1": None, "weights": "raw", "epoch": 1}),
    ("best", {"top1": 97.0, "weights": "mean", "epoch": 1}),
    ("config", "text"),
    ("config", {}),
    ("config", {**CONFIG, "model": []}),
    ("config", {"model": torch.zeros(1)}),
    ("class_names", None),
    ("class_names", ["cat", 3]),
    ("versions", None),
]


@pytest.mark.parametrize(("key", "value"), MALFORMED)
def test_a_value_of_another_type_is_named(tmp_path: Path, key: str, value: object):
    write_training_state(tmp_path / "last.pt", make_state() | {key: value})
    with pytest.raises(UserError) as caught:
        read_training_state(tmp_path / "last.pt")
    assert str(caught.value).startswith(f"{tmp_path}/last.pt: damaged: {key} is not ")
    assert "\n" not in str(caught.value)


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_refused(tmp_path: Path):
    torch.save(make_state() | {"model": _Evil(tmp_path / "owned")}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="refused"):
        read_training_state(tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(_Evil(tmp_path / "owned")))
    with pytest.raises(UserError, match="refused"):
        read_training_state(tmp_path / "plain.pt")
    assert not (tmp_path / "owned").exists()


def test_unusable_files(tmp_path: Path):
    write_training_state(tmp_path / "whole.pt", make_state())
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"net": {}}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    messages = {
        "cut": "cut off",
        "empty": "the file is empty",
        "text": "not a checkpoint",
        "other": "lacks model",
        "list": "lacks model",
        "missing": "no such file",
    }
    for name, expected in messages.items():
        with pytest.raises(UserError) as caught:
            read_training_state(tmp_path / f"{name}.pt")
        assert expected in str(caught.value), name
        assert f"{name}.pt" in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_training_state(tmp_path)
