"""The recipe's augmentation for images that are decoded in batches: drawn first, carried out where they are.

What happens to an image is drawn by the recipe itself: timm's and torchvision's own policies run on a `Plan`,
which writes down what they call for. It is then carried out on one image by Pillow (`on_image`), as for
every other source, or on a whole batch on a GPU (`on_batch`, `finished`). The same key of a view draws the
same as for the other sources, so all of them train on the same distribution, view for view.
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
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional

from data import batch_operations as batch
from data.transforms import Box, RandomFlip, RandomResizedCrop, Transform


class Step(NamedTuple):
    """An operation on an image: `operation(image, *arguments, **options)`."""

    operation: Callable[..., Image.Image]
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = {}  # noqa: RUF012


class Patch(NamedTuple):
    """What random erasing puts over a part of a normalised image; values are (C, rows, columns)."""

    rows: slice
    columns: slice
    values: Tensor


@dataclass
class Plan:
    """All that is drawn for one view of an image."""

    box: Box
    interpolation: str
    flips: list[RandomFlip] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    patches: list[Patch] = field(default_factory=list)


class Planner:
    """Draws plans from the global generators, as `transform` would draw them for an image.

    Args:
        transform: of training images; it must be one that `plannable` is true for.
    """

    def __init__(self, transform: Transform) -> None:
        assert isinstance(transform.crop, RandomResizedCrop)
        self._crop = transform.crop
        self._flips = transform.flips
        self._draws = [_draw(copy.deepcopy(step)) for step in transform.augment]
        self._erasing = transform.erasing
        self._size = transform.crop.size

    def __call__(self, width: int, height: int) -> Plan:
        """The plan of one view of an image of this size, in pixels."""
        plan = Plan(*self._crop.draw(width, height))
        plan.flips = [flip for flip in self._flips if flip.drawn()]
        for draw in self._draws:
            draw(plan)
        if isinstance(self._erasing, RandomErasing):
            self._erasing._erase(_Erased(plan), 3, self._size, self._size, torch.float32)
        return plan


def plannable(transform: Transform) -> bool:
    """Whether all of a training transform can be drawn ahead: an Inception crop, colours, no AugMix."""
    crops = isinstance(transform.crop, RandomResizedCrop) and len(transform.mean) == 3
    return crops and all(isinstance(step, _PLANNABLE) for step in transform.augment)


def on_image(image: Image.Image, steps: Sequence[Step]) -> Image.Image:
    """Carries out a plan's steps by Pillow."""
    for step in steps:
        image = step.operation(image, *step.arguments, **step.options)
    return image


def on_batch(images: Tensor, steps: Sequence[Sequence[Step]]) -> Tensor:
    """Carries out the steps of each image, on whatever device the images are; in place.

    All images whose n-th step is the same operation are changed together.

    Args:
        images: (B, 3, H, W), uint8, contiguous.
        steps: of each image.
    """
    for position in range(max(map(len, steps), default=0)):
        groups: dict[Any, list[tuple[int, tuple[Any, ...]]]] = defaultdict(list)
        for place, planned in enumerate(steps):
            if position < len(planned):
                change, numbers = _for_batch(planned[position], images.shape[-1], images.shape[-2])
                groups[change].append((place, numbers))
        for (name, *options), members in groups.items():
            places = torch.tensor([place for place, _ in members]).to(images.device, non_blocking=True)
            rows = torch.tensor([numbers for _, numbers in members], dtype=torch.float64)
            arguments = rows.to(images.device, non_blocking=True)
            images[places] = _OPERATIONS[name](images[places], arguments, *options)
    return images


def finished(images: Tensor, patches: Sequence[Sequence[Patch]], mean: Tensor, std: Tensor) -> Tensor:
    """Normalises a batch and erases parts of it.

    Args:
        images: (B, 3, H, W), uint8.
        patches: of each image.
        mean: of the channels, for values in 0..1, on the images' device.
        std: likewise.

    Returns:
        (B, 3, H, W), float32.
    """
    normalised = images.float().div_(255).sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))
    for image, of_image in zip(normalised, patches):
        for rows, columns, values in of_image:
            image[:, rows, columns] = values.to(image.device, non_blocking=True)
    return normalised


