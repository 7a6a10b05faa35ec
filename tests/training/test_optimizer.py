import dataclasses
import io
import math
from collections.abc import Iterable
from pathlib import Path

import pytest
import timm
import torch
from helpers.run_files import is_equal
from helpers.tiny_run import TinyModel, make_batch
from timm.optim import list_optimizers
from torch import nn

from vil.command_line import parse
from vil.config import ScheduleConfig, TrainConfig
from vil.errors import UserError
from vil.runtime.epoch_steps import EpochSteps
from vil.training.optimizer import (
    build_optimizer,
    build_scheduler,
    clipped_parameters,
    load_optimizer_state,
    parameter_groups,
    peak_learning_rate,
    undecayed_parameters,
)


def rates(schedule: ScheduleConfig, steps_per_epoch: int, total: int | None = None) -> list[float]:
    optimizer = build_optimizer(nn.Linear(2, 2), schedule)
    scheduler = build_scheduler(optimizer, schedule, EpochSteps.constant(steps_per_epoch))
    learning_rates = []
    for step in range(total or schedule.epochs * steps_per_epoch):
        scheduler.step_update(step)
        learning_rates.append(optimizer.param_groups[0]["lr"])
    return learning_rates


def test_cosine_that_begins_with_the_run_as_in_the_papers_code():
    schedule = ScheduleConfig(
        epochs=10, lr=1e-3, warmup_epochs=1.5, warmup_factor=0.002, min_lr=1e-6, warmup_prefix=False
    )
    lr = rates(schedule, steps_per_epoch=4)
    assert lr[0] == pytest.approx(2e-6)
    assert lr[5] == pytest.approx(2e-6 + (1e-3 - 2e-6) * 5 / 6)
    for step in (6, 20, 39):
        expected = 1e-6 + (1e-3 - 1e-6) * (1 + math.cos(math.pi * step / 39)) / 2
        assert lr[step] == pytest.approx(expected), step
    assert lr[39] == pytest.approx(1e-6)
    with_prefix = rates(dataclasses.replace(schedule, warmup_prefix=True), steps_per_epoch=4)
    assert sum(with_prefix[6:]) > sum(lr[6:])


def test_recipes_set_warmup_prefix():
    for name in ("vil_300", "vil_22k_90", "deit_300", "deit3_800", "finetune_384"):
        path = Path(__file__).parents[2] / "configs" / "schedules" / f"{name}.yaml"
        assert parse(TrainConfig, ["--schedule", str(path)]).config.schedule.warmup_prefix is False, name


def test_cosine_with_warmup():
    schedule = ScheduleConfig(epochs=10, lr=1e-3, warmup_epochs=1.5, warmup_factor=0.002, min_lr=1e-6)
    lr = rates(schedule, steps_per_epoch=4)
    assert lr[0] == pytest.approx(2e-6)
    assert lr[3] == pytest.approx((2e-6 + 1e-3) / 2)
    assert lr[6] == pytest.approx(1e-3)
    middle = 6 + (39 - 6) // 3  # a third of the way: cos(π/3) = 1/2
    assert lr[middle] == pytest.approx(1e-6 + (1e-3 - 1e-6) * 0.75)
    assert lr[39] == pytest.approx(1e-6)
    assert lr[6:] == sorted(lr[6:], reverse=True)


def test_fractional_warmup_steps():
    lr = rates(ScheduleConfig(epochs=4, lr=1.0, warmup_epochs=0.25, warmup_factor=0.0), steps_per_epoch=10)
    assert lr[:3] == pytest.approx([0.0, 0.4, 0.8])
    assert lr[3] == pytest.approx(1.0, abs=1e-2)


def test_warmup_longer_than_the_run():
    lr = rates(ScheduleConfig(epochs=1, lr=1.0, warmup_epochs=2, warmup_factor=0.0), steps_per_epoch=4)
    assert lr == pytest.approx([0, 1 / 8, 2 / 8, 3 / 8])


def test_one_single_step():
    assert rates(ScheduleConfig(epochs=1, lr=0.5, warmup_epochs=0), steps_per_epoch=1) == [0.5]


def test_poly_is_a_straight_line():
    schedule = ScheduleConfig(scheduler="poly", epochs=2, lr=1.0, min_lr=0.0, warmup_epochs=0)
    assert rates(schedule, 3) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])


