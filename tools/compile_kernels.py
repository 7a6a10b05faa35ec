"""What the kernels of the local attention take of a GPU that need not be there: compiled, not run.

    python tools/compile_kernels.py                                   compute capabilities 8.0 and 9.0
    python tools/compile_kernels.py --precisions float32 --widths 48 128 --neighbors one
    python tools/compile_kernels.py --sides 14 --window 15 --mask exact --global_tokens 0

For each kernel: registers of a thread, bytes of them that do not fit and go to memory, shared memory of a
program, how many programs a multiprocessor holds at a time for these two, and the instructions of the longest
loop, which a group of 32 threads goes through once per block of keys or queries. It says what to try first
where a kernel is slow, and what a change costs; how fast it is only a GPU can tell.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from tools.paper_tables import show_table
from vil.attention.local.geometry import Inputs, Mask, Window
from vil.command_line import ToolParser, main
from vil.config import ConfigError

SHARED = {80: 164, 86: 100, 87: 164, 89: 100, 90: 228, 100: 228, 103: 228, 120: 100}
"""Shared memory of a multiprocessor, by compute capability times ten, in units of 1024 bytes."""
REGISTERS = 65536
"""Of a multiprocessor."""
PRECISIONS = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one kernel takes."""

    kernel: str
    capability: int
    """Times ten."""
    precision: str
    width: int
    """Of a head."""
    warps: int
    """Groups of 32 threads of a program."""
    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of a thread that do not fit into registers."""
    shared: int
    """Bytes of shared memory of a program."""
    loop: int
    """Instructions of the longest loop."""

    @property
    def at_a_time(self) -> int:
        """Programs that a multiprocessor holds."""
        threads = 32 * self.warps
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * threads)
        return min(by_registers, SHARED[self.capability] * 1024 // (self.shared + 1024), 2048 // threads)


def report(words: Sequence[str]) -> None:
    """Compiles what the command line asks for, and prints a table."""
    parser = ToolParser(prog="compile_kernels.py", description=__doc__.splitlines()[0])
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 90], choices=sorted(SHARED))
    parser.add_argument("--precisions", nargs="+", default=["bfloat16", "float32"], choices=PRECISIONS)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64], help="of heads; default: 32 64")
    parser.add_argument("--sides", type=int, default=56, help="of the map; default: 56")
    parser.add_argument("--window", type=int, default=7)
    parser.add_argument("--mask", default="chunk", choices=get_args(Mask))
    parser.add_argument("--neighbors", default="all", choices=["all", "self", "one"])
    parser.add_argument("--global_tokens", type=int, default=1)
    parser.add_argument("--absolute", action="store_true", help="no relative position")
    options = parser.parse_args(words)
    window = Window((options.sides, options.sides), options.window, options.mask, options.neighbors)
    rows = []
    for capability, precision, width in itertools.product(
        options.capabilities, options.precisions, options.widths
    ):
        rows += compile_kernels(
            capability, precision, width, window, options.global_tokens, not options.absolute
        )
    cells = [{**dataclasses.asdict(row), "at a time": row.at_a_time} for row in rows]
    print(show_table([{name: str(value) for name, value in row.items()} for row in cells]))


def compile_kernels(
    capability: int, precision: str, width: int, window: Window, globals_: int = 1, relative: bool = True
) -> list[Compiled]:
    """All kernels of a forward and a backward pass, of 8 images with 3 heads.

    Raises:
        ConfigError: Triton is not there, or interprets its kernels.
    """
    try:
        from triton.backends.compiler import GPUTarget

        from vil.attention.local import fused
    except ImportError:
        raise ConfigError("triton", "the kernels need this package") from None
    if fused.INTERPRETED:
        raise ConfigError("TRITON_INTERPRET", "is set: nothing is compiled then")
    heads, tokens, dtype = 3, window.size[0] * window.size[1], getattr(torch, precision)

    def empty(count: int) -> torch.Tensor:  # as projections leave them
        return torch.empty(8, count, heads, width, dtype=dtype, device="meta").transpose(1, 2)

    side = 4 * window.side - 1
    inputs = Inputs(
        *[empty(tokens) for _ in range(3)],
        *[empty(globals_) for _ in range(2)],
        torch.empty(heads, side, side, device="meta") if relative else None,
        torch.empty(heads, globals_, device="meta") if relative else None,
        torch.empty((), dtype=torch.int64, device="meta") if window.neighbors == "one" else None,
    )
    with _compiling(GPUTarget("cuda", capability, 32)) as found:
        output, sums = fused.launch_forward(inputs, window)
        fused.launch_backward(inputs, window, output, sums, torch.empty_like(output), relative)
    rows = []
    for name, kernel in found:
        registers, spilled = _resources(kernel.asm["cubin"])
        rows.append(
            Compiled(
                name.removesuffix("_kernel"), capability, precision, width, kernel.metadata.num_warps,
                registers, spilled, kernel.metadata.shared, _longest_loop(kernel.asm["cubin"]),
            )
        )  # fmt: skip
    return rows


@contextmanager
def _compiling(target: Any) -> Iterator[list[tuple[str, Any]]]:
    """Within it, kernels are compiled for a target and not started. Yields their names and what came out."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Absent:
        """As much of a driver as a compiler asks for."""

        def get_current_target(self) -> Any:
            return target

        def get_current_device(self) -> int:
            return int(target.arch)  # what is compiled is remembered by device

        def get_current_stream(self, _: int) -> int:
            return 0

    found: list[tuple[str, Any]] = []
    start = JITFunction.run

    def compile_only(kernel: Any, *arguments: Any, **options: Any) -> Any:
        compiled = start(kernel, *arguments, **(options | {"warmup": True}))
        found.append((kernel.fn.__name__, compiled))
        return compiled

    before = driver._active
    driver.set_active(Absent())
    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = start
        driver._active = before


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes that do not fit into them."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", _dumped(cubin, "-res-usage"))
    assert found is not None
    return int(found[1]), int(found[2])


def _longest_loop(cubin: bytes) -> int:
    """Instructions of it: from where the furthest jump backwards leads to that jump."""
    code = _dumped(cubin, "-sass")
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)([^;]*);", code)
    addresses = [int(address, 16) for address, _, _ in lines]
    longest = 0
    for number, (address, (_, operation, operands)) in enumerate(zip(addresses, lines)):
        target = re.search(r"0x([0-9a-f]+)", operands) if operation.startswith("BRA") else None
        if target and (begin := int(target[1], 16)) < address:
            longest = max(longest, number + 1 - sum(other < begin for other in addresses))
    return longest


def _dumped(cubin: bytes, what: str) -> str:
    """What NVIDIA's tool, which comes with Triton, says of a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout  # noqa: S603 (its own)


if __name__ == "__main__":
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as it is on a GPU; later versions ask for it
    main(report)
