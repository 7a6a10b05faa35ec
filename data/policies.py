"""Augmentation policies of timm and torchvision: the grammar of their names, and their operations."""

from __future__ import annotations

import re
from collections.abc import Sequence

from PIL import Image
from timm.data import auto_augment, create_transform
from torchvision import transforms

from data.crops import ImageOperation
from vil.config import AugmentConfig, Size
from vil.errors import UserError

TRIVIAL_AUGMENT = "trivial"
"""The policy of torchvision's TrivialAugmentWide; all others are timm's."""


def policy_operations(
    augment: AugmentConfig, size: Size, mean: tuple[float, ...]
) -> Sequence[ImageOperation]:
    """Return the operations of `augment.auto_augment`, else of the color jitter; none if both are off.

    Args:
        augment: the options.
        size: (height, width) of the images; it limits translations.
        mean: mean per channel, of values in 0..1: the color of the area beside moved images.

    Raises:
        UserError: an unknown policy.
    """
    _check_policy(augment.auto_augment)
    if augment.auto_augment == TRIVIAL_AUGMENT:
        return [transforms.TrivialAugmentWide()]
    _, operations, _ = create_transform(
        size,
        is_training=True,
        separate=True,
        color_jitter=augment.color_jitter or None,  # type: ignore[arg-type]  # timm's annotation lacks None
        auto_augment=augment.auto_augment,
        interpolation=augment.interpolation,
        mean=mean,
    )
    policy: Sequence[ImageOperation] = operations.transforms
    for step in policy:
        patch_posterize(step)
    return policy


def _posterize(image: Image.Image, bits_to_keep: int, **options: object) -> Image.Image:
    """Posterize as timm does, but return black for 0 bits, which Pillow 13 rejects."""
    if bits_to_keep <= 0:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **options)


def patch_posterize(policy: ImageOperation) -> None:
    """Replace posterize in a policy of timm by one that accepts 0 bits; timm itself is not changed."""
    if isinstance(policy, auto_augment.AutoAugment):
        operations = [operation for sub_policy in policy.policy for operation in sub_policy]
    else:
        operations = getattr(policy, "ops", [])  # RandAugment and AugMix; color jitter has none
    for operation in operations:
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterize


_INTEGER, _NUMBER = "[0-9]{1,4}", r"[0-9]{1,4}(\.[0-9]{1,6})?"
_ALPHA = r"[1-9][0-9]{0,3}(\.[0-9]{1,6})?|0\.[1-9][0-9]{0,5}"  # below 0.1 a Dirichlet distribution draws nan
_POLICY_SECTIONS: dict[str, dict[str, str]] = {
    "rand": {
        "m": _INTEGER,
        "n": "[1-9]",
        "p": _NUMBER,
        "mstd": _NUMBER,
        "mmax": "[1-9][0-9]{0,3}",
        "inc": "[01]",
        "t": "weights|3aw|3a",
    },
    "augmix": {
        "m": _INTEGER,
        "w": "[1-9][0-9]?",
        "d": "[0-9]{1,2}",
        "a": _ALPHA,
        "b": "[01]",
        "mstd": _NUMBER,
    },
    **{name: {"mstd": _NUMBER} for name in ("original", "originalr", "v0", "v0r", "3a")},
    TRIVIAL_AUGMENT: {},
}
"""timm's grammar of policies, e.g. rand-m9-mstd0.5-inc1: name -> section -> pattern of its value."""


def _check_policy(policy: str | None) -> None:
    """Raise UserError for sections that timm ignores or that fail its assertions."""
    if policy is None:
        return
    name, *sections = policy.split("-")
    grammar, reason = _POLICY_SECTIONS.get(name, {}), None
    if name not in _POLICY_SECTIONS:
        reason = f"unknown policy {name!r} in {policy!r}; expected one of {', '.join(_POLICY_SECTIONS)}"
    for section in sections:
        if not any(re.fullmatch(f"{letter}({value})", section) for letter, value in grammar.items()):
            known = ", ".join(grammar)
            reason = (
                reason or f"invalid section {section!r} in {policy!r}; expected one of {known}, with a value"
            )
    if reason is not None:
        raise UserError("schedule.augment.auto_augment", reason)
