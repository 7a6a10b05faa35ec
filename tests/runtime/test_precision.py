import pytest
import torch

from vil.errors import UserError
from vil.runtime.precision import autocast, choose_precision, grad_scaler

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_default_on_a_cpu():
    assert choose_precision(None, CPU) == "float32"
    assert [choose_precision(p, CPU) for p in ("bfloat16", "float16")] == ["bfloat16", "float16"]


def test_convolutions_are_float32(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    choose_precision("float32", CPU)
    assert not torch.backends.cudnn.allow_tf32


def test_default_on_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert choose_precision(None, GPU) == "bfloat16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert choose_precision(None, GPU) == "float32"
    assert choose_precision("float16", GPU) == "float16"


def test_a_gpu_without_bfloat16(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(UserError, match="precision: Tesla T4 does not compute in bfloat16; use float16"):
        choose_precision("bfloat16", GPU)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_autocast_and_scaler(precision):
    layer = torch.nn.Linear(4, 4)
    with autocast(precision, CPU):
        assert layer(torch.randn(2, 4)).dtype == getattr(torch, precision)
    assert grad_scaler(precision, CPU).is_enabled() == (precision == "float16")
