"""Training of a part of a model: what is frozen, its mode, and what is saved for the backward pass."""

from pathlib import Path

import pytest
import timm
import torch
from helpers.tiny_run import CPU, STEPS, TinyModel, load_last, make_config, run
from torch import nn

import vil
from vil.checkpoints import run_folder
from vil.errors import UserError
from vil.runtime.epoch_steps import EpochSteps
from vil.training.model_updater import ModelUpdater
from vil.training.trainable import PartialTraining, classifiers


class AttentiveModel(TinyModel):
    """The tiny model with a module named attn."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.attn = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Dropout(dropout))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.norm(self.stem(x) + self.position).relu())
        return self.head(self.attn(x).mean((2, 3)))


def small_vil() -> nn.Module:
    stages = [{"dim": 8, "heads": 2, "patch": 4, "window": 2}, {"dim": 16, "heads": 2, "attention": "full"}]
    options = {"drop_path": 0.5, "dropout": 0.1, "head_dropout": 0.1}
    return vil.create_model("vil", stages=stages, image_size=16, num_classes=3, **options)


def small_vit(**options) -> nn.Module:
    options = {"img_size": 32, "num_classes": 3, "depth": 2, "embed_dim": 24, "num_heads": 2, **options}
    return timm.create_model("vit_tiny_patch16_224", drop_rate=0.1, drop_path_rate=0.5, **options)


def trainable_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def training_names(model: nn.Module, kinds: tuple[str, ...]) -> set[str]:
    return {name for name, m in model.named_modules() if m.training and type(m).__name__ in kinds}


@pytest.mark.parametrize("build", [small_vil, small_vit])
def test_head_trains_the_classifier_alone(build):
    model = build()
    PartialTraining(model, "head").set_training_mode()
    assert trainable_names(model) == {"head.weight", "head.bias"}
    kinds = ("Dropout", "DropPath", "LayerNorm", "GELU")
    assert training_names(model, kinds) == {"head_drop"}
    assert model.training


def test_all_heads_of_a_distilled_model_are_trained():
    options = {"img_size": 32, "num_classes": 3, "depth": 1, "embed_dim": 24, "num_heads": 2}
    model = timm.create_model("deit_tiny_distilled_patch16_224", **options)
    PartialTraining(model, "head")
    assert trainable_names(model) == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


@pytest.mark.parametrize(("build", "blocks"), [(small_vil, 2), (small_vit, 2)])
def test_attention_trains_attention_and_classifier(build, blocks: int):
    model = build()
    PartialTraining(model, "attention").set_training_mode()
    names = trainable_names(model)
    assert names == {n for n, _ in model.named_parameters() if ".attn." in n or n.startswith("head.")}
    assert len({name.partition(".attn.")[0] for name in names if ".attn." in name}) == blocks
    dropout = training_names(model, ("Dropout",))
    assert any(".attn." in name for name in dropout)
    assert not any(".mlp." in name for name in dropout)
    assert training_names(model, ("LayerNorm",)) == set()
    assert training_names(model, ("DropPath",))  # it regularizes the attention that is trained


def test_batch_norm_of_a_frozen_backbone_keeps_its_statistics(tmp_path: Path):
    model = TinyModel(norm=nn.BatchNorm2d)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    run(make_config(tmp_path, trainable="head", ema_decay=0.5, epochs=1), model)
    state = load_last(tmp_path)
    for key, value in before.items():
        assert torch.equal(state["model"][key], value) != key.startswith("head."), key
        assert torch.equal(state["ema"][key], value) != key.startswith("head."), key


def test_a_container_of_the_classifier_keeps_its_dropout():
    model = timm.create_model("convnext_atto", num_classes=3, drop_rate=0.1, drop_path_rate=0.2)
    PartialTraining(model, "head").set_training_mode()
    assert trainable_names(model) == {"head.fc.weight", "head.fc.bias"}
    assert training_names(model, ("Dropout", "DropPath")) == {"head.drop"}


@pytest.mark.parametrize("trainable", ["head", "attention"])
def test_gradients_are_those_of_a_whole_model(trainable: str):
    def gradients(part: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = vil.create_model(
            "vil", stages=[{"dim": 8, "heads": 2, "patch": 4}], image_size=16, num_classes=3
        )
        PartialTraining(model, part).set_training_mode()
        model(torch.ones(2, 3, 16, 16)).square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    whole, part = gradients("all"), gradients(trainable)
    assert 0 < len(part) < len(whole)
    for name, value in part.items():
        torch.testing.assert_close(value, whole[name])


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_head_saves_no_activation_of_the_backbone(tmp_path: Path, gradient_checkpointing: bool):
    shapes = []
    model = small_vil()
    config = make_config(tmp_path, trainable="head", gradient_checkpointing=gradient_checkpointing)
    updater = ModelUpdater(model, config, CPU, EpochSteps.constant(STEPS))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
        updater.accumulate(torch.zeros(5, 3, 16, 16), torch.zeros(5, dtype=torch.int64), 0)
    # Only (batch, width) before the classifier, (batch, classes) behind it, its weight, and the targets.
    allowed = {(5, 16), (5, 3), (3, 16), (16, 3), (5,), ()}
    assert {tuple(shape) for shape in shapes} <= allowed
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        "head.weight",
        "head.bias",
    ]


def test_the_optimizer_has_the_trainable_parameters(tmp_path: Path):
    options = {"layer_decay": 0.5, "weight_decay": 0.1, "epochs": 1}
    run(make_config(tmp_path / "head", trainable="head", **options))
    groups = load_last(tmp_path / "head")["optimizer"]["param_groups"]
    assert [(len(g["params"]), g["weight_decay"], g["lr_scale"]) for g in groups] == [
        (1, 0.1, 1.0),
        (1, 0.0, 1.0),
    ]
    run(make_config(tmp_path / "attention", trainable="attention", **options), AttentiveModel())
    state = load_last(tmp_path / "attention")
    assert sum(len(group["params"]) for group in state["optimizer"]["param_groups"]) == 4


@pytest.mark.parametrize("clip_mode", ["norm", "value", "agc"])
def test_gradients_of_a_part_are_clipped(tmp_path: Path, clip_mode: str):
    run(make_config(tmp_path, trainable="head", clip_grad=0.1, clip_mode=clip_mode, epochs=1))


@pytest.mark.parametrize("trainable", ["head", "attention"])
def test_an_interrupted_run_continues_exactly(tmp_path: Path, trainable: str):
    options = {"trainable": trainable, "ema_decay": 0.9, "epochs": 2}
    run(make_config(tmp_path / "whole", **options), AttentiveModel(0.2))
    run(make_config(tmp_path / "part", max_steps=7, **options), AttentiveModel(0.2))
    model = AttentiveModel(0.2)
    run(make_config(tmp_path / "part", **options), model, state=load_last(tmp_path / "part"))
    whole, part = load_last(tmp_path / "whole"), load_last(tmp_path / "part")
    for key in whole["model"]:
        assert torch.equal(whole["model"][key], part["model"][key]), key
        assert torch.equal(whole["ema"][key], part["ema"][key]), key
    assert all(parameter.requires_grad for parameter in model.parameters())  # after the run


@pytest.mark.parametrize(
    ("trainable", "model", "reason"),
    [
        ("attention", TinyModel(), "attention: TinyModel has no attention modules (named attn)"),
        ("head", nn.Conv2d(3, 4, 1), "head: Conv2d has no classifier"),
    ],
)
def test_a_part_that_the_model_lacks_is_refused(trainable, model, reason):
    with pytest.raises(UserError) as refused:
        PartialTraining(model, trainable)
    assert str(refused.value) == f"schedule.trainable: {reason}"


def test_a_model_without_classes_has_no_classifier():
    model = small_vit(num_classes=0)
    assert not any(list(head.parameters()) for head in classifiers(model))
    with pytest.raises(UserError, match=r"^schedule.trainable: head: VisionTransformer has no classifier$"):
        PartialTraining(model, "head")


def test_a_continued_run_keeps_its_trainable_part(tmp_path: Path):
    run(make_config(tmp_path, trainable="head", max_steps=2))
    with pytest.raises(UserError) as refused:
        run_folder.open_run(tmp_path, make_config(tmp_path, trainable="all", max_steps=2))
    reason = f"the run in {tmp_path} has head, not all; name another output or keep its value"
    assert str(refused.value) == f"schedule.trainable: {reason}"
