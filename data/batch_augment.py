"""Augmentation of batches: draw first, apply later, to one image by Pillow or to a batch on a GPU.

The policies of timm and torchvision draw what happens to an image; an `AugmentationPlan` records it. The
draws for the key of a view are those of the other loaders, so that all train on the same distribution, view
for view.
"""

from __future__ import annotations

import copy
import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import auto_augment
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional

from data import batch_operations
from data.crops import Box, RandomResizedCrop
from data.to_device import ErasingPlan
from data.transforms import RandomFlip, Transform
from vil.config import as_size

Arguments = tuple[Any, ...]
"""Factors, names and colors of an operation."""


class Operation(NamedTuple):
    """An operation on an image: `function(image, *arguments, **options)`."""

    function: Callable[..., Image.Image]
    arguments: Arguments = ()
    options: dict[str, Any] = {}  # noqa: RUF012


@dataclass
class AugmentationPlan:
    """All draws for one view of an image."""

    box: Box
    interpolation: str
    flips: list[RandomFlip] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    erasing: ErasingPlan = field(default_factory=ErasingPlan)


class AugmentationPlanner:
    """Draw plans from the global generators, as a transform without `unsupported_option` draws."""

    def __init__(self, transform: Transform) -> None:
        assert isinstance(transform.crop, RandomResizedCrop)
        self._transform = transform
        self._crop = transform.crop
        self._draws = [_recorder(copy.deepcopy(policy)) for policy in transform.augment]

    def __call__(self, width: int, height: int) -> AugmentationPlan:
        """Draw the plan of one view of an image of this size, in pixels."""
        plan = AugmentationPlan(*self._crop.draw(width, height))
        plan.flips = [flip for flip in self._transform.flips if flip.draw()]
        for draw in self._draws:
            draw(plan)
        (plan.erasing,) = self._transform.draw_erasing((3, *as_size(self._crop.size)))
        return plan


def unsupported_option(transform: Transform) -> str | None:
    """Return the option of a training transform that cannot be drawn in advance, or None.

    Supported are the Inception crop of RGB images, and all policies but AugMix; one view of an image.
    """
    if not isinstance(transform.crop, RandomResizedCrop):
        return "schedule.augment.crop"
    if transform.aug_splits > 1:
        return "schedule.augment.aug_splits"
    if len(transform.mean) != 3:
        return "model.in_chans"
    if not all(isinstance(policy, _SUPPORTED_POLICIES) for policy in transform.augment):
        return "schedule.augment.auto_augment"
    return None


def apply_to_image(image: Image.Image, operations: Sequence[Operation]) -> Image.Image:
    """Apply the operations of a plan by Pillow."""
    for operation in operations:
        image = operation.function(image, *operation.arguments, **operation.options)
    return image


def apply_to_batch(images: Tensor, operations: Sequence[Sequence[Operation]]) -> Tensor:
    """Apply the operations of each image to (B, 3, H, W), uint8, contiguous, in place and on its device.

    All images whose n-th operation is the same are changed together.
    """
    for step in range(max(map(len, operations), default=0)):
        groups: dict[Arguments, list[tuple[int, Arguments]]] = defaultdict(list)
        for index, planned in enumerate(operations):
            if step < len(planned):
                kind, arguments = _batch_operation(planned[step], images.shape[-1], images.shape[-2])
                groups[kind].append((index, arguments))
        for (name, *options), members in groups.items():
            indices = torch.tensor([index for index, _ in members]).to(images.device, non_blocking=True)
            rows = torch.tensor([row for _, row in members], dtype=torch.float64)  # (members, arguments)
            rows = rows.to(images.device, non_blocking=True)
            columns = [rows] if name == "affine" else rows.unbind(1)
            images[indices] = getattr(batch_operations, name)(images[indices], *columns, *options)
    return images


# Recording of the draws of timm's and torchvision's policies

_SUPPORTED_POLICIES = (
    auto_augment.RandAugment,
    auto_augment.AutoAugment,
    transforms.TrivialAugmentWide,
    transforms.ColorJitter,
)


def _recorder(policy: Any) -> Callable[[AugmentationPlan], object]:
    """Return a function that lets a policy draw and records its operations in a plan."""
    if isinstance(policy, transforms.ColorJitter):
        return lambda plan: _record_color_jitter(policy, plan)
    if isinstance(policy, transforms.TrivialAugmentWide):
        return lambda plan: _record_trivial(policy, plan)
    sub_policies = policy.policy if isinstance(policy, auto_augment.AutoAugment) else [policy.ops]
    for operation in (operation for sub_policy in sub_policies for operation in sub_policy):
        operation.aug_fn = _recorded(operation.aug_fn)
    return policy


def _recorded(function: Callable[..., Image.Image]) -> Callable[..., AugmentationPlan]:
    """Return a stand-in for an operation of timm that records the call in a plan."""

    def record(
        plan: AugmentationPlan, *arguments: float, resample: object, fillcolor: object
    ) -> AugmentationPlan:
        operation = Operation(function, arguments)
        if function is auto_augment.gaussian_blur_rand:  # the only operation that draws a value itself
            radius = random.uniform(0.1, 2.0 * arguments[0])  # noqa: S311
            operation = Operation(auto_augment.gaussian_blur, (radius,))
        elif function.__name__ in _AFFINE_COEFFICIENTS:
            choice = random.choice(resample) if isinstance(resample, (list, tuple)) else resample  # noqa: S311
            operation = Operation(function, arguments, {"resample": choice, "fillcolor": fillcolor})
        plan.operations.append(operation)
        return plan

    return record


