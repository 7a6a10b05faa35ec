"""Weights files: selection of file and weights, supported formats, and refused files."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vil.checkpoints.checkpoint_files import file_digest, step_file, write_digest
from vil.checkpoints.open import find_checkpoint, open_weights
from vil.checkpoints.safetensors_file import write_safetensors
from vil.checkpoints.training_state import select_weights
from vil.checkpoints.weights import Weights, stored_model_config
from vil.config import ModelConfig, StageConfig
from vil.errors import UserError
from vil.models.zoo import model_from_config

PARITY = Path(__file__).parent / "fixtures" / "parity"
MODEL = ModelConfig(name="vil", image_size=32, num_classes=3, stages=[StageConfig(dim=8, heads=2)])
TRANSFORM = {"crop_pct": 0.9, "interpolation": "bilinear", "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]}


def state(best: str | None = "ema", has_ema: bool = True) -> dict:
    return {
        "model": {"w": torch.tensor(1.0)},
        "ema": {"w": torch.tensor(2.0)} if has_ema else None,
        "best": best and {"top1": 90.0, "weights": best, "epoch": 3},
    }


def run_state(**changes) -> dict:
    config = {"model": dataclasses.asdict(MODEL), "data": {"source": "digits", **TRANSFORM}}
    return {**state(), "config": config, "class_names": ["a", "b", "c"], **changes}


def test_files_of_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (8, 9, 10):
        path = step_file(tmp_path, step)
        path.write_bytes(b"weights")
        write_digest(path, file_digest(path))
    step_file(tmp_path, 10).write_bytes(b"damage")
    assert find_checkpoint(str(tmp_path), "last") == step_file(tmp_path, 9)
    assert find_checkpoint(str(step_file(tmp_path, 8)), "best") == step_file(tmp_path, 8)
    with pytest.raises(
        UserError, match=r"step_00000010\.pt: damaged: does not match its digest in step_00000010\.pt\.sha256"
    ):
        find_checkpoint(str(step_file(tmp_path, 10)), "best")
    with pytest.raises(UserError, match=r"holds no checkpoints/best\.pt"):
        find_checkpoint(str(tmp_path), "best")
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        find_checkpoint(str(tmp_path / "nowhere"), "best")


@pytest.mark.parametrize(
    ("best", "asked", "value", "kind"),
    [
        ("ema", "auto", 2, "ema"),
        ("raw", "auto", 1, "raw"),
        (None, "auto", 1, "raw"),
        ("ema", "raw", 1, "raw"),
        ("raw", "ema", 2, "ema"),
    ],
)
def test_choice_of_weights(best: str | None, asked: str, value: float, kind: str) -> None:
    weights, found = select_weights(state(best), asked)
    assert (weights["w"].item(), found) == (value, kind)


def test_a_missing_average() -> None:
    """As in the last checkpoint of a run that was continued without ema_decay, whose best was averaged."""
    weights, kind = select_weights(state("ema", has_ema=False), "auto")
    assert (weights["w"].item(), kind) == (1, "raw")
    with pytest.raises(UserError, match="weights: the checkpoint has no ema weights"):
        select_weights(state("raw", has_ema=False), "ema")


def test_a_checkpoint_of_a_run(tmp_path: Path) -> None:
    torch.save(run_state(), tmp_path / "best.pt")
    file = open_weights(tmp_path / "best.pt")
    assert (file.format, file.kind, file.state_dict["w"].item()) == ("run", "ema", 2)
    assert file.model == MODEL
    assert (file.data, file.transform) == ({"source": "digits"}, TRANSFORM)
    assert file.class_names == ("a", "b", "c")
    assert open_weights(tmp_path / "best.pt", weights="raw").state_dict["w"].item() == 1


def test_a_published_checkpoint() -> None:
    file = open_weights(PARITY / "vil_rpe_chunk" / "model_best.pth")  # its names carry module.
    assert (file.format, file.kind, file.model, file.class_names) == ("published", "raw", None, None)
    assert "layer1.0.proj.weight" in file.state_dict
    with pytest.raises(UserError, match="holds raw weights only, not ema"):
        open_weights(PARITY / "vil_rpe_chunk" / "model_best.pth", weights="ema")


def test_safetensors_are_read_back_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.safetensors"
    weights = {"w": torch.randn(3, 2).t(), "n": torch.tensor(3)}
    model = dataclasses.replace(MODEL, init_from="/home/someone/x.pt")
    data = {"source": "folder", "root": "/home/someone"}
    write_safetensors(path, Weights("x.pt", "run", "ema", weights, model, data, TRANSFORM, ("a", "b", "c")))
    file = open_weights(path)
    assert (file.format, file.kind, file.model, file.transform) == ("safetensors", "ema", MODEL, TRANSFORM)
    assert file.class_names == ("a", "b", "c")
    assert all(torch.equal(value, weights[name]) for name, value in file.state_dict.items())
    assert b"someone" not in path.read_bytes()
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"]
    with safe_open(path, "pt") as opened:
        assert json.loads(opened.metadata()["model"])["image_size"] == 32
    with pytest.raises(UserError, match="holds ema weights only, not raw"):
        open_weights(path, weights="raw")


def test_foreign_safetensors_contain_no_model(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "plain.safetensors")
    file = open_weights(tmp_path / "plain.safetensors")
    assert (file.model, file.data, file.transform, file.class_names) == (None, {}, {}, None)


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_weights(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_is_refused_and_not_run(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "x.pt"
    torch.save(run_state(extra=Malicious(victim)), path)
    assert "refused" in refusal(path)
    path.write_bytes(pickle.dumps(Malicious(victim)))
    assert "refused" in refusal(path)
    assert not victim.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"hello\n", "not a checkpoint: neither a zip, a pickle nor safetensors"),
        (b"PK\x03\x04" + bytes(100), "cut off"),
        (b"\x80\x02}q\x00.", "damaged"),
        (bytes(8) + b"{}", "not safetensors"),
        (b"\xff" * 8 + b"{}", "not safetensors"),
    ],
)
def test_files_of_unknown_formats(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    assert message in refusal(path)


def test_truncated_files(tmp_path: Path) -> None:
    torch.save(run_state(), tmp_path / "x.pt")
    save_file({"w": torch.ones(200)}, tmp_path / "x.safetensors")
    for name in ("x.pt", "x.safetensors"):
        whole, path = (tmp_path / name).read_bytes(), tmp_path / f"cut.{name}"
        for length in (1, 9, 30, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            refusal(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema": {"w": torch.tensor(float("nan"))}}, "w holds values that are not finite"),
        ({"ema": {"w": 3}}, "w is not a tensor"),
        ({"ema": {}}, "holds no weights"),
        ({"ema": 3}, "damaged"),
        ({"best": {}}, ""),
        ({"best": 3}, "damaged"),
        ({"class_names": 3}, "damaged"),
        ({"config": {}}, "damaged"),
        ({"config": {"model": {"depth": 3}, "data": {}}}, "stored configuration: model.depth: unknown key"),
        (
            {"config": {"model": {"window": "x"}, "data": {}}},
            "stored configuration: model.window: expected an integer from 1 to 1,000,000 or null, got 'x'",
        ),
        (
            {"config": {"model": {"stages": [{"dim": "x", "heads": 2}]}, "data": {}}},
            "stored configuration: model.stages[0].dim: expected an integer from 1 to 1,000,000, got 'x'",
        ),
        (
            {"config": {"model": {"stages": [{"depth": 2}]}, "data": {}}},
            "stored configuration: model.stages[0].depth: unknown key",
        ),
        ({"config": {"model": 3, "data": {}}}, "stored configuration: model: expected a mapping"),
    ],
)
def test_errors_inside_a_checkpoint(tmp_path: Path, changes: dict, message: str) -> None:
    torch.save(run_state(**changes), tmp_path / "x.pt")
    if changes == {"best": {}}:  # nothing was best yet: the raw weights
        assert open_weights(tmp_path / "x.pt").kind == "raw"
    else:
        assert message in refusal(tmp_path / "x.pt")


ODD = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "compressed": lambda: torch.eye(3).to_sparse_csr(),
    "meta": lambda: torch.empty(3, device="meta"),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "repeated": lambda: torch.ones(1).expand(10**13),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("ignore")  # of PyTorch, about the kinds of tensors that it is about to give up
def test_unsupported_tensors(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.pt"
    for content in (run_state(ema={"w": ODD[kind]()}), {"net": {"w": ODD[kind]()}}):
        torch.save(content, path)
        assert ": w is " in refusal(path) or "w has no values" in refusal(path) or kind == "quantised"


@pytest.mark.parametrize("name", [3, None, (1, 2), 1.5, b"w", "a\nb", "\x1b[2J"])
def test_names_that_are_not_text(tmp_path: Path, name: object) -> None:
    path = tmp_path / "x.pt"
    for content in (run_state(ema={name: torch.ones(1)}), {"net": {name: torch.ones(1)}}):
        torch.save(content, path)
        assert "is not a name of a weight" in refusal(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool])
def test_numbers_of_other_kinds_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save(
        {"net": {"w": torch.ones(2).to(dtype), "p": torch.nn.Parameter(torch.ones(1))}}, tmp_path / "x"
    )
    assert open_weights(tmp_path / "x").state_dict["w"].dtype == dtype


W, EMA = {"a.weight": torch.ones(2, 3)}, {"a.weight": torch.zeros(2, 3)}
COMPANIONS = {
    "args": argparse.Namespace(model="x", out=Path("out"), mixup=[0.8], seed=np.int64(3)),
    "best": np.float64(81.3),
    "history": np.arange(3.0),
    "scores": collections.defaultdict(list, {"top1": [1.0]}),
    "epoch": 3,
    "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}},
}
FOREIGN = {
    "bare": (W, W, None),
    "model": ({"model": W}, W, None),
    "state_dict": ({"state_dict": W, "arch": "vit"}, W, None),
    "timm": ({"state_dict": W, "state_dict_ema": EMA, **COMPANIONS}, W, EMA),
    "DeiT": ({"model": W, "model_ema": EMA, "scaler": {}, **COMPANIONS}, W, EMA),
    "average alone": ({"model_ema": EMA}, EMA, EMA),
    "DistributedDataParallel": ({"model": {f"module.{k}": v for k, v in W.items()}}, W, None),
    "torch.compile": ({f"module._orig_mod.{k}": v for k, v in W.items()}, W, None),
    "OrderedDict": ({"state_dict": collections.OrderedDict(W)}, W, None),
}


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("form", FOREIGN)
def test_checkpoints_of_other_programs(tmp_path: Path, form: str, is_zip: bool) -> None:
    """Only their weights are read: other content is replaced by inert placeholders."""
    content, raw, averaged = FOREIGN[form]
    path = tmp_path / "x.pth"
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    found = open_weights(path)
    assert (found.format, found.model, found.class_names) == ("foreign", None, None)
    assert found.state_dict.keys() == raw.keys()
    assert torch.equal(found.state_dict["a.weight"], raw["a.weight"])
    if averaged is None:
        with pytest.raises(UserError, match="holds raw weights only, not ema"):
            open_weights(path, weights="ema")
    else:
        found = open_weights(path, weights="ema")
        assert found.kind == "ema"
        assert torch.equal(found.state_dict["a.weight"], averaged["a.weight"])


class CfgNode(dict):
    """Stand-in for yacs.config.CfgNode, as Swin's checkpoints hold it."""


