"""Operations on batches equal Pillow's; plans have the draws of the transform."""

import copy
import math

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment as timm_ops

from data.batch_augment import (
    AugmentationPlanner,
    Operation,
    _batch_operation,
    apply_to_batch,
    apply_to_image,
    unsupported_option,
)
from data.to_device import NormalizeAndErase, collate_erasing
from data.transforms import train_transform
from vil.config import AugmentConfig, DataConfig
from vil.runtime.seeding import seeded

SIZE, COUNT = 48, 24
FILL = (124, 116, 104)
PLAIN = {
    "brightness": np.linspace(0.05, 1.95, COUNT),
    "contrast": np.linspace(0.05, 1.95, COUNT),
    "color": np.linspace(0.0, 1.95, COUNT),
    "sharpness": np.linspace(0.05, 1.95, COUNT),
    "desaturate": np.linspace(0.5, 1.0, COUNT),
    "gaussian_blur": np.linspace(0.1, 2.0, COUNT),
    "solarize": np.linspace(0, 256, COUNT).astype(int),
    "solarize_add": np.linspace(0, 128, COUNT).astype(int),
    "posterize": np.arange(COUNT) % 8 + 1,
    "invert": None,
    "auto_contrast": None,
    "equalize": None,
}
GEOMETRIC = {
    "shear_x": np.linspace(-0.3, 0.3, COUNT),
    "shear_y": np.linspace(-0.3, 0.3, COUNT),
    "translate_x_rel": np.linspace(-0.45, 0.45, COUNT),
    "translate_y_rel": np.linspace(-0.45, 0.45, COUNT),
    "translate_x_abs": np.linspace(-20, 20, COUNT),
    "translate_y_abs": np.linspace(-20, 20, COUNT),
    "rotate": np.linspace(-135, 135, COUNT),
}
POLICIES = {
    "rand-m9-mstd0.5-inc1": {},
    "rand-m5-n3-p1": {},
    "rand-m7-mstd101-tweights": {},
    "rand-m9-t3aw-inc1": {},
    "original": {},
    "originalr-mstd0.5": {},
    "v0": {},
    "v0r": {},
    "trivial": {},
    "3a": {"color_jitter": 0.4},
    "": {"color_jitter": 0.4},
}


@pytest.fixture(scope="module")
def images():
    """Smooth ones of many colors, noise, and the extremes: black, one color, two values."""
    rng = np.random.default_rng(0)
    made = [
        Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((SIZE, SIZE))
        for _ in range(COUNT - 6)
    ]
    made += [
        Image.fromarray(rng.integers(low, high, (SIZE, SIZE, 3), dtype=np.uint8))
        for low, high in ((0, 256), (90, 120), (7, 8), (0, 1), (255, 256), (3, 5))
    ]
    return made


def batched(images):
    return (
        torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()
    )


def on_each(images, steps):
    return batched([apply_to_image(image, planned) for image, planned in zip(images, steps)])


def difference(images, steps):
    assert len(images) == len(steps)
    return (apply_to_batch(batched(images), steps).int() - on_each(images, steps).int()).abs()


@pytest.mark.parametrize("name", PLAIN)
def test_operations(images, name):
    arguments = [()] * COUNT if PLAIN[name] is None else [(value.item(),) for value in PLAIN[name]]
    wrong = difference(images, [[Operation(getattr(timm_ops, name), argument)] for argument in arguments])
    # The blur rounds after each of six passes; the others are exact, but for sums of another precision.
    assert wrong.max() <= (2 if name == "gaussian_blur" else 1)
    assert (wrong > 0).float().mean() < 0.005


@pytest.mark.parametrize("filter", ["NEAREST", "BILINEAR", "BICUBIC"])
@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometry(images, name, filter):
    options = {"resample": Image.Resampling[filter], "fillcolor": FILL}
    steps = [[Operation(getattr(timm_ops, name), (value.item(),), options)] for value in GEOMETRIC[name]]
    wrong = difference(images, steps).amax(1)
    assert (wrong > 0).float().mean() < 0.02
    # A coordinate on the very edge of a pixel or of the image may fall to either side.
    assert (wrong > 1).float().mean() < 0.003