def test_step_drops_every_decay_epochs():
    schedule = ScheduleConfig(
        scheduler="step", epochs=6, lr=1.0, warmup_epochs=0, decay_epochs=2, decay_rate=0.5
    )
    assert rates(schedule, 2) == pytest.approx([1.0] * 4 + [0.5] * 4 + [0.25] * 4)


def test_multistep_drops_at_each_milestone():
    schedule = ScheduleConfig(
        scheduler="multistep", epochs=5, lr=1.0, warmup_epochs=0, decay_milestones=[1, 3.5], decay_rate=0.5
    )
    assert rates(schedule, 2) == pytest.approx([1.0] * 2 + [0.5] * 5 + [0.25] * 3)


@pytest.mark.parametrize("has_prefix", [True, False])
@pytest.mark.parametrize("scheduler", ["cosine", "poly"])
def test_the_cooldown_stays_at_the_last_rate(scheduler: str, has_prefix: bool):
    schedule = ScheduleConfig(
        scheduler=scheduler, epochs=4, warmup_epochs=1, min_lr=1e-5, warmup_prefix=has_prefix
    )
    cooled = dataclasses.replace(schedule, cooldown_epochs=2)
    assert cooled.total_epochs == 6
    assert rates(cooled, 3, 18) == rates(schedule, 3) + [1e-5] * 6


@pytest.mark.parametrize("scheduler", ["cosine", "poly"])
@pytest.mark.parametrize(
    ("steps", "warmup", "expected"),
    [(1, 0, [1.0]), (2, 0, [1.0, 0.0]), (2, 1, [0.0, 1.0]), (3, 1, [0.0, 1.0, 0.0]), (2, 4, [0.0, 0.25])],
)
def test_shortest_runs_without_a_warning(
    scheduler: str, steps: int, warmup: int, expected: list[float], caplog: pytest.LogCaptureFixture
):
    schedule = ScheduleConfig(
        scheduler=scheduler, epochs=steps, lr=1.0, min_lr=0.0, warmup_epochs=warmup, warmup_factor=0.0
    )
    assert rates(schedule, steps_per_epoch=1) == pytest.approx(expected)
    assert caplog.records == []


def test_constant_after_warmup():
    schedule = ScheduleConfig(scheduler="constant", epochs=3, lr=1.0, warmup_epochs=1, warmup_factor=0.0)
    assert rates(schedule, 2) == pytest.approx([0.0, 0.5, 1, 1, 1, 1])


def test_rate_is_a_function_of_the_step():
    schedule = ScheduleConfig(epochs=5, warmup_epochs=1)
    optimizer = build_optimizer(nn.Linear(2, 2), schedule)
    scheduler = build_scheduler(optimizer, schedule, EpochSteps.constant(4))
    scheduler.step_update(13)
    assert optimizer.param_groups[0]["lr"] == rates(schedule, 4)[13]


def test_linear_scaling_with_the_batch():
    schedule = ScheduleConfig(
        batch_size=64, lr=5e-4, lr_batch_size=512, warmup_epochs=1, warmup_factor=0.5, epochs=2
    )
    lr = rates(schedule, steps_per_epoch=2)
    assert lr[0] == pytest.approx(5e-4 / 8 / 2)
    assert max(lr) == pytest.approx(5e-4 / 8)


@pytest.mark.parametrize("scheduler", ["cosine", "poly", "multistep"])
def test_schedules_count_in_epochs_if_their_lengths_change(scheduler: str):
    schedule = ScheduleConfig(
        scheduler=scheduler,
        epochs=6,
        warmup_epochs=1.5,
        min_lr=1e-5,
        decay_milestones=[3, 5] if scheduler == "multistep" else None,
    )
    constant = rates(schedule, 8)
    steps = EpochSteps(((0, 8), (2, 4), (4, 16)))
    optimizer = build_optimizer(nn.Linear(2, 2), schedule)
    changing = build_scheduler(optimizer, schedule, steps)
    for epoch in range(6):
        changing.step_update(steps.scheduled_time(steps.first_step(epoch)))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(constant[8 * epoch], rel=0.15), epoch
    changing.step_update(steps.scheduled_time(steps.first_step(6) - 1))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(constant[-1])


def test_square_root_scaling_with_the_batch():
    schedule = ScheduleConfig(batch_size=64, lr=1e-3, lr_batch_size=1024, lr_scaling="sqrt")
    assert peak_learning_rate(schedule) == pytest.approx(1e-3 / 4)


