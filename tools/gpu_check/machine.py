"""Section `machine`: is everything there, and what can the GPU do at most?"""

from __future__ import annotations

import shutil

import torch

from tools.benchmarking import measure
from tools.gpu_check.report import Report
from tools.gpu_check.runner import Options

CHUNK = 2**28
"""Elements (4 bytes) that are written at a time to find out whether memory keeps them."""


def run(options: Options, report: Report) -> None:
    """Report versions, what is missing, rates, and whether memory keeps what is written."""
    device = torch.device(options.device)
    report.add("machine", note=f"{measure.machine(device)}; {measure.versions()}")
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        note = f"{capability[0]}.{capability[1]}; the kernels need 8.0"
        report.expect("compute capability", capability >= (8, 0) or bool(torch.version.hip), note)
        report.expect("bfloat16", torch.cuda.is_bf16_supported(including_emulation=False), shown=False)
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        report.expect(
            "C compiler", compiler is not None, "Triton and torch.compile build with it", shown=False
        )
        free, total = torch.cuda.mem_get_info(device)
        report.add("memory", total / 1e9, "GB", note=f"{free / 1e9:.1f} GB free")
    for dtype in (torch.bfloat16, torch.float32):
        rates = measure.rates(device, dtype)
        name = str(dtype).removeprefix("torch.")
        if dtype == torch.bfloat16:
            report.add("copy, read and written", rates.bytes / 1e9, "GB/s", target="3000")
        target = "790" if dtype == torch.bfloat16 else ""
        report.add(f"matrix product, {name}", 2 * rates.multiply_adds / 1e12, "TFLOP/s", target=target)
    report.expect("memory keeps what is written", *_keeps(device, options.small))


def _keeps(device: torch.device, small: bool) -> tuple[bool, str]:
    """Write random numbers to half of the free memory, then read all of it; all hold, and how much it was."""
    elements = 2**20 if small else CHUNK
    count = 4 if small else max(1, torch.cuda.mem_get_info(device)[0] // 2 // (4 * CHUNK))

    def numbers(seed: int) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randint(2**31 - 1, (elements,), dtype=torch.int32, device=device, generator=generator)

    chunks = [numbers(seed) for seed in range(count)]
    wrong = [seed for seed, chunk in enumerate(chunks) if not torch.equal(chunk, numbers(seed))]
    size = f"{count * elements * 4 / 1e9:.2g} GB"
    return not wrong, size if not wrong else f"{len(wrong)} of {count} pieces of {size} differ"
