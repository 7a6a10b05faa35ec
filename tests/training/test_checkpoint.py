import pickle
from pathlib import Path

import pytest
import torch

from vil.config import ConfigError
from vil.training import checkpoint


def make_state(value: float = 1.0) -> dict:
    return {
        "model": {"weight": torch.full((1000,), value)},
        "ema": None,
        "optimizer": {"state": {}, "param_groups": []},
        "scaler": {},
        "step": 7,
        "epoch": 1,
        "best": {"top1": 50.0, "weights": "raw", "epoch": 1},
        "class_names": ["cat", "dog"],
        "config": {"betas": (0.9, 0.999), "name": None},
        "versions": checkpoint.versions(),
    }


def test_round_trip(tmp_path: Path):
    checkpoint.save(tmp_path / "last.pt", make_state(2.0))
    state = checkpoint.load(tmp_path / "last.pt")
    assert torch.equal(state["model"]["weight"], torch.full((1000,), 2.0))
    assert state["config"] == {"betas": (0.9, 0.999), "name": None}
    assert state["versions"]["torch"] == str(torch.__version__)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("failing", ["torch.save", "os.fsync", "os.replace"])
def test_a_failure_while_saving_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
):
    path = tmp_path / "last.pt"
    checkpoint.save(path, make_state(1.0))

    def fail(*arguments: object) -> None:
        if failing == "torch.save":
            arguments[1].write(b"half of it")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    module, name = failing.split(".")
    monkeypatch.setattr(getattr(checkpoint, module), name, fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, make_state(2.0))
    assert checkpoint.load(path)["model"]["weight"][0] == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("has_links", [True, False])
def test_a_linked_checkpoint_keeps_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
):
    def fail(*arguments: object) -> None:
        raise OSError(95, "Operation not supported")

    if not has_links:
        monkeypatch.setattr(checkpoint.os, "link", fail)
    best, last = tmp_path / "best.pt", tmp_path / "last.pt"
    checkpoint.save(last, make_state(1.0))
    checkpoint.save(best, make_state(2.0))
    for _ in range(2):
        checkpoint.link(best, last)
        assert checkpoint.load(last)["model"]["weight"][0] == 2.0
    assert best.samefile(last) == has_links
    checkpoint.save(last, make_state(3.0))
    assert checkpoint.load(best)["model"]["weight"][0] == 2.0
    assert {path.name for path in tmp_path.iterdir()} == {"best.pt", "last.pt"}


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
    ("best", [97.0]),
    ("best", {"top1": 97.0, "epoch": 1}),
    ("best", {"top1": None, "weights": "raw", "epoch": 1}),
    ("best", {"top1": 97.0, "weights": "mean", "epoch": 1}),
    ("config", "text"),
    ("config", {"model": torch.zeros(1)}),
    ("class_names", None),
    ("class_names", ["cat", 3]),
    ("versions", None),
]


@pytest.mark.parametrize(("key", "value"), MALFORMED)
def test_a_value_of_another_type_is_named(tmp_path: Path, key: str, value: object):
    checkpoint.save(tmp_path / "last.pt", make_state() | {key: value})
    with pytest.raises(ConfigError) as caught:
        checkpoint.load(tmp_path / "last.pt")
    assert str(caught.value).startswith(f"checkpoint: {tmp_path}/last.pt: damaged: {key} is not ")
    assert "\n" not in str(caught.value)


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_refused(tmp_path: Path):
    torch.save(make_state() | {"model": _Evil(tmp_path / "owned")}, tmp_path / "evil.pt")
    with pytest.raises(ConfigError, match="refused"):
        checkpoint.load(tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(_Evil(tmp_path / "owned")))
    with pytest.raises(ConfigError, match="refused"):
        checkpoint.load(tmp_path / "plain.pt")
    assert not (tmp_path / "owned").exists()


def test_unusable_files(tmp_path: Path):
    checkpoint.save(tmp_path / "whole.pt", make_state())
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"net": {}}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    words = {
        "cut": "cut off",
        "empty": "the file is empty",
        "text": "not a checkpoint",
        "other": "lacks model",
        "list": "lacks model",
        "missing": "no such file",
    }
    for name, expected in words.items():
        with pytest.raises(ConfigError) as caught:
            checkpoint.load(tmp_path / f"{name}.pt")
        assert expected in str(caught.value), name
        assert f"{name}.pt" in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        checkpoint.load(tmp_path)
