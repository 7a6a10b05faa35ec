"""The distillation token: its position, its head, costs, weights, and timm's distillation tasks."""

import dataclasses
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import vil
from vil.checkpoints.weights import Weights
from vil.config import ModelConfig, StageConfig
from vil.errors import UserError
from vil.evaluation.complexity import measure_complexity
from vil.models import model_from_config
from vil.models.multiscale_vit import MultiScaleViT
from vil.training.trainable import PartialTraining

STAGES = [
    StageConfig(dim=8, heads=2, patch=4, window=2),
    StageConfig(dim=16, heads=2, attention="full", global_tokens=2),
]
CONFIG = ModelConfig(
    name="vil", image_size=32, num_classes=3, stages=STAGES, distillation_token=True, pool="cls"
)
FLAT = dataclasses.replace(CONFIG, stages=[dataclasses.replace(STAGES[1], patch=8)])
MODELS = {
    "multi-scale": CONFIG,
    "flat": FLAT,
    "average": dataclasses.replace(CONFIG, pool="avg"),
    "no class token": dataclasses.replace(CONFIG, pool="avg", global_tokens=[1, 0]),
    "absolute": dataclasses.replace(CONFIG, position="absolute"),
    "carried": dataclasses.replace(CONFIG, stage_globals="carry", global_tokens=2),
}


