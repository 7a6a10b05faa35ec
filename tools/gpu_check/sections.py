"""The sections, in the order in which they run."""

from __future__ import annotations

from tools.gpu_check import kernels, loading, machine, models, speed, training
from tools.gpu_check.runner import Section

_ALL = (
    Section("compile", kernels.compile_all, "kernels compiled in parallel, in the background", 150, 20),
    Section("machine", machine.run, "versions, memory, rates of copies and matrix products", 45, 8),
    Section("kernels", kernels.check_all, "kernels against float64, outputs poisoned; twice equal", 170, 30),
    Section("speed", speed.compare, "stages 1 and 2 against other attention, and the roofline", 90, 25),
    Section("training", training.run, "train.py: 50 steps, resume, waits, float16, DDP, logits", 130, 30),
    Section("models", models.run, "training images/s and memory of ViL, Swin and DeiT", 200, 45),
    Section("loading", loading.run, "loader beside compute; augmentation against Pillow", 60, 20),
    Section("tuning", speed.tune, "a few choices of warps and pipeline stages of each kernel", 60, 20),
    Section("flex", speed.compare_flex, "FlexAttention, which takes long to compile", 75, 25),
    Section("cifar10", training.cifar10, "CIFAR-10 with the time that is left", 3600, 60),
)
SECTIONS = {section.name: section for section in _ALL}
