"""Kernels that do not compile or launch: `auto` warns once and computes with `chunked`, `fused` raises.

Failures are injected in place of a kernel; without a GPU the others run in Triton's interpreter.
"""

import logging

import pytest
import torch
from helpers.local_inputs import make_inputs
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

import vil.attention.local
from tools.benchmarks.timing import describe_error
from vil.attention.local import fallback, fused_or_chunked_attention, kernels, local_attention
from vil.attention.local.fallback import KernelError
from vil.attention.local.fused import INTERPRETED
from vil.errors import UserError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="no GPU and no interpreter")
OPTIONS = {"size": (3, 4), "window": 2}
KERNELS = ["forward_kernel", "query_kernel", "key_kernel", "global_kernel", "bias_kernel"]


@pytest.fixture(autouse=True)
def _no_failures():
    fallback.forget_failures()
    yield
    fallback.forget_failures()


@pytest.fixture
def auto(monkeypatch):
    """Call the backend that `auto` selects on a GPU, on any device."""
    monkeypatch.setattr(vil.attention.local, "choose", lambda *_: fused_or_chunked_attention)


class FailingKernel:
    """A kernel whose launch raises; counts attempts."""

    def __init__(self, error):
        self.error, self.attempts = error, 0

    def __getitem__(self, grid):
        def launch(*_, **__):
            self.attempts += 1
            raise self.error

        return launch


def make(dtype=torch.float32):
    return make_inputs((3, 4), 2, 1, True, heads=1, head_dim=8, batch=1, dtype=dtype, device=DEVICE)


def run(inputs, wrap=lambda function: function, **options):
    """Return the output and all gradients of `local_attention`, optionally compiled."""

    def attend(*tensors):
        return local_attention(**dict(zip(inputs, tensors)), **OPTIONS, **options)

    output = wrap(attend)(*inputs.values())
    return [output, *torch.autograd.grad(output.square().sum(), list(inputs.values()))]


def compile_graph(function):
    torch.compiler.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


@pytest.mark.usefixtures("auto")
@pytest.mark.parametrize(
    ("kernel", "wrap"),
    [
        *(pytest.param(kernel, lambda function: function, id=f"{kernel}-eager") for kernel in KERNELS),
        pytest.param("forward_kernel", compile_graph, id="forward_kernel-compiled"),
        pytest.param("key_kernel", compile_graph, id="key_kernel-compiled"),
    ],
)
def test_auto_warns_once_and_falls_back_to_chunked(kernel, wrap, monkeypatch, caplog):
    """Any kernel may fail, of the forward or the backward pass."""
    failing = FailingKernel(RuntimeError("Triton Error [CUDA]: device kernel image is invalid"))
    monkeypatch.setattr(kernels, kernel, failing)
    inputs = make()
    with caplog.at_level(logging.WARNING):
        found = run(inputs, wrap)
        run(inputs, wrap)
    assert failing.attempts == 1  # not tried again
    (record,) = caplog.records
    message = record.getMessage()
    assert (
        "chunked is used instead: RuntimeError: Triton Error [CUDA]: device kernel image is invalid"
        in message
    )
    assert f"(torch {torch.__version__}, triton " in message
    assert "\n" not in message
    assert len(fallback.failures()) == 1
    monkeypatch.undo()
    for ours, theirs in zip(found, run(inputs, backend="dense")):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("auto")
def test_other_kinds_of_calls_keep_their_kernels(monkeypatch):
    """A kernel that fails for one precision or window is replaced for these only."""
    with monkeypatch.context() as patch:
        patch.setattr(
            kernels, "forward_kernel", FailingKernel(OutOfResources(200000, 101376, "shared memory"))
        )
        run(make())
    counting = Counter(kernels.forward_kernel)
    monkeypatch.setattr(kernels, "forward_kernel", counting)
    run(make())
    assert counting.launches == 0
    run(make(torch.float16))
    assert counting.launches == 1


class Counter:
    """A kernel whose launches are counted."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


@pytest.mark.parametrize("kernel", KERNELS)
def test_fused_by_name_fails_in_one_line(kernel, monkeypatch):
    monkeypatch.setattr(kernels, kernel, FailingKernel(OutOfResources(200000, 101376, "shared memory")))
    with pytest.raises(KernelError, match="out of resource: shared memory") as raised:
        run(make(), backend="fused")
    assert isinstance(raised.value, UserError)  # programs print it and end with exit status 2
    assert raised.value.location == "attention_backend"
    assert "\n" not in str(raised.value)
    assert fallback.failures() == []
    assert describe_error(raised.value).is_failure  # and not a limit of the method


def test_compilation_errors_are_shortened_to_the_reason(monkeypatch):
    error = CompilationError("line = 1\nother = 2\n", None, "unsupported conversion")
    monkeypatch.setattr(kernels, "forward_kernel", FailingKernel(error))
    with pytest.raises(KernelError, match="fails: CompilationError: unsupported conversion"):
        run(make(), backend="fused")


@pytest.mark.usefixtures("auto")
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Triton Error [CUDA]: out of memory")],
)
def test_out_of_memory_does_not_trigger_the_fallback(error, monkeypatch):
    """A smaller batch would help, and programs try one."""
    monkeypatch.setattr(kernels, "forward_kernel", FailingKernel(error))
    with pytest.raises(type(error), match="out of memory"):
        run(make())
    assert fallback.failures() == []


@pytest.mark.usefixtures("auto")
def test_a_lost_gpu_is_reported_without_fallback(monkeypatch):
    """After an illegal access every CUDA call of the process fails, those of `chunked` too."""
    error = RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")
    monkeypatch.setattr(kernels, "key_kernel", FailingKernel(error))
    monkeypatch.setattr(fallback, "_is_usable", lambda _: False)
    with pytest.raises(KernelError, match=r"can no longer be used in this process.*illegal memory access"):
        run(make())
    assert fallback.failures() == []
