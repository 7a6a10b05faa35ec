"""Print the resources of the kernels of the local attention, compiled for GPUs that need not be present.

    python -m tools.dev.kernel_statistics                                   compute capabilities 8.0 and 9.0
    python -m tools.dev.kernel_statistics --precisions float32 --widths 48 128 --neighbors one
    python -m tools.dev.kernel_statistics --sides 14 --window 15 --mask exact --global-tokens 0

For each kernel: registers of a thread, bytes of a thread that are spilled to memory, shared memory of a
program in bytes, programs that a multiprocessor holds at a time, and the instructions of the longest loop,
which a warp executes once per block of keys or queries. The speed itself can only be measured on a GPU.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import torch

from tools.markdown_table import markdown_table
from vil import command_line
from vil.attention.local.geometry import Inputs, LocalAttentionSpec, Mask, operator_inputs
from vil.command_line import ToolParser
from vil.errors import UserError
from vil.runtime.console import print_text

SHARED_KIB = {80: 164, 86: 100, 87: 164, 89: 100, 90: 228, 100: 228, 103: 228, 120: 100}
"""Ten times the compute capability → shared memory of a multiprocessor in KiB."""
REGISTERS = 65536
"""Registers of a multiprocessor."""
MAX_THREADS = 2048
"""Threads of a multiprocessor."""


@dataclasses.dataclass(frozen=True)
class KernelStatistics:
    """Resources of a compiled kernel: see the module; `capability` is ten times the compute capability."""

    kernel: str
    capability: int
    precision: str
    width: int
    warps: int
    registers: int
    spilled: int
    shared: int
    loop: int

    @property
    def programs(self) -> int:
        """Programs that a multiprocessor holds at a time."""
        threads = 32 * self.warps
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * threads)
        by_shared_memory = SHARED_KIB[self.capability] * 1024 // (self.shared + 1024)
        return min(by_registers, by_shared_memory, MAX_THREADS // threads)


def compile_kernels(
    capability: int,
    precision: str,
    width: int,
    spec: LocalAttentionSpec,
    global_tokens: int,
    relative: bool,
    heads: int = 3,
) -> list[KernelStatistics]:
    """Compile the kernels of a forward and a backward pass of 8 images.

    The number of heads matters only if their width is not a multiple of 16: it decides the alignment.
    """
    try:
        from triton.backends.compiler import GPUTarget

        from vil.attention.local import fused
    except ImportError:
        raise UserError("triton", "the kernels need this package") from None
    if fused.INTERPRETED:
        raise UserError("TRITON_INTERPRET", "is set: no kernel is compiled")
    tokens, dtype = spec.size[0] * spec.size[1], getattr(torch, precision)

    def empty(count: int) -> torch.Tensor:  # strides as of projected tokens
        return torch.empty(8, count, heads, width, dtype=dtype, device="meta").transpose(1, 2)

    side, local, global_ = 4 * spec.window - 1, empty(tokens), empty(global_tokens)
    with torch.device("meta"):
        inputs = Inputs(
            *(local, local, local, global_, global_),
            bias_table=torch.empty(heads, side, side) if relative else None,
            global_bias=torch.empty(heads, global_tokens) if relative else None,
            neighbor=torch.empty((), dtype=torch.int64) if spec.neighbors == "one" else None,
        )
        by_position = operator_inputs(inputs, spec)
    with _compile_only(GPUTarget("cuda", capability, 32)) as compiled:
        output, sums = fused.launch_forward(by_position, spec)
        gradient, needs_bias_grads = torch.empty_like(output), (relative, relative)
        fused.launch_backward(by_position, spec, output, sums, gradient, needs_bias_grads)
    return [
        KernelStatistics(
            name.removesuffix("_kernel"),
            capability,
            precision,
            width,
            kernel.metadata.num_warps,
            *_registers(kernel.asm["cubin"]),
            kernel.metadata.shared,
            _longest_loop(kernel.asm["cubin"]),
        )
        for name, kernel in compiled
    ]


@contextmanager
def _compile_only(target: Any) -> Iterator[list[tuple[str, Any]]]:
    """Compile kernels for a target instead of running them; yield their names and what Triton returns."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from vil.attention.local import fused

    absent = mock.Mock(  # the part of a driver that the compiler uses
        get_current_target=lambda: target,
        get_current_device=lambda: int(target.arch),  # the key of Triton's cache
        get_current_stream=lambda _: 0,
    )
    compiled: list[tuple[str, Any]] = []
    run: Callable[..., Any] = JITFunction.run

    def compile_kernel(kernel: Any, *arguments: Any, **options: Any) -> Any:
        result = run(kernel, *arguments, **(options | {"warmup": True}))
        compiled.append((kernel.fn.__name__, result))
        return result

    with (
        mock.patch.object(driver, "_active", absent),
        mock.patch.object(JITFunction, "run", compile_kernel),
        mock.patch.object(fused, "major_capability", return_value=target.arch // 10),
    ):
        yield compiled


def _registers(cubin: bytes) -> tuple[int, int]:
    """Return the registers of a thread, and the bytes that do not fit into them."""
    match = re.search(r"REG:(\d+) STACK:(\d+)", _cuobjdump(cubin, "-res-usage"))
    assert match is not None
    return int(match[1]), int(match[2])


def _longest_loop(cubin: bytes) -> int:
    """Return the number of instructions between the longest jump backwards and its target."""
    lines = re.findall(
        r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)([^;]*);", _cuobjdump(cubin, "-sass")
    )
    addresses = [int(address, 16) for address, _, _ in lines]
    longest = 0
    for index, (address, (_, operation, operands)) in enumerate(zip(addresses, lines)):
        target = re.search(r"0x([0-9a-f]+)", operands) if operation.startswith("BRA") else None
        if target and (start := int(target[1], 16)) < address:
            longest = max(longest, index + 1 - sum(other < start for other in addresses))
    return longest


def _cuobjdump(cubin: bytes, option: str) -> str:
    """Return the output of cuobjdump, which is part of Triton."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603


def main(argv: Sequence[str]) -> None:
    """Compile the kernels and print a table."""
    parser = ToolParser(prog="python -m tools.dev.kernel_statistics", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--capabilities", type=int, nargs="+", default=[80, 90], choices=sorted(SHARED_KIB))
    precisions = ("float32", "bfloat16", "float16")
    add("--precisions", nargs="+", default=["bfloat16", "float32"], choices=precisions)
    add("--widths", type=int, nargs="+", default=[32, 64], help="of heads; default: 32 64")
    add("--sides", type=int, default=56, help="of the map; default: 56")
    add("--window", type=int, default=7)
    add("--mask", default="chunk", choices=get_args(Mask))
    add("--neighbors", default="all", choices=["all", "self", "one"])
    add("--global-tokens", type=int, default=1)
    add("--absolute", action="store_true", help="no relative position")
    options = parser.parse_args(argv)
    spec = LocalAttentionSpec((options.sides, options.sides), options.window, options.mask, options.neighbors)
    rows = []
    for key in itertools.product(options.capabilities, options.precisions, options.widths):
        for kernel in compile_kernels(*key, spec, options.global_tokens, not options.absolute):
            row = {**dataclasses.asdict(kernel), "at a time": kernel.programs}
            rows.append({name: str(value) for name, value in row.items()})
    print_text(markdown_table(rows))


if __name__ == "__main__":
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default on a GPU, required by later versions
    command_line.main(main)
