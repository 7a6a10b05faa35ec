"""torch.compile in a run: its options, and runs that continue bit for bit."""

from pathlib import Path

import pytest
import torch
from helpers.run_files import is_equal
from helpers.tiny_run import CLASSES, CPU, SIZE, STEPS, TinyModel, load_last, make_config, run

from vil.config import EvalConfig, ModelConfig, StageConfig, TrainConfig
from vil.errors import UserError
from vil.evaluation.report import evaluate_model
from vil.models.multiscale_vit import MultiScaleViT
from vil.training.compilation import check_compile_options

CUDA_GRAPHS = "records CUDA graphs, which are not verified with cached masks; use inductor, or"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": False, "compile_mode": "default"}, "compile_mode: needs compile: true"),
        ({"compile": False, "compile_backend": "inductor"}, "compile_backend: needs compile: true"),
        (
            {"compile_mode": "reduce-overhead"},
            f"compile_mode: reduce-overhead {CUDA_GRAPHS} max-autotune-no-cudagraphs",
        ),
        (
            {"compile_mode": "max-autotune"},
            f"compile_mode: max-autotune {CUDA_GRAPHS} max-autotune-no-cudagraphs",
        ),
        (
            {"compile_backend": "cudagraphs"},
            f"compile_backend: cudagraphs {CUDA_GRAPHS} max-autotune-no-cudagraphs",
        ),
        (
            {"compile_backend": "aot_eagre"},
            "compile_backend: PyTorch has no backend 'aot_eagre'; did you mean aot_eager?",
        ),
        (
            {"compile_backend": "eager", "compile_mode": "default"},
            "compile_mode: is for compile_backend inductor, not for eager",
        ),
    ],
)
def test_options_that_cannot_be_used(options: dict, message: str):
    with pytest.raises(UserError) as refused:
        check_compile_options(TrainConfig(**{"compile": True, **options}))
    assert str(refused.value) == message


@pytest.mark.slow  # imports the compiler
@pytest.mark.parametrize("program", ["train", "eval"])
def test_a_machine_without_a_compiler(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, "no-such-compiler"))
    monkeypatch.setattr(config, "force_disable_caches", True)
    programs = {
        "train": lambda: run(make_config(tmp_path / "run", compile=True)),
        "eval": lambda: evaluate_model(TinyModel(), [], EvalConfig(compile=True, precision="float32"), CPU),
    }
    with pytest.raises(UserError) as refused:
        programs[program]()
    assert str(refused.value).startswith("compile: torch.compile does not work on this machine: ")
    assert "no-such-compiler" in str(refused.value)
    assert not (tmp_path / "run" / "config.yaml").exists()


STAGE = StageConfig(dim=8, heads=2, patch=2, window=2)
MODEL = ModelConfig(
    "vil", SIZE, CLASSES, stages=[STAGE], neighbors="random", drop_path=0.2, dropout=0.2, layer_scale=0.1
)


def build() -> MultiScaleViT:
    torch.manual_seed(0)
    return MultiScaleViT(MODEL)


@pytest.mark.slow  # compiles kernels
def test_a_continued_run_that_is_compiled_is_bit_identical(tmp_path: Path):
    """The backend inductor draws dropout in its own kernels, from seeds of PyTorch's generator."""
    options = {"compile": True, "model": MODEL, "epochs": 2}
    full, parts = tmp_path / "full", tmp_path / "parts"
    torch.compiler.reset()
    run(make_config(full, **options), build())
    run(make_config(parts, **options, max_steps=STEPS - 2), build())
    torch.compiler.reset()
    torch.rand(7)  # no generator's state matters
    state = load_last(parts)
    run(make_config(parts, **options), build(), state=state)
    one, other = (load_last(folder) for folder in (full, parts))
    assert one["step"] == other["step"] == 2 * STEPS
    assert is_equal(one["model"], other["model"])
    assert not is_equal(one["model"], state["model"])
