"""Section `machine`: requirements, peak rates and memory of the GPU."""

from __future__ import annotations

import shutil

import torch

from tools.benchmarks.timing import describe_machine
from tools.gpu_check.report import Report
from tools.gpu_check.runner import Options

BLOCK_ELEMENTS = 2**28
"""Elements of 4 bytes per block of the memory test."""


def run(options: Options, report: Report) -> None:
    """Report versions, missing requirements and peak rates, and test the memory."""
    device = torch.device(options.device)
    report.add("machine", note=describe_machine(device))
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        is_supported = (major, minor) >= (8, 0) or bool(torch.version.hip)
        report.expect("compute capability", is_supported, f"{major}.{minor}; the kernels need 8.0")
        report.expect("bfloat16", torch.cuda.is_bf16_supported(including_emulation=False), shown=False)
        has_compiler = any(map(shutil.which, ("cc", "gcc", "clang")))
        report.expect("C compiler", has_compiler, "Triton and torch.compile build with it", shown=False)
        free, total = torch.cuda.mem_get_info(device)
        report.add("memory", total / 1e9, "GB", note=f"{free / 1e9:.1f} GB free")
    for name, copy_target, product_target in (("bfloat16", "3000", "790"), ("float32", "", "")):
        rates = options.measure_rates(name)
        if copy_target:
            report.add("copy, read and written", rates.bytes / 1e9, "GB/s", target=copy_target)
        tflops = 2 * rates.multiply_adds / 1e12
        report.add(f"matrix product, {name}", tflops, "TFLOP/s", target=product_target)
    report.expect("memory retains written data", *_test_memory(device, options.is_small))


def _test_memory(device: torch.device, is_small: bool) -> tuple[bool, str]:
    """Fill half of the free memory with random numbers and read it back; return success, and the size."""
    elements = 2**20 if is_small else BLOCK_ELEMENTS
    count = 4 if is_small else max(1, torch.cuda.mem_get_info(device)[0] // 2 // (4 * elements))

    def block(seed: int) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randint(2**31 - 1, (elements,), dtype=torch.int32, device=device, generator=generator)

    blocks = [block(seed) for seed in range(count)]
    wrong = sum(not torch.equal(content, block(seed)) for seed, content in enumerate(blocks))
    size = f"{count * elements * 4 / 1e9:.2g} GB"
    return not wrong, f"{wrong} of {count} blocks of {size} differ" if wrong else size