def _record_color_jitter(jitter: transforms.ColorJitter, plan: AugmentationPlan) -> None:
    order, *factors = jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    functions = (auto_augment.brightness, auto_augment.contrast, auto_augment.color)
    for index in order.tolist():
        if index < len(functions) and factors[index] is not None:
            plan.operations.append(Operation(functions[index], (factors[index],)))


def _record_trivial(policy: transforms.TrivialAugmentWide, plan: AugmentationPlan) -> None:
    """Make the draws of TrivialAugmentWide.forward in their order."""
    space = policy._augmentation_space(policy.num_magnitude_bins)
    name = list(space)[int(torch.randint(len(space), (1,)).item())]
    magnitudes, is_signed = space[name]
    drawn = torch.randint(len(magnitudes), (1,)) if magnitudes.ndim > 0 else None
    magnitude = 0.0 if drawn is None else float(magnitudes[drawn].item())
    if is_signed and torch.randint(2, (1,)):
        magnitude = -magnitude
    plan.operations += _TRIVIAL_OPERATIONS[name](magnitude)


_NEAREST_ON_BLACK = {"resample": Image.Resampling.NEAREST, "fillcolor": (0, 0, 0)}


def _affine_operation(*coefficients: float) -> list[Operation]:
    return [Operation(_transform, (coefficients,), _NEAREST_ON_BLACK)]


def _transform(
    image: Image.Image, coefficients: Sequence[float], resample: Image.Resampling, fillcolor: tuple[int, ...]
) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, resample, fillcolor=fillcolor)


def _shear_operation(horizontal: float, vertical: float) -> list[Operation]:
    degrees = [math.degrees(math.atan(horizontal)), math.degrees(math.atan(vertical))]
    matrix = functional._get_inverse_affine_matrix([0.0, 0.0], 0.0, [0.0, 0.0], scale=1.0, shear=degrees)
    return _affine_operation(*matrix)


_TRIVIAL_OPERATIONS: dict[str, Callable[[float], list[Operation]]] = {
    "Identity": lambda _: [],
    "ShearX": lambda magnitude: _shear_operation(magnitude, 0.0),
    "ShearY": lambda magnitude: _shear_operation(0.0, magnitude),
    "TranslateX": lambda magnitude: _affine_operation(1, 0, -int(magnitude), 0, 1, 0),
    "TranslateY": lambda magnitude: _affine_operation(1, 0, 0, 0, 1, -int(magnitude)),
    "Rotate": lambda magnitude: [Operation(auto_augment.rotate, (magnitude,), _NEAREST_ON_BLACK)],
    "Brightness": lambda magnitude: [Operation(auto_augment.brightness, (1.0 + magnitude,))],
    "Color": lambda magnitude: [Operation(auto_augment.color, (1.0 + magnitude,))],
    "Contrast": lambda magnitude: [Operation(auto_augment.contrast, (1.0 + magnitude,))],
    "Sharpness": lambda magnitude: [Operation(auto_augment.sharpness, (1.0 + magnitude,))],
    "Posterize": lambda magnitude: [Operation(auto_augment.posterize, (int(magnitude),))],
    "Solarize": lambda magnitude: [Operation(auto_augment.solarize, (magnitude,))],
    "AutoContrast": lambda _: [Operation(auto_augment.auto_contrast)],
    "Equalize": lambda _: [Operation(auto_augment.equalize)],
}


# Operations on batches


def _batch_operation(operation: Operation, width: int, height: int) -> tuple[Arguments, Arguments]:
    """Return the function of `batch_operations` with its shared options, and the arguments of this image."""
    name = operation.function.__name__.lstrip("_")
    if name == "desaturate":
        return ("color",), (min(1.0, max(0.0, 1.0 - operation.arguments[0])),)
    if name not in _AFFINE_COEFFICIENTS:
        return (name,), operation.arguments
    coefficients = tuple(_AFFINE_COEFFICIENTS[name](operation.arguments[0], width, height))
    filter = Image.Resampling(operation.options["resample"]).name.lower()
    a, b, c, d, e, f = coefficients
    axis = "horizontal" if (d, e, f) == (0, 1, 0) else "vertical" if (a, b, c) == (1, 0, 0) else "both"
    return ("affine", filter, axis, tuple(operation.options["fillcolor"])), coefficients


def _rotation(degrees: float, width: int, height: int) -> tuple[float, ...]:
    """Return the coefficients of Pillow's Image.rotate about the center."""
    radians = -math.radians(degrees % 360)
    cosine, sine, x, y = math.cos(radians), math.sin(radians), width / 2, height / 2
    return (cosine, sine, x - cosine * x - sine * y, -sine, cosine, y + sine * x - cosine * y)


_AFFINE_COEFFICIENTS: dict[str, Callable[[Any, int, int], Sequence[float]]] = {
    "shear_x": lambda factor, width, height: (1, factor, 0, 0, 1, 0),
    "shear_y": lambda factor, width, height: (1, 0, 0, factor, 1, 0),
    "translate_x_abs": lambda pixels, width, height: (1, 0, pixels, 0, 1, 0),
    "translate_y_abs": lambda pixels, width, height: (1, 0, 0, 0, 1, pixels),
    "translate_x_rel": lambda fraction, width, height: (1, 0, fraction * width, 0, 1, 0),
    "translate_y_rel": lambda fraction, width, height: (1, 0, 0, 0, 1, fraction * height),
    "rotate": _rotation,
    "transform": lambda coefficients, width, height: coefficients,
}
"""(a, b, c, d, e, f) of Pillow's affine transform."""