# What the policies of timm and torchvision draw.

_PLANNABLE = (
    auto_augment.RandAugment, auto_augment.AutoAugment, transforms.TrivialAugmentWide, transforms.ColorJitter,
)  # fmt: skip
_GEOMETRIC = tuple(
    getattr(auto_augment, name)
    for name in ("shear_x", "shear_y", "translate_x_abs", "translate_y_abs", "translate_x_rel",
                 "translate_y_rel", "rotate")
)  # fmt: skip


def _draw(step: Any) -> Callable[[Plan], None]:
    """A function that has a step draw, and writes down in a plan what it would do."""
    if isinstance(step, transforms.ColorJitter):
        return lambda plan: _draw_color_jitter(step, plan)
    if isinstance(step, transforms.TrivialAugmentWide):
        return lambda plan: _draw_trivial(step, plan)
    sub_policies = step.policy if isinstance(step, auto_augment.AutoAugment) else [step.ops]
    for operation in (operation for sub_policy in sub_policies for operation in sub_policy):
        operation.aug_fn = _recording(operation.aug_fn)
    return step


def _recording(operation: Callable[..., Image.Image]) -> Callable[..., Plan]:
    """In place of an operation of timm: writes down in a plan that it was called, with what arguments."""
    geometric, random_blur = operation in _GEOMETRIC, operation is auto_augment.gaussian_blur_rand

    def record(plan: Plan, *arguments: Any, resample: Any, fillcolor: Any) -> Plan:
        if random_blur:  # the one operation that draws a value of its own; as it does
            radius = random.uniform(0.1, 2.0 * arguments[0])  # noqa: S311
            plan.steps.append(Step(auto_augment.gaussian_blur, (radius,)))
        elif geometric:
            choice = random.choice(resample) if isinstance(resample, (list, tuple)) else resample  # noqa: S311
            plan.steps.append(Step(operation, arguments, {"resample": choice, "fillcolor": fillcolor}))
        else:
            plan.steps.append(Step(operation, arguments))
        return plan

    return record


def _draw_color_jitter(jitter: transforms.ColorJitter, plan: Plan) -> None:
    order, *factors = jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    operations = (auto_augment.brightness, auto_augment.contrast, auto_augment.color)
    for place in order.tolist():
        if place < len(operations) and factors[place] is not None:
            plan.steps.append(Step(operations[place], (factors[place],)))


def _draw_trivial(policy: transforms.TrivialAugmentWide, plan: Plan) -> None:
    """The draws of TrivialAugmentWide.forward, one after the other."""
    space = policy._augmentation_space(policy.num_magnitude_bins)
    name = list(space)[int(torch.randint(len(space), (1,)).item())]
    magnitudes, signed = space[name]
    drawn = torch.randint(len(magnitudes), (1,)) if magnitudes.ndim > 0 else None
    magnitude = 0.0 if drawn is None else float(magnitudes[drawn].item())
    if signed and torch.randint(2, (1,)):
        magnitude = -magnitude
    plan.steps += _TRIVIAL[name](magnitude)


def _moved(*coefficients: float) -> Step:
    return Step(_transform, (coefficients,), {"resample": Image.Resampling.NEAREST, "fillcolor": (0, 0, 0)})


def _transform(
    image: Image.Image, coefficients: Sequence[float], resample: Any, fillcolor: Any
) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, resample, fillcolor=fillcolor)


def _sheared(horizontal: float, vertical: float) -> Step:
    degrees = [math.degrees(math.atan(horizontal)), math.degrees(math.atan(vertical))]
    return _moved(
        *functional._get_inverse_affine_matrix([0.0, 0.0], angle=0.0, translate=[0.0, 0.0], scale=1.0,
                                               shear=degrees)
    )  # fmt: skip


def _enhanced(operation: Callable[..., Image.Image]) -> Callable[[float], list[Step]]:
    return lambda magnitude: [Step(operation, (1.0 + magnitude,))]