def test_groups_of_a_tiny_module():
    assert undecayed_parameters(TinyModel(), decay_biases=False) == {
        "stem.bias",
        "norm.weight",
        "norm.bias",
        "position",
        "head.bias",
    }
    assert undecayed_parameters(TinyModel(), decay_biases=True) == {
        "norm.weight",
        "norm.bias",
        "position",
        "head.bias",
    }


def test_groups_of_a_timm_model():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=3)
    plain, biased = (undecayed_parameters(model, decay_biases) for decay_biases in (False, True))
    names = {name for name, _ in model.named_parameters()}
    assert names - plain == {
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
        "head.weight",
    }
    assert plain - biased == {
        name.replace("weight", "bias") for name in names - plain if not name.startswith("head")
    }


def test_every_trainable_parameter_is_in_one_group():
    model = TinyModel()
    model.stem.weight.requires_grad = False
    groups = parameter_groups(model, ScheduleConfig(weight_decay=0.1, layer_decay=0.5))
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {p for p in model.parameters() if p.requires_grad}
    decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
    assert [p for p in grouped if decay[p]] == [model.head.weight]
    assert decay[model.head.weight] == 0.1


def test_layer_decay_scales_the_rate_of_each_layer():
    model = TinyModel()
    schedule = ScheduleConfig(lr=1.0, layer_decay=0.5, warmup_epochs=0, scheduler="constant")
    optimizer = build_optimizer(model, schedule)
    build_scheduler(optimizer, schedule, EpochSteps.constant(1)).step_update(0)
    rate = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rate[model.head.weight] == rate[model.head.bias] == 1.0
    assert rate[model.norm.weight] == 0.5
    assert rate[model.stem.weight] == rate[model.position] == 0.25


def test_layer_decay_has_a_smallest_factor():
    groups = parameter_groups(TinyModel(), ScheduleConfig(layer_decay=0.5, layer_decay_min=0.4))
    assert {group["lr_scale"] for group in groups} == {1.0, 0.5, 0.4}


def test_layer_decay_without_a_group_matcher():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert parameter_groups(model, ScheduleConfig(layer_decay=0.5))  # one layer: timm groups them by order


@pytest.mark.parametrize("lookahead", ["", "lookahead_"])
@pytest.mark.parametrize("name", list_optimizers())
def test_every_optimizer_of_timm_continues_exactly(name: str, lookahead: str):
    """Some keep counters in their parameter groups, which the configured options must not replace."""
    schedule = ScheduleConfig(optimizer=lookahead + name, lr=1e-3, weight_decay=0.1)
    try:
        build_optimizer(TinyModel(), schedule)
    except UserError as error:
        pytest.skip(str(error))

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
        for step in steps:
            images, targets = make_batch(step, 4)
            nn.functional.cross_entropy(model(images), targets).backward()
            optimizer.step()
            optimizer.zero_grad()

    # Lookahead updates its slow weights every sixth step: here in the twelfth, after the interruption.
    models = [TinyModel() for _ in range(2)]
    optimizers = [build_optimizer(model, schedule) for model in models]
    with torch.compiler.set_stance("force_eager"):  # kron compiles
        train(models[0], optimizers[0], range(7))
        file = io.BytesIO()
        torch.save((models[0].state_dict(), optimizers[0].state_dict()), file)
        file.seek(0)
        weights, state = torch.load(file, weights_only=True)
        models[1].load_state_dict(weights)
        load_optimizer_state(optimizers[1], state)
        torch.manual_seed(0)  # some draw
        train(models[0], optimizers[0], range(7, 13))
        torch.manual_seed(0)
        train(models[1], optimizers[1], range(7, 13))
    weights, continued = (model.state_dict() for model in models)
    assert not torch.equal(weights["head.weight"], TinyModel().head.weight)
    assert is_equal(weights, continued)


def test_options_reach_the_optimizer():
    model = TinyModel()
    adam = build_optimizer(model, ScheduleConfig(betas=(0.5, 0.6), eps=1e-3, weight_decay=0.3)).param_groups
    assert all(group["betas"] == (0.5, 0.6) and group["eps"] == 1e-3 for group in adam)
    assert {group["weight_decay"] for group in adam} == {0.0, 0.3}
    sgd = build_optimizer(model, ScheduleConfig(optimizer="momentum", momentum=0.7, dampening=0.8))
    assert all(group["momentum"] == 0.7 and group["dampening"] == 0.8 for group in sgd.param_groups)


