import pytest
import torch
from torch import nn

from vil.errors import UserError
from vil.runtime import consistency, distributed
from vil.runtime.consistency import InconsistentRanksError, RankOptions


def gather(monkeypatch: pytest.MonkeyPatch, *others: object) -> None:
    """Let this process be rank 0, on host a, with `others` as the values of further ranks on host b."""
    monkeypatch.setattr(consistency, "is_distributed", lambda: True)
    monkeypatch.setattr(consistency.socket, "gethostname", lambda: "a")
    monkeypatch.setattr(
        consistency, "all_gather_object", lambda local: [local, *(("b", value) for value in others)]
    )


def test_other_code_is_refused(monkeypatch: pytest.MonkeyPatch):
    local = {"vil": f"1.0, SHA-256 {consistency.code_digest()[:12]}", **consistency.dependency_versions()}
    gather(monkeypatch, local)
    assert consistency.check_software("1.0") == []
    gather(monkeypatch, local, local | {"vil": "1.0, SHA-256 0"})
    with pytest.raises(InconsistentRanksError) as caught:
        consistency.check_software("1.0")
    expected = f"rank 2 (b) runs different vil code (1.0, SHA-256 0) than rank 0 (a) ({local['vil']})"
    assert str(caught.value) == expected


def test_another_torch_is_refused_and_other_libraries_are_reported(monkeypatch: pytest.MonkeyPatch):
    versions = {"torch": "2.1+cpu"} | dict.fromkeys(("python", "torchvision", "timm", "numpy", "pillow"), "1")
    monkeypatch.setattr(consistency, "dependency_versions", lambda: versions)
    local = {"vil": f"1.0, SHA-256 {consistency.code_digest()[:12]}", **versions}
    gather(monkeypatch, local | {"torch": "2.2"})
    with pytest.raises(InconsistentRanksError) as caught:
        consistency.check_software("1.0")
    assert str(caught.value) == "rank 1 (b) has torch 2.2, rank 0 (a) has torch 2.1+cpu"
    changed = local | {"torch": "2.1+cu130", "pillow": "2"}
    gather(monkeypatch, changed, changed)
    assert consistency.check_software("1.0") == [
        "warning: torch 2.1+cu130 on b, 2.1+cpu on a: not reproducible bit by bit",
        "warning: pillow 2 on b, 1 on a: not reproducible bit by bit",
    ]


def test_the_digest_depends_on_names_and_content(tmp_path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "vil").mkdir()
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(consistency, "_ROOT", tmp_path)
    digests = set()
    for name, content in (("a", "x"), ("a", "y"), ("b", "y")):
        path = tmp_path / "vil" / f"{name}.py"
        path.write_text(content)
        consistency.code_digest.cache_clear()
        digests.add(consistency.code_digest())
    consistency.code_digest.cache_clear()
    assert len(digests) == 3


def test_options_that_differ_are_one_line_each(monkeypatch: pytest.MonkeyPatch):
    local = RankOptions({"schedule.lr": 0.1, "seed": 0, "data.root": "/x", "device": "cpu"}, {}, False)
    machine = RankOptions(local.values | {"data.root": "/y", "data.workers": 2, "device": "cuda"}, {}, False)
    gather(monkeypatch, machine)
    consistency.check_options(local)
    other = RankOptions({"schedule.lr": 0.2, "output": "runs/x"}, {}, False)
    gather(monkeypatch, other, other)
    with pytest.raises(InconsistentRanksError) as caught:
        consistency.check_options(local)
    assert caught.value.lines == [
        "schedule.lr: 0.2 of rank 1 (b) differs from 0.1 of rank 0 (a)",
        "seed: no value of rank 1 (b) differs from 0 of rank 0 (a)",
        "output: runs/x of rank 1 (b) differs from no value of rank 0 (a)",
    ]
    assert str(caught.value) == caught.value.lines[0]


def test_without_the_folder_of_the_run_the_command_lines_are_compared(monkeypatch: pytest.MonkeyPatch):
    assigned = {"output": "runs/x", "schedule.epochs": 9}
    local = RankOptions({"schedule.lr": 0.1, **assigned}, assigned, True)
    gather(monkeypatch, RankOptions({"schedule.lr": 0.2, **assigned}, assigned, False))
    consistency.check_options(local)
    gather(monkeypatch, RankOptions({**assigned, "schedule.lr": 0.1}, {"output": "runs/x"}, False))
    with pytest.raises(InconsistentRanksError) as caught:
        consistency.check_options(local)
    assert caught.value.lines == ["schedule.epochs: no value of rank 1 (b) differs from 9 of rank 0 (a)"]


def test_other_images_are_refused(monkeypatch: pytest.MonkeyPatch):
    local = {"training images": "1200", "class names": "x"}
    gather(monkeypatch, local, {"training images": "1200"})  # the second rank of a machine computes no digest
    consistency.check_data("data.root", lambda: local)
    for change, message in (
        ({"training images": "1199"}, "rank 1 (b) has 1199 training images, rank 0 (a) has 1200"),
        ({"class names": "y"}, "rank 1 (b) has different class names than rank 0 (a)"),
    ):
        gather(monkeypatch, local | change)
        with pytest.raises(UserError) as caught:
            consistency.check_data("data.root", lambda: local)
        assert str(caught.value) == f"data.root: {message}"
    monkeypatch.setattr(consistency, "is_distributed", lambda: False)
    consistency.check_data("data.root", lambda: pytest.fail("computed for one process"))


def test_an_error_of_one_rank_is_raised_on_all(monkeypatch: pytest.MonkeyPatch):
    def fail() -> None:
        raise UserError("data.root", "gone", "x.yaml")

    problem = ("data.root", "gone", "x.yaml")
    with pytest.raises(UserError, match=r"^x.yaml: data.root: gone$"):
        distributed.call_on_all(fail)
    monkeypatch.setattr(distributed, "all_gather_object", lambda local: [("a", None), ("b", problem)])
    for function in (fail, lambda: 1):
        with pytest.raises(UserError) as caught:
            distributed.call_on_all(function)
        assert str(caught.value) == "x.yaml: data.root: rank 1 (b): gone"
    monkeypatch.setattr(distributed, "all_gather_object", lambda local: [("a", None), ("b", None)])
    assert distributed.call_on_all(lambda: 7) == 7


def test_other_weights_are_refused(monkeypatch: pytest.MonkeyPatch):
    model = nn.BatchNorm1d(2)
    equal = {"weights": consistency.model_digest(model)}
    gather(monkeypatch, equal)
    consistency.check_weights("checkpoint", model)
    model.running_mean += 1
    with pytest.raises(UserError) as refused:
        consistency.check_weights("checkpoint", model)
    assert str(refused.value) == "checkpoint: rank 1 (b) has different weights than rank 0 (a)"


def test_the_digest_of_weights_depends_on_names_types_and_shapes():
    def digest(name: str, value: torch.Tensor) -> str:
        module = nn.Module()
        module.register_buffer(name, value)
        return consistency.model_digest(module)

    zeros = torch.zeros(2, 3)
    others = (digest("b", zeros), digest("a", zeros.T), digest("a", zeros.int()), digest("a", zeros + 1))
    assert len({digest("a", zeros), *others}) == 5
    assert digest("a", zeros) == digest("a", zeros.clone())
