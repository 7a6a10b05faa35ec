"""Print the tables of docs/scaling.md: what 8, 64 and 512 GPUs need, computed from the inputs below.

    python -m tools.dev.scaling_tables
    python -m tools.dev.scaling_tables --utilization 0.3 --models vil_small vil_base_wide

Nothing is measured here. An input is a data sheet's, measured elsewhere (docs/data.md,
docs/reliability.md), or assumed; parameters and multiply-adds are counted by this code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tools.markdown_table import markdown_table
from vil import command_line, create_model
from vil.command_line import ToolParser
from vil.evaluation.complexity import Complexity, measure_complexity
from vil.runtime.console import print_text

MODELS = ("vil_tiny", "vil_small", "vil_medium_deep", "vil_medium_wide", "vil_base_deep", "vil_base_wide")
GPUS = (8, 64, 512)
GPUS_PER_NODE = 8

PEAK_FLOPS = 989e12
"""Data sheet: dense bfloat16 products of an H100 SXM, floating-point operations per second."""
NVLINK_BYTES = 450e9
"""Data sheet: NVLink of an H100 SXM, bytes per second in each direction."""
NETWORKS = {"100 Gbit/s": 100e9, "400 Gbit/s": 400e9, "8 × 400 Gbit/s": 3200e9}
"""Networks of a node, bits per second."""
LINK_EFFICIENCY = 0.8
"""Assumed: part of a link's rate that an all-reduce reaches."""
CORE_RATES = {"folder": 316 / 2, "FFCV": 798 / 2}
"""Measured (docs/data.md): images per second and core; the full recipe on the CPU, or crop and flip."""
IMAGE_BYTES = 110e3
"""Measured (docs/data.md): bytes of a photograph of ImageNet-1K. Assumed for ImageNet-22K."""
IMAGES = {"ImageNet-1K": 1_281_167, "ImageNet-22K": 14_197_122}
CHECKPOINT_S_PER_BYTE = 5e-9
"""Measured (docs/reliability.md): CPU time of the thread that writes a checkpoint."""
CHECKPOINT_COPIES = 4
"""Float32 copies of the weights in a checkpoint: weights, average, two moments of AdamW."""
FLOPS_PER_MULTIPLY_ADD = 2 * 3
"""A multiply-add is two operations; a backward pass costs two forward passes."""


@dataclass(frozen=True)
class Cluster:
    """GPUs of equal nodes, and the part of `PEAK_FLOPS` that training reaches."""

    gpus: int
    utilization: float

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return max(1, self.gpus // GPUS_PER_NODE)

    def images_per_second(self, cost: Complexity) -> float:
        """Return the images per second of all GPUs, if nothing else is the limit."""
        return self.gpus * self.utilization * PEAK_FLOPS / (FLOPS_PER_MULTIPLY_ADD * cost.flops)

    def backward_seconds(self, cost: Complexity, batch_size: int) -> float:
        """Return the time of a backward pass of a global batch: two thirds of its step."""
        return 2 / 3 * batch_size / self.images_per_second(cost)

    def all_reduce_seconds(self, cost: Complexity, bits_per_second: float) -> float:
        """Return the time of an all-reduce of float32 gradients, by rings within and between the nodes.

        A ring of n members passes 2 (n - 1) / n of the bytes through every link.
        """
        gradient = 4 * cost.params
        within = min(self.gpus, GPUS_PER_NODE)
        seconds = gradient * 2 * (within - 1) / within / (LINK_EFFICIENCY * NVLINK_BYTES)
        if self.nodes > 1:
            ring = gradient * 2 * (self.nodes - 1) / self.nodes
            seconds += ring / (LINK_EFFICIENCY * bits_per_second / 8)
        return seconds


def throughput_table(costs: dict[str, Complexity], utilization: float) -> str:
    """Return the table of images per second, cores and bytes of a node, and time of an epoch."""
    rows = []
    for name, cost in costs.items():
        clusters = [Cluster(gpus, utilization) for gpus in GPUS]
        rates = [cluster.images_per_second(cost) for cluster in clusters]
        per_node = rates[0] / clusters[0].nodes
        row = {"model": name} | {f"images/s, {gpus} GPUs": f"{rate:,.0f}" for gpus, rate in zip(GPUS, rates)}
        for source, core_rate in CORE_RATES.items():
            row[f"cores per node, {source}"] = f"{per_node / core_rate:,.0f}"
        row["GB/s per node"] = f"{per_node * IMAGE_BYTES / 1e9:.1f}"
        for dataset, images in IMAGES.items():
            epochs = " / ".join(f"{86400 * rate / images:,.0f}" for rate in rates)
            row[f"epochs per day, {dataset}, {' / '.join(map(str, GPUS))} GPUs"] = epochs
        rows.append(row)
    return markdown_table(rows)


def communication_table(costs: dict[str, Complexity], utilization: float, batch_size: int) -> str:
    """Return the table of gradients, backward passes, all-reduce times, and checkpoints."""
    rows = []
    for name, cost in costs.items():
        checkpoint = 4 * CHECKPOINT_COPIES * cost.params
        for gpus in GPUS:
            cluster = Cluster(gpus, utilization)
            row = {"model": name, "GPUs": f"{gpus}", "gradients": f"{4 * cost.params / 1e6:,.0f} MB"}
            for label, size in (("128 per GPU", 128 * gpus), (f"{batch_size:,} in all", batch_size)):
                row[f"backward, {label}"] = f"{1e3 * cluster.backward_seconds(cost, size):.1f} ms"
            for network, bits_per_second in NETWORKS.items():
                row[network] = f"{1e3 * cluster.all_reduce_seconds(cost, bits_per_second):.1f} ms"
            row["checkpoint"] = f"{checkpoint / 1e6:,.0f} MB, {CHECKPOINT_S_PER_BYTE * checkpoint:.1f} s"
            rows.append(row)
    return markdown_table(rows)


def main(argv: Sequence[str]) -> None:
    """Print both tables."""
    parser = ToolParser(prog="python -m tools.dev.scaling_tables", description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME")
    parser.add_argument(
        "--utilization", type=float, default=0.15, metavar="FRACTION", help="assumed part of the peak rate"
    )
    parser.add_argument("--batch-size", type=int, default=4096, help="global batch of the second column")
    arguments = parser.parse_args(argv)
    with torch.device("meta"):
        models = {name: create_model(name) for name in arguments.models}
    costs = {name: measure_complexity(model, 224, 3) for name, model in models.items()}
    print_text(throughput_table(costs, arguments.utilization))
    print_text("")
    print_text(communication_table(costs, arguments.utilization, arguments.batch_size))


if __name__ == "__main__":
    command_line.main(main)
