"""Mixing: mixup and CutMix by their definitions, a function of (seed, step, rank, part)."""

import numpy as np
import pytest
import torch
from helpers.sample_images import generator_states

from data.mixing import Mixing
from vil.config import AugmentConfig
from vil.errors import UserError
from vil.runtime.seeding import seeded

CLASSES = 7


def batch(size=8, side=12):
    """Images of one value each, 1..size, so that mixing weights can be read off them."""
    values = torch.arange(1.0, size + 1)
    return values[:, None, None, None].expand(size, 3, side, side).clone(), torch.arange(size) % CLASSES


def mix(augment, label_smoothing=0.0, seed=0, size=8, step=0, rank=0, part=0, epoch=0):
    mixing = Mixing(augment, CLASSES, label_smoothing, seed)
    return mixing(*batch(size), step=step, rank=rank, part=part, epoch=epoch)


def one_hot(targets):
    return torch.nn.functional.one_hot(targets, CLASSES).float()


@pytest.mark.parametrize("augment", [AugmentConfig(), AugmentConfig(mixup=0.8, mixup_until=3)])
def test_without_mixing_a_batch_is_unchanged(augment):
    images, targets = batch(5)  # an odd batch is allowed
    mixing = Mixing(augment, CLASSES, 0.1, 0)
    out, out_targets = mixing(images, targets, step=9, rank=0, part=0, epoch=3)
    assert out is images
    assert out_targets is targets


def test_mixup_until_is_the_first_epoch_without():
    augment = AugmentConfig(cutmix=1.0, mixup_until=3)
    assert mix(augment, epoch=2)[1].ndim == 2
    assert mix(augment, epoch=3)[1].ndim == 1


def test_cutmix_minmax_draws_the_sides_of_the_rectangle():
    augment = AugmentConfig(cutmix_minmax=(0.25, 0.5))
    images, _ = batch()
    for step in range(20):
        out, soft = mix(augment, step=step)
        replaced = (out != images).any(1)  # (B, H, W)
        height, width = replaced.any(2).sum(1), replaced.any(1).sum(1)
        assert ((height >= 3) & (height <= 6) & (width >= 3) & (width <= 6)).all()
        # The first and the last image have the same class.
        assert torch.allclose(soft.amax(1)[1:-1], (1 - height * width / 144)[1:-1], atol=1e-6)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_images_and_targets_are_mixed_by_the_same_weight(mode, mixup, cutmix):
    augment = AugmentConfig(mixup=mixup, cutmix=cutmix, mixup_mode=mode)
    images, targets = batch()
    mixed_somewhere = False
    for step in range(20):
        out, soft = mix(augment, step=step)
        assert soft.shape == (8, CLASSES)
        # image i is a weighted mean of i and its mirrored index; so are its pixels' means and its targets
        values, mirror = images.mean((1, 2, 3)), images.flip(0).mean((1, 2, 3))
        weight = (out.mean((1, 2, 3)) - mirror) / (values - mirror)
        assert ((weight > -1e-5) & (weight < 1 + 1e-5)).all()
        expected = one_hot(targets) * weight[:, None] + one_hot(targets.flip(0)) * (1 - weight[:, None])
        assert torch.allclose(soft, expected, atol=1e-4)
        if mode == "batch":
            assert torch.allclose(weight, weight[0].expand(8), atol=1e-5)
        if mode == "pair":
            assert torch.allclose(weight, weight.flip(0), atol=1e-5)
        if mode == "elem":
            mixed_somewhere |= not torch.allclose(weight, weight.flip(0), atol=1e-3)
        if cutmix == 0:
            assert torch.allclose(out, out[:, :1, :1, :1].expand_as(out))  # a blend, not a patch
        if mixup == 0:
            assert all(len(image.unique()) <= 2 for image in out)  # a patch, not a blend
    assert mode != "elem" or mixed_somewhere


def test_a_draw_is_a_function_of_seed_step_rank_and_part():
    augment = AugmentConfig(mixup=0.8, cutmix=1.0)
    base = {"seed": 3, "step": 4, "rank": 1, "part": 1}
    expected = mix(augment, **base)
    with seeded(99, "test"):
        again = mix(augment, **base)
    assert torch.equal(expected[0], again[0])
    assert torch.equal(expected[1], again[1])
    for name in base:
        assert not torch.equal(mix(augment, **{**base, name: 2})[1], expected[1])


def test_mixing_does_not_change_global_generators():
    states = generator_states()
    mix(AugmentConfig(mixup=0.8))
    assert generator_states() == states


def test_label_smoothing_is_in_the_soft_targets():
    augment = AugmentConfig(mixup=0.8)
    hard, smooth = mix(augment)[1], mix(augment, label_smoothing=0.1)[1]
    assert torch.allclose(smooth, hard * 0.9 + 0.1 / CLASSES, atol=1e-6)
    assert torch.allclose(smooth.sum(1), torch.ones(8))


def test_probability_and_switch_probability():
    def share(seen, **options):
        return np.mean([seen(mix(AugmentConfig(**options), step=step)) for step in range(200)])

    def mixed(result):
        return not torch.equal(result[0], batch()[0])

    def cut(result):
        return any(len(image.unique()) == 2 for image in result[0])

    assert share(mixed, mixup=0.8) == 1
    assert share(mixed, mixup=0.8, mixup_prob=0.0) == 0
    assert 0.2 < share(mixed, mixup=0.8, mixup_prob=0.3) < 0.4
    assert share(cut, mixup=0.8, cutmix=1.0, mixup_switch_prob=0.0) == 0
    assert share(cut, mixup=0.8, cutmix=1.0, mixup_switch_prob=1.0) > 0.9
    assert 0.15 < share(cut, mixup=0.8, cutmix=1.0, mixup_switch_prob=0.3) < 0.4


def test_alpha_is_the_parameter_of_the_beta_distribution():
    def larger_weight(alpha):
        augment = AugmentConfig(mixup=alpha)
        return np.mean([float(mix(augment, step=step)[1][1].max()) for step in range(100)])

    assert larger_weight(0.1) > 0.85  # near one image or the other
    assert larger_weight(50) < 0.6  # near the middle


@pytest.mark.parametrize("alpha", [1e-6, 1e6])
def test_the_widest_alphas_mix_finitely(alpha):
    augment = AugmentConfig(mixup=alpha, cutmix=alpha)
    for step in range(200):
        assert all(value.isfinite().all() for value in mix(augment, step=step))


def test_mixup_until_zero_is_off_from_the_start():
    assert mix(AugmentConfig(mixup=1.0, mixup_until=0), epoch=0)[1].ndim == 1


def test_an_odd_batch_is_rejected():
    with pytest.raises(UserError) as error:
        mix(AugmentConfig(mixup=0.8), size=7)
    assert error.value.location == "schedule.batch_size"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_gpu_results_equal_those_of_the_cpu(mode):
    augment = AugmentConfig(mixup=0.8, cutmix=1.0, mixup_mode=mode)
    for step in range(5):
        images, targets = batch()
        mixing = Mixing(augment, CLASSES, 0.1, 0)
        out, soft = mixing(images.cuda(), targets.cuda(), step=step, rank=0, part=0, epoch=0)
        expected = mix(augment, label_smoothing=0.1, step=step)
        assert torch.allclose(out.cpu(), expected[0])
        assert torch.allclose(soft.cpu(), expected[1])
