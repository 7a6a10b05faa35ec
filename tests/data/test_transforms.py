"""Transforms: every option of the recipe has an effect, policies run on any Pillow, evaluation geometry."""

import contextlib
import dataclasses
import random
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
import yaml
from helpers.sample_images import NO_AUGMENT, write_image
from PIL import Image

from data.crops import RandomResizedCrop
from data.transforms import channel_statistics, evaluation_transform, train_transform
from vil.config import AugmentConfig, DataConfig
from vil.errors import UserError
from vil.runtime.seeding import seeded

RECIPE = "rand-m9-mstd0.5-inc1"
POLICIES = [
    RECIPE,
    "rand-m9-n3-mstd101",
    "rand-m9-tweights",
    "augmix-m3-w3",
    "augmix-m5-w4-d2-b1",
    "original",
]
POLICIES += ["originalr-mstd0.5", "v0", "v0r", "3a", "trivial"]


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "a.png"
    write_image(path, 3, (80, 60))
    with Image.open(path) as image:
        return image.convert("RGB")


def apply(image, augment, times=24, size=32, in_chans=3, data=None):
    """(times, in_chans, size, size): views number 0, 1, ... of an image."""
    transform = train_transform(augment, data or DataConfig(), image_size=size, in_chans=in_chans)
    views = []
    for view in range(times):
        with seeded(0, "test", view):
            views.append(transform(image))
    return torch.stack(views)


BASE = {**NO_AUGMENT, "crop": "random_resized"}
EFFECTS = [
    # (the options it is tried with, the option, another value)
    (NO_AUGMENT, "crop", "random_resized"),
    (NO_AUGMENT, "crop", "pad_random"),
    (NO_AUGMENT, "crop", "resize_random"),
    (NO_AUGMENT, "crop", "eval_resize_random"),
    (BASE, "scale", (0.5, 0.6)),
    (BASE, "ratio", (1.0, 1.0)),
    ({**NO_AUGMENT, "crop": "pad_random"}, "pad", 8),
    ({**NO_AUGMENT, "crop": "resize_random"}, "pad", 0),
    (NO_AUGMENT, "hflip", 0.5),
    (NO_AUGMENT, "vflip", 0.5),
    (NO_AUGMENT, "interpolation", "bicubic"),
    (BASE, "interpolation", "random"),
    (NO_AUGMENT, "color_jitter", 0.4),
    (NO_AUGMENT, "auto_augment", RECIPE),
    ({**NO_AUGMENT, "auto_augment": RECIPE}, "aug_splits", 3),
    (NO_AUGMENT, "random_erasing", 0.5),
    ({**NO_AUGMENT, "random_erasing": 1.0}, "random_erasing_mode", "const"),
    ({**NO_AUGMENT, "random_erasing": 1.0}, "random_erasing_mode", "rand"),
    ({**NO_AUGMENT, "random_erasing": 1.0}, "random_erasing_count", 3),
]


@pytest.mark.parametrize(("options", "field", "value"), EFFECTS, ids=[f"{f}={v}" for _, f, v in EFFECTS])
def test_every_option_has_an_effect(image, options, field, value):
    assert not torch.equal(
        apply(image, AugmentConfig(**options)), apply(image, AugmentConfig(**{**options, field: value}))
    )


def test_the_list_of_effects_is_complete():
    elsewhere = {
        "mixup",
        "cutmix",
        "cutmix_minmax",
        "mixup_prob",
        "mixup_switch_prob",
        "mixup_mode",
        "mixup_until",
        "repeated_augmentation",
    }
    tried = {field for _, field, _ in EFFECTS}
    assert tried | elsewhere == {field.name for field in dataclasses.fields(AugmentConfig)}


def test_without_augmentation_every_view_is_the_evaluation_image(image):
    views = apply(image, AugmentConfig(**NO_AUGMENT))
    data = DataConfig(crop_pct=1.0, interpolation="bilinear")
    assert torch.equal(views[0], evaluation_transform(data, image_size=32, in_chans=3)(image))
    assert all(torch.equal(view, views[0]) for view in views)