_TRIVIAL: dict[str, Callable[[float], list[Step]]] = {
    "Identity": lambda _: [],
    "ShearX": lambda magnitude: [_sheared(magnitude, 0.0)],
    "ShearY": lambda magnitude: [_sheared(0.0, magnitude)],
    "TranslateX": lambda magnitude: [_moved(1, 0, -int(magnitude), 0, 1, 0)],
    "TranslateY": lambda magnitude: [_moved(1, 0, 0, 0, 1, -int(magnitude))],
    "Rotate": lambda magnitude: [
        Step(auto_augment.rotate, (magnitude,),
             {"resample": Image.Resampling.NEAREST, "fillcolor": (0, 0, 0)})
    ],
    "Brightness": _enhanced(auto_augment.brightness),
    "Color": _enhanced(auto_augment.color),
    "Contrast": _enhanced(auto_augment.contrast),
    "Sharpness": _enhanced(auto_augment.sharpness),
    "Posterize": lambda magnitude: [Step(auto_augment.posterize, (int(magnitude),))],
    "Solarize": lambda magnitude: [Step(auto_augment.solarize, (magnitude,))],
    "AutoContrast": lambda _: [Step(auto_augment.auto_contrast)],
    "Equalize": lambda _: [Step(auto_augment.equalize)],
}  # fmt: skip


class _Erased:
    """In place of a normalised image: what timm's random erasing would write to it goes into a plan."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def __setitem__(self, place: tuple[slice, slice, slice], values: Tensor) -> None:
        self._plan.patches.append(Patch(place[1], place[2], values))


# How a batch is changed: (name in _OPERATIONS, options), equal for all that is done at once; and the numbers
# that each image has of its own.


def _for_batch(step: Step, width: int, height: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    name = step.operation.__name__.lstrip("_")
    if name not in _AFFINE:
        if name == "desaturate":
            return ("color",), (min(1.0, max(0.0, 1.0 - step.arguments[0])),)
        return (name,), step.arguments
    coefficients = _AFFINE[name](step.arguments[0], width, height)
    filter = Image.Resampling(step.options["resample"]).name.lower()
    a, b, _, d, e, f = coefficients
    moves = "horizontal" if (d, e, f) == (0, 1, 0) else "vertical" if (a, b) == (1, 0) else "both"
    if moves == "vertical" and coefficients[2] != 0:
        moves = "both"
    return ("affine", filter, moves, tuple(step.options["fillcolor"])), tuple(coefficients)


def _rotation(degrees: float, width: int, height: int) -> tuple[float, ...]:
    """Of Pillow's Image.rotate, around the centre."""
    radians = -math.radians(degrees % 360)
    cosine, sine, x, y = math.cos(radians), math.sin(radians), width / 2, height / 2
    return (cosine, sine, x - cosine * x - sine * y, -sine, cosine, y + sine * x - cosine * y)


_AFFINE: dict[str, Callable[[Any, int, int], Sequence[float]]] = {
    "shear_x": lambda factor, width, height: (1, factor, 0, 0, 1, 0),
    "shear_y": lambda factor, width, height: (1, 0, 0, factor, 1, 0),
    "translate_x_abs": lambda pixels, width, height: (1, 0, pixels, 0, 1, 0),
    "translate_y_abs": lambda pixels, width, height: (1, 0, 0, 0, 1, pixels),
    "translate_x_rel": lambda part, width, height: (1, 0, part * width, 0, 1, 0),
    "translate_y_rel": lambda part, width, height: (1, 0, 0, 0, 1, part * height),
    "rotate": _rotation,
    "transform": lambda coefficients, width, height: coefficients,
}


def _affine(images: Tensor, coefficients: Tensor, filter: str, moves: str, fill: tuple[int, ...]) -> Tensor:
    color = torch.tensor(fill, dtype=torch.uint8, device=images.device)
    return batch.affine(images, coefficients, filter=filter, fill=color, moves=moves)


def _alone(operation: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda images, _: operation(images)


def _with_number(operation: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda images, arguments: operation(images, arguments[:, 0])


_OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "affine": _affine,
    **{
        operation.__name__: _alone(operation)
        for operation in (batch.invert, batch.auto_contrast, batch.equalize)
    },
    **{
        operation.__name__: _with_number(operation)
        for operation in (
            batch.posterize, batch.solarize, batch.solarize_add, batch.brightness, batch.contrast,
            batch.color, batch.sharpness, batch.gaussian_blur,
        )
    },
}  # fmt: skip