def test_classes_stored_with_weights_are_not_imported(tmp_path: Path) -> None:
    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module = types.ModuleType("yacs.config")
    module.CfgNode = CfgNode
    node = CfgNode(A=CfgNode(B=1))
    node.frozen = True
    path = tmp_path / "x.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        torch.save({"model": W, "config": node}, path)
    assert "yacs.config" not in sys.modules
    assert open_weights(path).state_dict.keys() == W.keys()
    assert "yacs.config" not in sys.modules


def test_dictionaries_without_weights(tmp_path: Path) -> None:
    for content in ([1, 2], {"state_dict": {}}, {"weights": {"w": torch.ones(1)}}, {"model": 3}):
        torch.save(content, tmp_path / "x.pt")
        assert "not a checkpoint" in refusal(tmp_path / "x.pt")
    torch.save({"model": {"w": 3, "v": torch.ones(1)}}, tmp_path / "x.pt")
    assert "w is not a tensor" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "metadata",
    [{"model": "{"}, {"model": '{"depth": 3}'}, {"data": '{"root": "/"}'}, {"data": "3"},
     {"class_names": "3"}, {"model": '{"stages": [{"dim": "x"}]}'}, {"model": "[" * 100000}],
)  # fmt: skip
def test_invalid_metadata(tmp_path: Path, metadata: dict[str, str]) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "x.safetensors", metadata)
    refusal(tmp_path / "x.safetensors")