def test_flips_are_flips_with_their_probability(image):
    plain = apply(image, AugmentConfig(**NO_AUGMENT), times=1)[0]
    for field, axis in (("hflip", 2), ("vflip", 1)):
        flipped = apply(image, AugmentConfig(**{**NO_AUGMENT, field: 1.0}), times=4)
        assert all(torch.equal(view, plain.flip(axis)) for view in flipped)
        some = apply(image, AugmentConfig(**{**NO_AUGMENT, field: 0.25}), times=400)
        share = np.mean([not torch.equal(view, plain) for view in some])
        assert 0.15 < share < 0.35


def offset(crop, whole):
    """Return the only (row, column) at which a crop (3, 32, 32) lies in an image (3, H, W)."""
    windows = whole.unfold(1, 32, 1).unfold(2, 32, 1)  # (3, rows, columns, 32, 32)
    (found,) = torch.isclose(windows, crop[:, None, None]).all(dim=(0, 3, 4)).nonzero().tolist()
    return tuple(found)


def test_pad_random_shifts_by_up_to_pad_and_pads_with_black(image):
    square = image.resize((32, 32))
    plain = apply(square, AugmentConfig(**NO_AUGMENT), times=1)[0]
    black = ((0 - torch.tensor(DataConfig().mean)) / torch.tensor(DataConfig().std))[:, None, None]
    padded = black.expand(3, 32 + 8, 32 + 8).clone()
    padded[:, 4:-4, 4:-4] = plain
    augment = AugmentConfig(**{**NO_AUGMENT, "crop": "pad_random", "pad": 4})
    shifts = {offset(view, padded) for view in apply(square, augment, times=100)}
    assert {y for y, _ in shifts} == {x for _, x in shifts} == set(range(9))


def test_eval_resize_random_crops_anywhere_of_the_image_as_evaluation_resizes_it(image):
    data = DataConfig(crop_pct=0.8, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1))
    augment = AugmentConfig(**{**NO_AUGMENT, "crop": "eval_resize_random", "interpolation": "bicubic"})
    resized = image.resize((53, 40), Image.Resampling.BICUBIC)  # the short side: 32 / 0.8
    whole = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255  # (3, 40, 53)
    transform = train_transform(augment, data, image_size=32, in_chans=3)
    offsets = set()
    for view in range(400):
        with seeded(0, "test", view):
            offsets.add(offset(transform(image), whole))
    assert {y for y, _ in offsets} == set(range(9))
    assert {x for _, x in offsets} == set(range(22))
    center = evaluation_transform(data, image_size=32, in_chans=3)(image)
    assert torch.allclose(center, whole[:, 4:36, 10:42])


def test_the_recipe_of_fine_tuning_is_the_papers():
    """416, random crop 384, flip, label smoothing 0.1: appendix and code of the paper."""
    path = Path(__file__).parents[2] / "configs/schedules/finetune_384.yaml"
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert recipe["label_smoothing"] == 0.1
    augment = AugmentConfig(**recipe["augment"])
    assert dataclasses.replace(augment, crop="random_resized") == AugmentConfig(interpolation="bicubic")
    pil_image = Image.new("RGB", (600, 500))
    transform = train_transform(augment, DataConfig(crop_pct=0.922), image_size=384, in_chans=3)
    resize, crop = transform.crop.steps
    assert resize(pil_image).size == (499, 416)
    assert crop(resize(pil_image)).size == (384, 384)
    assert crop.padding is None


def test_resize_random_keeps_the_short_side_and_moves_along_the_long_one(image):
    wide = apply(image, AugmentConfig(**NO_AUGMENT), size=60, times=1)[0]  # 80×60: no resize at 60
    options = {**NO_AUGMENT, "crop": "resize_random", "pad": 0}
    views = apply(image, AugmentConfig(**options), size=60, times=60)
    full = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (DataConfig().mean, DataConfig().std))
    full = (full - mean) / std
    offsets = {x for view in views for x in range(21) if torch.allclose(view, full[:, :, x : x + 60])}
    assert torch.allclose(wide, full[:, :, 10:70])
    assert len(offsets) > 12