def build(config: ModelConfig = CONFIG) -> MultiScaleViT:
    torch.manual_seed(0)
    model = model_from_config(config)
    assert isinstance(model, MultiScaleViT)
    return model


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_logits_are_those_of_two_heads(config: ModelConfig):
    model = build(config)
    tokens = model.forward_features(images())
    index = model.config.stages[-1].global_tokens  # the distillation token follows the class tokens
    token, others = tokens[:, index], torch.cat([tokens[:, :index], tokens[:, index + 1 :]], dim=1)
    features = others[:, 0] if config.pool == "cls" else others.mean(dim=1)
    logits, dist = model.head(features), model.head_dist(token)
    torch.testing.assert_close(model(images()), (logits + dist) / 2)  # also in train mode, as in timm
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), (features + token) / 2)
    model.set_distilled_training()
    for found, expected in zip(model(images()), (logits, dist), strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(model.eval()(images()), (logits + dist) / 2)


def test_the_token_comes_before_external_tokens():
    """With carried global tokens too, which have rows of the bias tables as without the token."""
    model = build(MODELS["carried"]).eval()
    external = torch.randn(2, 5, 8)
    stage = model.stages[-1]
    with torch.no_grad():
        stage.dist_token.fill_(7.0)
        stage.blocks = nn.ModuleList()  # the tokens as they enter the stage
        model.norm = nn.Identity()
        tokens = model.forward_features(images(), external)
    assert tokens.shape == (2, 2 + 1 + 5 + 16, 16)
    assert (tokens[:, 2] == 7).all()
    assert not (tokens[:, :2] == 7).any()
    assert not (tokens[:, 3:] == 7).any()


def test_rows_of_position_and_bias():
    absolute, relative = build(MODELS["absolute"]), build()
    assert absolute.stages[-1].position.globals.shape == (3, 16)
    assert relative.stages[-1].blocks[0].attn.global_bias.among.shape == (2, 3, 3)
    assert relative.stages[-1].global_tokens.shape == (1, 2, 16)
    assert relative.stages[0].dist_token is None


@pytest.mark.parametrize("config", [CONFIG, FLAT], ids=["multi-scale", "flat"])
def test_costs_are_those_of_one_more_global_token_and_a_second_head(config: ModelConfig):
    stages = [*config.stages[:-1], dataclasses.replace(config.stages[-1], global_tokens=3)]
    other = dataclasses.replace(config, stages=stages, distillation_token=False)
    found, expected = (measure_complexity(build(c), 32, 3) for c in (config, other))
    assert found.params == expected.params + 17 * 3
    assert found.flops == expected.flops + 16 * 3


def test_both_heads_are_replaced():
    model = build()
    assert model.get_classifier() == (model.head, model.head_dist)
    model.reset_classifier(5, "avg")
    assert [head.out_features for head in model.get_classifier()] == [5, 5]
    assert model(images()).shape == (2, 5)
    assert not model.head_dist.bias.any()
    model.reset_classifier(0)
    assert model(images()).shape == (2, 16)
    model.reset_classifier(0, "")
    assert model(images()).shape == (2, 3 + 16, 16)


def test_the_token_is_needed_for_distilled_training():
    with pytest.raises(UserError) as refusal:
        build(dataclasses.replace(CONFIG, distillation_token=False)).set_distilled_training()
    assert str(refusal.value) == "distillation_token: must be true: the model has only one head"
    with pytest.raises(UserError, match=r"^distillation_token: timm/resnet10t has no such option"):
        model_from_config(ModelConfig("timm/resnet10t", num_classes=3, distillation_token=True))
    with pytest.raises(UserError) as refusal:
        build().reset_classifier(3, "")
    assert str(refusal.value) == "pool: must be avg or cls for a model with a distillation token"
    with pytest.raises(UserError, match=r"^pool: cls needs a global token in the last stage, which has none"):
        build(dataclasses.replace(CONFIG, global_tokens=[1, 0]))


def test_groups_of_parameters():
    model = build()
    assert "stages.1.dist_token" in model.no_weight_decay()
    layers = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert layers["stages.1.dist_token"] == layers["stages.1.global_tokens"]
    assert layers["head_dist.weight"] == layers["head.weight"]
    PartialTraining(model, "head")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


def test_size_of_images_maps_and_features():
    model = build().eval()
    model.set_input_size(48)
    assert model(torch.randn(1, 3, 48, 48)).shape == (1, 3)
    maps = model.attention_maps(torch.randn(1, 3, 48, 48))
    assert maps[-1][0].from_globals.to_globals.shape[2:] == (3, 3)
    features = vil.create_model(
        "vil", image_size=32, stages=STAGES, distillation_token=True, features_only=True
    )
    assert [f.shape[1] for f in features(images())] == [8, 16]


def test_rows_of_both_heads_are_found_by_the_names_of_the_classes():
    source = build()
    weights = Weights("x", "run", "raw", source.state_dict(), CONFIG, class_names=("a", "b", "c"))
    model = build(dataclasses.replace(CONFIG, num_classes=2))
    weights.initialize(model, ("c", "new"), (32, 32))
    for name in ("head", "head_dist"):
        assert torch.equal(getattr(model, name).weight[0], getattr(source, name).weight[2])
    # A head with more rows keeps its first ones; a model without classes has no head.
    model = weights.build_model(num_classes=2)
    assert torch.equal(model.head_dist.weight, source.head_dist.weight[:2])
    assert weights.build_model(num_classes=0)(images()).shape == (2, 16)
    # Weights of a model without the token do not fit.
    plain = build(dataclasses.replace(CONFIG, distillation_token=False))
    with pytest.raises(
        UserError, match="x: does not fit the model, it is of another architecture; 3 missing: "
    ):
        Weights("x", "run", "raw", plain.state_dict(), CONFIG).build_model()


def test_timm_builds_saves_and_loads_it(tmp_path: Path):
    options = {"img_size": 32, "stages": [dataclasses.asdict(s) for s in STAGES], "distillation_token": True}
    model = timm.create_model("vil", num_classes=3, **options).eval()
    assert model.pretrained_cfg["classifier"] == ("head", "head_dist")
    torch.save(model.state_dict(), tmp_path / "x.pt")
    loaded = timm.create_model("vil", num_classes=3, checkpoint_path=str(tmp_path / "x.pt"), **options).eval()
    assert torch.equal(loaded(images()), model(images()))
    overlay = {"file": str(tmp_path / "x.pt"), "num_classes": 3}
    loaded = timm.create_model(
        "vil", num_classes=5, pretrained=True, pretrained_cfg_overlay=overlay, **options
    )
    assert torch.equal(loaded.stages[1].dist_token, model.stages[1].dist_token)  # and both heads are new
    features = timm.create_model(
        "vil", checkpoint_path=str(tmp_path / "x.pt"), features_only=True, **options
    ).eval()
    assert torch.equal(features(images())[1], model.forward_intermediates(images())[1][1])


@pytest.fixture
def distillation_tasks():
    """timm's distillation tasks, which version 1.0.21 lacks."""
    tasks = pytest.importorskip("timm.task")
    return tasks.LogitDistillationTask, tasks.TokenDistillationTask


def train_step(task: nn.Module, student: nn.Module) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.AdamW(student.parameters())
    result = task.train()(images(), torch.tensor([0, 2]))
    result["loss"].backward()
    optimizer.step()
    return result


def test_students_and_teachers_of_timms_distillation_tasks(distillation_tasks):
    logit_task, token_task = distillation_tasks
    student, plain = build(), build(dataclasses.replace(CONFIG, distillation_token=False))
    teacher = build(FLAT)
    heads = [parameter.detach().clone() for parameter in student.head_dist.parameters()]
    result = train_step(token_task(student, teacher, distill_type="hard", verbose=False), student)
    assert set(result) == {"loss", "output", "task_loss", "distill_loss"}
    assert any(not torch.equal(a, b) for a, b in zip(heads, student.head_dist.parameters()))
    result = train_step(logit_task(plain, teacher, temperature=3.0, verbose=False), plain)
    assert set(result) == {"loss", "output", "task_loss", "kd_loss"}
    with pytest.raises(UserError, match=r"^distillation_token: must be true: the model has only one head"):
        token_task(plain, teacher, verbose=False)


def test_timms_tasks_create_a_teacher_by_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, distillation_tasks
):
    """They pass device and dtype; the weights are those of a file."""
    source = timm.create_model("vil_tiny", img_size=32, num_classes=3, blocks=(1, 1, 1, 1))
    torch.save(source.state_dict(), tmp_path / "x.pt")
    created = {}
    original = timm.task.distillation.create_model

    def create_model(model_name: str, **options):
        created.update(options)
        return original(model_name, img_size=32, blocks=(1, 1, 1, 1), **options)

    monkeypatch.setattr(timm.task.distillation, "create_model", create_model)
    student = build()
    task = distillation_tasks[1](
        student,
        "vil_tiny",
        teacher_pretrained_path=str(tmp_path / "x.pt"),
        device=torch.device("cpu"),
        dtype=torch.float32,
        verbose=False,
    )
    assert {"device", "dtype"} <= created.keys()
    assert torch.equal(task.teacher.model.head.weight, source.head.weight)
    assert train_step(task, student)["loss"].isfinite()
