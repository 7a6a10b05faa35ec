"""Nothing that runs for every batch waits for the device: seen on a fake GPU, so none is needed."""

import pytest
import torch
from helpers.fake_gpu import NoHostWaits, fake_gpu, move_to_fake_gpu
from PIL import Image
from timm.data import auto_augment as timm_ops

from data.batch_augment import Operation, apply_to_batch
from data.ffcv_loader import FFCVTrainLoader
from data.mixing import Mixing
from data.to_device import ErasedRegions, NormalizeAndErase
from vil.config import AugmentConfig, ModelConfig, ScheduleConfig, StageConfig, TrainConfig
from vil.models import MultiScaleViT
from vil.runtime.distributed import Process
from vil.runtime.epoch_steps import count_epoch_steps, training_phases
from vil.training.loss_monitor import LossMonitor
from vil.training.model_updater import ModelUpdater

COLOR = {
    "brightness": 0.5,
    "contrast": 0.5,
    "color": 0.5,
    "sharpness": 0.5,
    "desaturate": 0.5,
    "gaussian_blur": 1.7,
    "solarize": 100,
    "solarize_add": 30,
    "posterize": 4,
    "invert": None,
    "auto_contrast": None,
    "equalize": None,
}
GEOMETRY = {"shear_x": 0.2, "translate_y_rel": 0.1, "rotate": 30.0}
OPERATIONS = {
    name: Operation(getattr(timm_ops, name), () if value is None else (value,))
    for name, value in COLOR.items()
} | {
    f"{name}-{filter.name}": Operation(
        getattr(timm_ops, name), (value,), {"resample": filter, "fillcolor": (124, 116, 104)}
    )
    for name, value in GEOMETRY.items()
    for filter in (Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
}


def gpu_images(count=4, dtype=torch.uint8):
    return torch.empty(count, 3, 32, 32, dtype=dtype, device="cuda")


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.max().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.long().bincount(),
        lambda x: x.cpu(),
        lambda x: x + torch.tensor([1], device="cuda"),
        lambda x: x[[0, 1]],
        lambda x: x.copy_(torch.zeros(3)),
    ],
)
def test_waits_are_detected(wait, monkeypatch):
    with fake_gpu(monkeypatch), NoHostWaits(), pytest.raises(AssertionError, match="waits"):
        wait(torch.empty(3, device="cuda"))


@pytest.mark.parametrize("name", OPERATIONS)
def test_augmentation_of_batches(name, monkeypatch):
    with fake_gpu(monkeypatch), NoHostWaits():
        images = apply_to_batch(gpu_images(), [[OPERATIONS[name]]] * 4)
    assert images.shape == (4, 3, 32, 32)
    assert images.is_cuda


def test_batches_of_the_ffcv_loader(monkeypatch):
    operations = list(OPERATIONS.values())
    planned = [[operation, operations[-index]] for index, operation in enumerate(operations)]
    erased = ErasedRegions(torch.tensor([[0, 1, 2, 3, 4], [5, 0, 0, 2, 2]]), torch.randn(3 * (12 + 4)))
    loader = object.__new__(FFCVTrainLoader)  # without a file
    with fake_gpu(monkeypatch):
        loader._normalize_and_erase = NormalizeAndErase((0.5,) * 3, (0.2,) * 3, "cuda")
        decoded = torch.empty(len(planned), 32, 32, 3, dtype=torch.uint8, device="cuda")
        with NoHostWaits():
            images = loader._finish(decoded.permute(0, 3, 1, 2), planned, erased)
    assert images.shape == (len(planned), 3, 32, 32)
    assert images.dtype == torch.float32
    assert images.is_cuda


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"cutmix_minmax": (0.2, 0.8)}])
def test_mixing(options, monkeypatch):
    mix = Mixing(AugmentConfig(**options), num_classes=7, label_smoothing=0.1, seed=0)
    with fake_gpu(monkeypatch):
        images, targets = gpu_images().float(), torch.empty(4, dtype=torch.int64, device="cuda")
        with NoHostWaits():
            _, soft_targets = mix(images, targets, step=0, rank=0, part=0, epoch=0)
    assert soft_targets.shape == (4, 7)


@pytest.mark.parametrize(
    ("attention", "schedule", "options"),
    [
        ("vision_longformer", {"clip_grad": 1.0}, {}),
        ("vision_longformer", {"loss": "bce"}, {"neighbors": "random"}),
        ("full", {"clip_grad": 1.0, "clip_mode": "agc"}, {}),
        ("full", {"clip_grad": 1.0, "clip_mode": "value"}, {"gradient_checkpointing": True}),
        ("global_only", {"augment": {"mixup": 0.8}}, {}),
        ("linformer", {"label_smoothing": 0.0}, {"precision": "float16"}),
        ("spatial_reduction", {"class_weights": "balanced"}, {"precision": "float32"}),
        ("performer", {"augment": {"aug_splits": 2}}, {}),
    ],
)
def test_training_step(attention, schedule, options, monkeypatch):
    """But for the backward pass of autograd, which needs a true GPU."""
    stages = [
        StageConfig(attention=attention, dim=32, blocks=1, heads=2, patch=4, window=3, projected_tokens=8),
        StageConfig(attention="full", dim=32, blocks=1, heads=2, patch=2),
    ]
    neighbors = options.pop("neighbors", None)
    model = ModelConfig(
        name="vil", stages=stages, num_classes=7, image_size=32, drop_path=0.1, neighbors=neighbors
    )
    augment = AugmentConfig(**schedule.pop("augment", {}))
    config = TrainConfig(
        model=model,
        schedule=ScheduleConfig(augment=augment, **schedule),
        **{"precision": "bfloat16", **options},
    )
    steps = count_epoch_steps(training_phases(config.schedule, model.size), 10, 40)
    network = MultiScaleViT(model)
    weights = [1.0] * 7 if "class_weights" in schedule else None

    def fill_gradients(*_):
        for parameter in network.parameters():
            parameter.grad = torch.empty_like(parameter)

    with fake_gpu(monkeypatch):
        move_to_fake_gpu(network)
        network.to = lambda *_, **__: network  # which cannot convert fake tensors
        monkeypatch.setattr(torch.Tensor, "backward", fill_gradients)
        process = Process(rank=0, local_rank=0, world_size=1, device=torch.device("cuda", 0))
        updater = ModelUpdater(network, config, process, steps, weights)
        updater.wrap_network()
        monitor = LossMonitor(process.device, 1, 10, None)
        mix = Mixing(augment, num_classes=7, label_smoothing=0.1, seed=0)
        images, targets = gpu_images().float(), torch.empty(4, dtype=torch.int64, device="cuda")
        if augment.aug_splits > 1:
            targets = targets[:2]
        fill_gradients()
        updater._optimizer.step()  # the first step waits
        with NoHostWaits():
            for step in (1, 2):
                updater.begin_step(step)
                network.set_training_progress(step, 0)
                mixed = mix(images, targets, step=step, rank=0, part=0, epoch=0)
                loss = updater.accumulate(*mixed, 0)
                loss, _, is_finite = updater.update(step, loss)
                monitor.add(step, loss, is_finite)
    assert loss.is_cuda