def test_color_jitter_is_ignored_with_a_policy_except_3a(image):
    def differs(policy):
        with_jitter, without = (
            apply(image, AugmentConfig(**NO_AUGMENT, auto_augment=policy, color_jitter=strength))
            for strength in (0.4, 0.0)
        )
        return not torch.equal(with_jitter, without)

    assert not differs(RECIPE)
    assert differs("3a")


def test_const_erasing_is_zero_after_normalization(image):
    augment = AugmentConfig(**NO_AUGMENT, random_erasing=1.0, random_erasing_mode="const")
    plain = apply(image, AugmentConfig(**NO_AUGMENT), times=1)[0]
    for view in apply(image, augment, times=8):
        changed = (view != plain).any(0)
        assert changed.any()
        assert (view[:, changed] == 0).all()


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_policies_run_on_gray_and_rgb(image, policy, in_chans):
    augment = AugmentConfig(auto_augment=policy, random_erasing=0.25, color_jitter=0.4)
    pil_image = image if in_chans == 3 else image.convert("L")
    views = apply(pil_image, augment, times=100, in_chans=in_chans)
    assert views.shape == (100, in_chans, 32, 32)
    assert views.isfinite().all()


@pytest.mark.parametrize("policy", [RECIPE, "rand-m9-mstd0.5-mmax20-inc1", "v0"])
def test_randaugment_runs_thousands_of_times(image, policy):
    """Pillow 13 rejects posterize with 0 bits, which these policies draw occasionally."""
    from timm.data import auto_augment

    transform = train_transform(AugmentConfig(auto_augment=policy), DataConfig(), image_size=16, in_chans=3)
    small = image.resize((20, 20))
    bits = []

    def counting(pil_image, bits_to_keep, **options):
        bits.append(bits_to_keep)
        return patched(pil_image, bits_to_keep, **options)

    step = next(
        s for s in transform.augment if isinstance(s, (auto_augment.RandAugment, auto_augment.AutoAugment))
    )
    sub_policies = getattr(step, "policy", None) or [step.ops]
    posterizes = [op for ops in sub_policies for op in ops if op.name.startswith("Posterize")]
    assert posterizes
    patched = posterizes[0].aug_fn
    for operation in posterizes:
        assert operation.aug_fn is not auto_augment.posterize
        operation.aug_fn = counting
    for view in range(2000):
        with seeded(0, "test", view):
            assert transform(small).isfinite().all()
    assert min(bits) <= 0  # the case occurred


def test_posterize_without_bits_is_black_and_otherwise_timms():
    from timm.data import auto_augment

    from data.policies import _posterize

    for mode in ("L", "RGB"):
        noise = Image.effect_noise((16, 16), 90).convert(mode)
        for bits in (0, -3):
            black = _posterize(noise, bits, fillcolor=(1, 2, 3))
            assert (black.mode, black.size) == (mode, (16, 16))
            assert not np.asarray(black).any()
        for bits in (1, 4, 8):
            assert np.array_equal(_posterize(noise, bits), auto_augment.posterize(noise, bits))
    if int(PIL.__version__.split(".")[0]) < 13:
        assert not np.asarray(auto_augment.posterize(noise, 0)).any()


def test_timm_itself_is_not_patched(image):
    from timm.data import auto_augment

    train_transform(AugmentConfig(auto_augment=RECIPE), DataConfig(), image_size=16, in_chans=3)
    assert auto_augment.NAME_TO_OP["PosterizeIncreasing"] is auto_augment.posterize
    assert auto_augment.posterize.__module__ == "timm.data.auto_augment"


@pytest.mark.parametrize(
    "policy",
    [
        "randaugment",
        "rand-m9-foo1",
        "rand-m9-inc",
        "augmix-n3",
        "rand-mx",
        "rand-m9-tnone",
        "v1",
        "",
        "augmix-m9-a0",
        "augmix-m9-a0.0",
        "augmix-a0.01",
        "augmix-w0",
        "augmix-w1000000",
        "rand-m" + "9" * 5000,
        "rand-m9-mstd" + "9" * 400,
        "rand-m³",
    ],
)
def test_unknown_policies_are_rejected(policy):
    with pytest.raises(UserError) as error:
        train_transform(AugmentConfig(auto_augment=policy), DataConfig(), image_size=32, in_chans=3)
    assert error.value.location == "schedule.augment.auto_augment"