def test_motion_along_one_axis_is_detected():
    options = {"resample": Image.Resampling.BICUBIC, "fillcolor": FILL}

    def moves(name, value):
        change, _ = _batch_operation(Operation(getattr(timm_ops, name), (value,), options), 48, 48)
        return change[2]

    assert [moves(name, 0.2) for name in ("shear_x", "translate_x_rel")] == ["horizontal"] * 2
    assert [moves(name, 0.2) for name in ("shear_y", "translate_y_rel")] == ["vertical"] * 2
    assert moves("rotate", 0.2) == "both"


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy or "jitter")
def test_plans_have_the_draws_of_the_transform(images, policy):
    """The same generators give the same view: by Pillow to the bit, as a batch to a gray level, nearly."""
    augment = AugmentConfig(auto_augment=policy or None, random_erasing=0.5, vflip=0.2, **POLICIES[policy])
    transform = train_transform(augment, DataConfig(), image_size=SIZE, in_chans=3)
    assert unsupported_option(transform) is None
    untouched = copy.deepcopy(transform)
    planner = AugmentationPlanner(transform)
    crops, steps, erasing_plans, expected_pixels, expected = [], [], [], [], []
    for key in range(4 * COUNT):
        image = images[key % COUNT]
        with seeded(0, "test", key):
            plan = planner(*image.size)
        with seeded(0, "test", key):
            pixels = untouched.pixels(image)
            expected_pixels.append(pixels)
            erasing = collate_erasing(untouched.draw_erasing(pixels.shape))
            expected.append(NormalizeAndErase(untouched.mean, untouched.std)(pixels[None], erasing)[0])
        pixels = transform.crop.crop(_WholeImage(image), plan.box, plan.interpolation)
        for flip in plan.flips:
            pixels = flip.flip(pixels)
        crops.append(Image.fromarray(np.ascontiguousarray(pixels)))
        steps.append(plan.operations)
        erasing_plans.append(plan.erasing)
    by_pillow = on_each(crops, steps)
    assert torch.equal(by_pillow, torch.stack(expected_pixels))
    finish = NormalizeAndErase(transform.mean, transform.std)
    assert torch.equal(finish(by_pillow, collate_erasing(erasing_plans)), torch.stack(expected))
    in_batches = apply_to_batch(batched(crops), steps)
    wrong = (in_batches.int() - by_pillow.int()).abs().float()
    assert wrong.mean() < 0.2  # a level of one step may be one of many in the next: equalize, posterize
    assert sum(map(len, steps)) > COUNT
    assert sum(len(plan.boxes) for plan in erasing_plans) > COUNT


class _WholeImage:
    def __init__(self, image):
        self.image, self.size = image, image.size

    def decode(self, scale=1):
        return np.array(self.image)


def test_distribution_of_each_operation_is_that_of_timm():
    """Over other seeds than the folder's: how often each operation is called, and with what."""
    augment = AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1")
    transform = train_transform(augment, DataConfig(), image_size=SIZE, in_chans=3)
    operations = transform.augment[0].ops
    called = {operation.name: [] for operation in operations}
    for operation in operations:
        name, original = operation.name, operation.aug_fn

        def counting(image, *arguments, name=name, original=original, **options):
            called[name].append(arguments)
            return original(image, *arguments, **options)

        operation.aug_fn = counting
    planner = AugmentationPlanner(train_transform(augment, DataConfig(), image_size=SIZE, in_chans=3))
    planned, draws, image = {}, 4000, Image.new("RGB", (8, 8), (9, 90, 200))
    for key in range(draws):
        with seeded(1, "timm", key):
            transform.augment[0](image)
        with seeded(2, "plan", key):
            for step in planner(8, 8).operations:
                planned.setdefault(step.function.__name__.lstrip("_"), []).append(step.arguments)
    names = {
        "shear_x": "ShearX",
        "translate_y_rel": "TranslateYRel",
        "rotate": "Rotate",
        "color": "ColorIncreasing",
        "solarize_add": "SolarizeAdd",
        "equalize": "Equalize",
        "posterize": "PosterizeIncreasing",
    }
    assert len(planned) == len(called)
    for name, timm_name in names.items():
        ours, theirs = planned[name], called[timm_name]
        chance = math.sqrt(2 * draws / 15)  # each operation is called in a fifteenth of the draws
        assert abs(len(ours) - len(theirs)) < 5 * chance, name
        if ours[0]:
            ours, theirs = (np.sort(np.array(values)[:, 0]) for values in (ours, theirs))
            quantiles = np.linspace(0.02, 0.98, 25)
            spread = np.concatenate([ours, theirs]).std() + 1e-9
            distance = np.abs(
                [np.mean(ours <= q) - np.mean(theirs <= q) for q in np.quantile(theirs, quantiles)]
            )
            limit = 1.95 * math.sqrt(1 / len(ours) + 1 / len(theirs))  # Kolmogorov-Smirnov at 0.001
            assert distance.max() < limit or spread < 1e-6, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "3a", "trivial"])
def test_gpu_results_equal_those_of_the_cpu(images, policy):
    planner = AugmentationPlanner(
        train_transform(AugmentConfig(auto_augment=policy), DataConfig(), image_size=SIZE, in_chans=3)
    )
    steps = []
    for key in range(COUNT):
        with seeded(0, "test", key):
            steps.append(planner(SIZE, SIZE).operations)
    here, there = apply_to_batch(batched(images), steps), apply_to_batch(batched(images).cuda(), steps).cpu()
    assert ((here.int() - there.int()).abs() > 0).float().mean() < 0.01