def test_further_options_reach_the_optimizer():
    options = {"max_grad_norm": None, "trust_clip": True}
    (group, *_) = build_optimizer(
        TinyModel(), ScheduleConfig(optimizer="lookahead_lamb", optimizer_options=options)
    ).param_groups
    assert (group["max_grad_norm"], group["trust_clip"]) == (None, True)
    three = {"betas": [0.9, 0.99, 0.999]}  # the schedule has two
    (group, *_) = build_optimizer(
        TinyModel(), ScheduleConfig(optimizer="adan", optimizer_options=three)
    ).param_groups
    assert group["betas"] == (0.9, 0.99, 0.999)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"optimizer_options": {"nesterov": True}},
            "optimizer_options.nesterov: adamw has no such option; expected one of amsgrad, maximize",
        ),
        ({"optimizer_options": {"betas": [0.8, 0.9]}}, "optimizer_options.betas: is set by schedule.betas"),
        (
            {"optimizer_options": {"fused": False}},
            "optimizer_options.fused: cannot be set: the trainer chooses the implementation",
        ),
        ({"optimizer_options": {"amsgrad": 1}}, "optimizer_options.amsgrad: expected true or false, got 1"),
        (
            {"optimizer": "muon", "optimizer_options": {"ns_steps": "many"}},
            "optimizer_options: muon: '<=' not supported between instances of 'str' and 'int'",
        ),
        (
            {"lr_scaling": "sqrt"},
            "lr_scaling: sqrt needs schedule.lr_batch_size or schedule.scale_lr_with_batch_size",
        ),
        ({"layer_decay_min": 0.1}, "layer_decay_min: needs schedule.layer_decay"),
        ({"decay_milestones": [1.0]}, "decay_milestones: needs schedule.scheduler multistep"),
        ({"scheduler": "multistep"}, "decay_milestones: is needed by schedule.scheduler multistep"),
    ],
)
def test_options_that_do_not_go_together(options: dict, message: str):
    with pytest.raises(UserError) as caught:
        rates(ScheduleConfig(**options), 1, 1)
    assert str(caught.value) == f"schedule.{message}"


def test_a_checkpoint_without_the_maxima_of_amsgrad_is_refused():
    """The fused kernel would read past the end of what it holds."""
    optimizers = [
        build_optimizer(TinyModel(), ScheduleConfig(optimizer_options={"amsgrad": amsgrad}))
        for amsgrad in (False, True)
    ]
    for parameter in optimizers[0].param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizers[0].step()
    with pytest.raises(ValueError, match="max_exp_avg_sq of parameter 0 is missing or of another shape"):
        load_optimizer_state(optimizers[1], optimizers[0].state_dict())


@pytest.mark.parametrize(
    ("options", "key", "message"),
    [
        ({"optimizer": "adamm"}, "schedule.optimizer", "did you mean adam?"),
        ({"optimizer": "adahessian"}, "schedule.optimizer", "second derivatives: not supported"),
        ({"optimizer": "adamw", "dampening": 0.5}, "schedule.dampening", "momentum"),
        ({"optimizer": "sgd", "dampening": 0.5}, "schedule.dampening", "without Nesterov"),
        (
            {"optimizer": "sgd", "momentum": 0.0},
            "schedule.optimizer",
            "sgd: Nesterov momentum requires a momentum",
        ),
        ({"optimizer": "bnbadam"}, "schedule.optimizer", "bnbadam: "),
        ({"optimizer": "bnbsgd", "dampening": 0.5}, "schedule.optimizer", "bnbsgd: "),
    ],
)
def test_impossible_optimizers(options: dict, key: str, message: str):
    with pytest.raises(UserError) as caught:
        build_optimizer(TinyModel(), ScheduleConfig(**options))
    assert caught.value.location == key
    assert message in caught.value.reason
    assert "\n" not in caught.value.reason


def test_adaptive_clipping_excludes_the_head():
    model = TinyModel()
    assert model.head.weight in set(clipped_parameters(model, "norm"))
    assert set(clipped_parameters(model, "agc")) == set(model.parameters()) - set(model.head.parameters())


def test_cosine_matches_its_formula_over_a_long_run():
    schedule = ScheduleConfig(epochs=300, warmup_epochs=5, lr=1e-3, min_lr=1e-6)
    lr, last, start = rates(schedule, 3), 899, 15
    for step in (15, 100, 450, 898):
        phase = math.pi * (step - start) / (last - start)
        assert lr[step] == pytest.approx(1e-6 + (1e-3 - 1e-6) * (1 + math.cos(phase)) / 2)