def test_evaluation_resizes_the_short_side_and_crops_the_center(image):
    data = DataConfig(crop_pct=0.8, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1))
    out = evaluation_transform(data, image_size=32, in_chans=3)(image)  # 80×60 -> 53×40 -> 32×32
    resized = image.resize((53, 40), Image.Resampling.BICUBIC)
    box = resized.crop((10, 4, 42, 36))
    assert torch.equal(out, torch.from_numpy(np.asarray(box).copy()).permute(2, 0, 1) / 255)


@pytest.mark.parametrize("name", ["nearest", "bilinear", "lanczos"])
def test_evaluation_interpolation_has_an_effect(image, name):
    bicubic, other = (
        evaluation_transform(DataConfig(interpolation=i), image_size=32, in_chans=3)(image)
        for i in ("bicubic", name)
    )
    assert not torch.equal(bicubic, other)


def test_gray_images_take_the_average_statistics(image):
    data = DataConfig(mean=(0.1, 0.2, 0.6), std=(0.2, 0.3, 0.4), crop_pct=1.0)
    mean, std = channel_statistics(data, 1)
    assert mean == pytest.approx((0.3,))
    assert std == pytest.approx((0.3,))
    gray = image.convert("L").resize((32, 32))
    out = evaluation_transform(data, image_size=32, in_chans=1)(gray)
    expected = (torch.from_numpy(np.asarray(gray).copy())[None] / 255 - 0.3) / 0.3
    assert torch.allclose(out, expected, atol=1e-6)


def test_seeded_restores_the_generators_and_depends_on_its_key_alone():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002

    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    expected = [draw() for _ in range(3)]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    with seeded(5, "augmentation", 1, 2, 3):
        first = draw()
    assert draw() == expected[0]
    with contextlib.suppress(RuntimeError), seeded(5, "augmentation", 1, 2, 3):
        again = draw()
        raise RuntimeError
    assert again == first
    assert draw() == expected[1]
    others = []
    for seed, purpose, key in (
        (6, "augmentation", (1, 2, 3)),
        (5, "mixing", (1, 2, 3)),
        (5, "augmentation", (1, 2, 4)),
    ):
        with seeded(seed, purpose, *key):
            others.append(draw())
    assert all(a != b for other in others for a, b in zip(other, first))
    assert draw() == expected[2]


def test_the_recipe_runs_over_photographs(photographs):
    from data.sources import open_source

    source = open_source(DataConfig(source="folder", root=photographs), "train", 3)
    augment = AugmentConfig(auto_augment=RECIPE, random_erasing=0.25)
    transform = train_transform(augment, DataConfig(), image_size=64, in_chans=3)
    for index in range(0, len(source), 2):
        pil_image = source.load(index)[0]
        for view in range(4):
            with seeded(0, "test", index, view):
                out = transform(pil_image)
            assert out.shape == (3, 64, 64)
            assert out.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [{"scale": (1e-12, 1e-12)}, {"ratio": (1e-3, 1e-3)}, {"ratio": (1e3, 1e3)}, {"scale": (1e-5, 1.0)}],
    ids=str,
)
def test_a_crop_has_at_least_one_pixel(image, options):
    """timm rounds a side of less than half a pixel to 0."""
    views = apply(image, AugmentConfig(**BASE | options), times=50)
    assert views.shape == (50, 3, 32, 32)
    assert views.isfinite().all()
    crop = RandomResizedCrop(
        32, options.get("scale", (0.08, 1.0)), options.get("ratio", (0.75, 4 / 3)), "random"
    )
    random.seed(0)
    for width, height in ((1, 1), (1, 300), (300, 1), (9, 7)):
        for _ in range(50):
            (top, left, rows, columns), _ = crop.draw(width, height)
            assert 0 <= top < top + rows <= height
            assert 0 <= left < left + columns <= width