def test_every_option_of_a_model_is_kept() -> None:
    rich = dataclasses.replace(
        MODEL, blocks=(2,), attention=["full"], timm_options={"depths": [1]}, drop_path=0.1
    )
    assert stored_model_config(dataclasses.asdict(rich)) == rich
    assert stored_model_config(json.loads(json.dumps(dataclasses.asdict(rich)))) == rich


def test_more_names_than_rows_of_the_head_are_refused(tmp_path: Path) -> None:
    state_dict = model_from_config(MODEL).state_dict()
    for names, message in (
        (("a", "b", "c", "d"), "damaged: it names 4 classes, and its head has 3 rows"),
        (("a", "b", "c"), None),
        (("a", "b"), None),  # further rows have no class
    ):
        path = tmp_path / "x.safetensors"
        write_safetensors(path, Weights("x", "run", "raw", state_dict, MODEL, class_names=names))
        if message is None:
            assert open_weights(path).class_names == names
        else:
            with pytest.raises(UserError, match=f"^{path}: {message}$"):
                open_weights(path)


def test_an_empty_list_of_class_names(tmp_path: Path) -> None:
    """It names no class; in a checkpoint of train.py it is damage."""
    torch.save(run_state(class_names=[]), tmp_path / "x.pt")
    with pytest.raises(UserError, match="damaged: no model or class names"):
        open_weights(tmp_path / "x.pt")
    state_dict = model_from_config(MODEL).state_dict()
    write_safetensors(
        tmp_path / "x.safetensors", Weights("x", "run", "raw", state_dict, MODEL, class_names=())
    )
    assert open_weights(tmp_path / "x.safetensors").class_names is None
