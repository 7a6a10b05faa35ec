"""Loading weights into models: exact fit, resizing, cutting, and errors that name every difference."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import vil
from vil.checkpoints.adaptation import load_state_dict
from vil.checkpoints.loading import load_released
from vil.checkpoints.open import open_weights
from vil.checkpoints.safetensors_file import write_safetensors
from vil.checkpoints.weights import Weights, timm_weights
from vil.config import ModelConfig, StageConfig
from vil.errors import UserError
from vil.models.state_dict import translate_state_dict
from vil.models.zoo import model_from_config
from vil.runtime.class_names import imagenet_22k_classes, imagenet_classes

PARITY = sorted(filter(Path.is_dir, (Path(__file__).parents[1] / "fixtures" / "parity").iterdir()))
STAGES = [
    StageConfig(dim=8, heads=2, patch=4, window=2),
    StageConfig(dim=16, heads=2, attention="full", position="absolute"),
    StageConfig(dim=16, heads=2, attention="full", global_tokens=0),
]
CONFIG = ModelConfig(name="vil", image_size=32, num_classes=6, stages=STAGES, mask="exact", pool="avg")


def random_weights(config: ModelConfig, seed: int = 1) -> Weights:
    torch.manual_seed(seed)
    weights = {
        name: torch.randn(value.shape) if value.is_floating_point() else value
        for name, value in model_from_config(config).state_dict().items()
    }
    return Weights("x.pt", "run", "raw", weights, config)


def test_weights_that_fit_are_loaded() -> None:
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    load_state_dict(target, source.state_dict(), "x.pt")
    assert torch.equal(target.weight, source.weight)


def test_every_difference_is_named_on_one_line() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = nn.Sequential(nn.Linear(4, 2), nn.Identity(), nn.Linear(2, 2))
    with pytest.raises(UserError) as caught:
        load_state_dict(model, other.state_dict(), "x.pt")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("x.pt: ")
    assert "2 missing: 1.weight, 1.bias" in message
    assert "2 unexpected: 2.weight, 2.bias" in message
    assert "0.weight is (2, 4), the model's (2, 3)" in message
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_weights_that_depend_on_the_image_size_are_resized(caplog: pytest.LogCaptureFixture) -> None:
    """As the model itself does when it is set to another size; the parity fixtures contain the results."""
    file = random_weights(CONFIG)
    with caplog.at_level("INFO", logger="vil"):
        larger = file.build_model(image_size=48)
    same = file.build_model()
    assert all(torch.equal(value, file.state_dict[name]) for name, value in same.state_dict().items())
    same.set_input_size(48)
    for name, value in larger.state_dict().items():
        torch.testing.assert_close(value, same.state_dict()[name], atol=1e-6, rtol=1e-6)
    lines = [record.getMessage() for record in caplog.records]
    assert sorted(line.split(":")[0] for line in lines) == [
        "stages.1.position.columns",
        "stages.1.position.rows",
        "stages.2.blocks.0.attn.bias_table",
    ]
    assert "stages.1.position.rows: (4, 8) → (6, 8)" in lines


def test_another_window_resizes_the_local_bias_tables(caplog: pytest.LogCaptureFixture) -> None:
    """Bilinearly and without aligned corners, as the paper's code takes window 7 to 12 for 384² images."""
    file, name = random_weights(CONFIG), "stages.0.blocks.0.attn.bias_table"
    model = model_from_config(dataclasses.replace(CONFIG, window=3))
    with caplog.at_level("INFO", logger="vil"):
        file.load_into(model)
    before, after = file.state_dict[name], model.state_dict()[name]
    assert (before.shape, after.shape) == ((2, 7, 7), (2, 11, 11))
    assert f"{name}: (2, 7, 7) → (2, 11, 11)" in caplog.text
    expected = nn.functional.interpolate(before[None], (11, 11), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(after, expected)
    for shape in ((2, 9, 9), (2, 7, 8), (3, 7, 7)):  # tables of no window, or of other heads
        odd = dataclasses.replace(file, state_dict={**file.state_dict, name: torch.zeros(shape)})
        with pytest.raises(UserError, match=r"attn\.bias_table is "):
            odd.load_into(model)


def test_heads(caplog: pytest.LogCaptureFixture) -> None:
    file = random_weights(CONFIG)
    with caplog.at_level("INFO", logger="vil"):
        fewer = file.build_model(num_classes=4)
    assert torch.equal(fewer.head.weight, file.state_dict["head.weight"][:4])
    assert torch.equal(fewer.head.bias, file.state_dict["head.bias"][:4])
    assert "head.weight: (6, 16) → (4, 16), first rows kept" in caplog.text
    with pytest.raises(UserError, match=r"head\.weight is \(6, 16\), the model's \(9, 16\)"):
        file.build_model(num_classes=9)
    none = file.build_model(num_classes=0)
    assert none(torch.randn(1, 3, 32, 32)).shape == (1, 16)


NFC, NFD = "caf\u00e9", "cafe\u0301"


def initialized(
    file: Weights, names: Sequence[str], config: ModelConfig = CONFIG, **options: bool
) -> tuple[nn.Module, nn.Module, str]:
    """Return a model that starts from weights, the same model before, and the line on its head."""
    config = dataclasses.replace(config, num_classes=options.pop("num_classes", len(names)))
    torch.manual_seed(2)
    model = model_from_config(config)
    before = deepcopy(model)
    return model, before, file.initialize(model, names, config.image_size, **options)


def test_rows_of_the_head_are_found_by_the_names_of_the_classes() -> None:
    names = ("ant", "bee", NFC, "dog", "eel", "fox")
    file = dataclasses.replace(random_weights(CONFIG), class_names=names)
    weight, bias = file.state_dict["head.weight"], file.state_dict["head.bias"]
    model, before, line = initialized(file, ("fox", "gnu", NFD, "bee", "Ant", "hen"))
    assert line == "head: 3 of 6 classes from the weights, 3 new"
    for row, old in ((0, 5), (2, 2), (3, 1)):
        assert torch.equal(model.head.weight[row], weight[old])
        assert torch.equal(model.head.bias[row], bias[old])
    new = [1, 4, 5]
    assert torch.equal(model.head.weight[new], before.head.weight[new])
    assert torch.equal(model.head.bias[new], before.head.bias[new])
    assert torch.equal(model.norm.weight, file.state_dict["norm.weight"])
    model, _, line = initialized(file, names[::-1])
    assert line == "head: 6 of 6 classes from the weights"
    assert torch.equal(model.head.weight, weight.flip(0))
    model, before, line = initialized(file, ("bee", "fox"), num_classes=4)  # further rows have no class
    assert line == "head: 2 of 2 classes from the weights"
    assert torch.equal(model.head.weight[:2], weight[[1, 5]])
    assert torch.equal(model.head.weight[2:], before.head.weight[2:])


@pytest.mark.parametrize(
    ("stored", "line"),
    [
        (("a", "b", "c", "d", "e", "f"), "head: new, 6 classes; the weights have none of them"),
        (None, "head: new, 6 classes; the weights do not name their 6 classes"),
    ],
)
def test_a_head_of_other_classes_is_new_even_if_it_fits(stored: tuple[str, ...] | None, line: str) -> None:
    file = dataclasses.replace(random_weights(CONFIG), class_names=stored)
    model, before, found = initialized(file, ("u", "v", "w", "x", "y", "z"))
    assert found == line
    assert torch.equal(model.head.weight, before.head.weight)
    assert torch.equal(model.head.bias, before.head.bias)
    assert torch.equal(model.norm.weight, file.state_dict["norm.weight"])


def test_a_new_head() -> None:
    names = ("a", "b", "c", "d", "e", "f")
    file = dataclasses.replace(random_weights(CONFIG), class_names=names)
    model, before, line = initialized(file, names, new_head=True)
    assert line == "head: new, 6 classes (model.new_head)"
    assert torch.equal(model.head.weight, before.head.weight)
    without = {k: v for k, v in file.state_dict.items() if not k.startswith("head.")}
    model, before, line = initialized(dataclasses.replace(file, state_dict=without), names)
    assert line == "head: new, 6 classes; the weights have no head"
    assert torch.equal(model.head.weight, before.head.weight)
    for other in ({"head.weight": torch.ones(6, 5)}, {"head.bias": torch.tensor(1.0)}, {"head.bias": None}):
        tensors = {name: value for name, value in (file.state_dict | other).items() if value is not None}
        model, before, line = initialized(dataclasses.replace(file, state_dict=tensors), names)
        assert line == "head: new, 6 classes; the head of the weights has other layers"
        assert torch.equal(model.head.weight, before.head.weight)


def test_a_thousand_rows_are_those_of_imagenet_if_the_classes_are_synsets() -> None:
    file = random_weights(dataclasses.replace(CONFIG, num_classes=1000))
    model, _, line = initialized(file, ("n01443537", "n01440764", "a goldfish"))  # rows 1 and 0
    assert line == "head: 2 of 3 classes from the weights, 1 new"
    assert torch.equal(model.head.weight[:2], file.state_dict["head.weight"][[1, 0]])
    _, _, line = initialized(file, [f"class {index}" for index in range(1000)])
    assert line == "head: new, 1000 classes; the weights have none of them"


@pytest.mark.parametrize("has_names", [True, False])
def test_the_head_of_imagenet_22k_has_rows_of_imagenet_by_name(has_names: bool) -> None:
    names, imagenet = imagenet_22k_classes(), imagenet_classes()
    file = random_weights(dataclasses.replace(CONFIG, num_classes=21_841))
    file = dataclasses.replace(file, class_names=names if has_names else None)
    model, before, line = initialized(file, imagenet)
    assert line == "head: 999 of 1000 classes from the weights, 1 new"
    teddy = imagenet.index("n04399382")
    rows = [names.index(name) for name in imagenet if name != "n04399382"]
    assert rows[:6] == [359, 368, 460, 475, 486, 492]  # as in the 22K-to-1K map of Swin's code
    kept = [index for index in range(1000) if index != teddy]
    assert torch.equal(model.head.weight[kept], file.state_dict["head.weight"][rows])
    assert torch.equal(model.head.bias[kept], file.state_dict["head.bias"][rows])
    assert torch.equal(model.head.weight[teddy], before.head.weight[teddy])
    assert (imagenet[0], imagenet[388]) == ("n01440764", "n02510455")


def test_numbers_are_no_names() -> None:
    numbers, letters = tuple("012345"), tuple("abcdef")
    weights_line = "head: new, 6 classes; the weights do not name their 6 classes"
    data_line = "head: new, 6 classes; the data does not name its 6 classes"
    for stored, names, expected in (
        (numbers, numbers, weights_line),
        (("00", *numbers[1:]), letters, weights_line),
        (letters, numbers, data_line),
        ((*letters[1:], "5"), numbers, data_line),
    ):
        file = dataclasses.replace(random_weights(CONFIG), class_names=stored)
        model, before, line = initialized(file, names)
        assert line == expected
        assert torch.equal(model.head.weight, before.head.weight)


@pytest.mark.parametrize("stored", [None, "numbers", "synsets"])
def test_numbers_of_imagenets_classes_are_their_indices(stored: str | None) -> None:
    numbers = sorted(map(str, range(1000)))  # 0, 1, 10, 100, ...
    names = {None: None, "numbers": tuple(numbers), "synsets": imagenet_classes()}[stored]
    file = dataclasses.replace(
        random_weights(dataclasses.replace(CONFIG, num_classes=1000)), class_names=names
    )
    weight = file.state_dict["head.weight"]
    model, _, line = initialized(file, numbers)
    assert line == "head: 1000 of 1000 classes from the weights"
    order = list(range(1000)) if stored == "numbers" else [int(name) for name in numbers]
    assert torch.equal(model.head.weight, weight[order])
    _, _, line = initialized(file, numbers[:10])
    assert line == "head: new, 10 classes; the data does not name its 10 classes"


def test_both_heads_of_a_distilled_model_have_the_rows_of_the_classes() -> None:
    config = ModelConfig(name="timm/deit_tiny_distilled_patch16_224", image_size=32, num_classes=3,
                         timm_options={"depth": 1})  # fmt: skip
    file = dataclasses.replace(random_weights(config), class_names=("a", "b", "c"))
    model, before, line = initialized(file, ("c", "new"), config)
    assert line == "head: 1 of 2 classes from the weights, 1 new"
    for name in ("head", "head_dist"):
        assert torch.equal(getattr(model, name).weight[0], file.state_dict[f"{name}.weight"][2])
        assert torch.equal(getattr(model, name).bias[0], file.state_dict[f"{name}.bias"][2])
        assert torch.equal(getattr(model, name).weight[1], getattr(before, name).weight[1])


@pytest.mark.parametrize(("name", "head"), [("resnet10t", "fc"), ("test_convnext", "head.fc")])
def test_rows_of_the_heads_of_timm_models(name: str, head: str) -> None:
    config = ModelConfig(name=f"timm/{name}", image_size=32, num_classes=3)
    file = dataclasses.replace(random_weights(config), class_names=("a", "b", "c"))
    model, before, line = initialized(file, ("c", "new", "a"), config)
    assert line == "head: 2 of 3 classes from the weights, 1 new"
    layer, old = model.get_classifier(), before.get_classifier()
    assert torch.equal(layer.weight[[0, 2]], file.state_dict[f"{head}.weight"][[2, 0]])
    assert torch.equal(layer.weight[1], old.weight[1])


def convnext_of_its_authors() -> tuple[Weights, Weights]:
    """Return weights of ConvNeXt in the layout of timm and in that of its authors."""
    file = random_weights(ModelConfig(name="timm/test_convnext", image_size=32, num_classes=3))
    names = (("head.fc.", "head."), ("head.norm.", "norm."), ("conv_dw", "dwconv"), ("mlp.fc", "pwconv"),
             (r"\.blocks\.", "."), (r"stages\.(\d)\.downsample", r"downsample_layers.\1"),
             (r"^stem", "downsample_layers.0"))  # fmt: skip
    renamed = dict(file.state_dict)
    for ours, theirs in names:
        renamed = {re.sub(ours, theirs, name): value for name, value in renamed.items()}
    assert {"head.weight", "stages.0.0.dwconv.weight"} <= renamed.keys()
    return file, dataclasses.replace(file, state_dict=renamed, class_names=("a", "b", "c"))


def test_timm_translates_the_layout_of_the_authors(caplog: pytest.LogCaptureFixture) -> None:
    file, other = convnext_of_its_authors()
    with caplog.at_level("INFO", logger="vil"):
        model = other.build_model()
    assert caplog.messages == ["ConvNeXt: weights translated by timm"]
    assert all(torch.equal(value, file.state_dict[name]) for name, value in model.state_dict().items())
    without = {name: value for name, value in other.state_dict.items() if name != "norm.bias"}
    with pytest.raises(UserError, match=r"^x\.pt: does not fit the model, it is of another architecture; "):
        dataclasses.replace(other, state_dict=without).build_model()


def test_rows_of_a_head_in_the_layout_of_the_authors() -> None:
    """timm finds the head, which has another name there."""
    file, other = convnext_of_its_authors()
    model, before, line = initialized(other, ("c", "new", "a"), other.model)
    assert line == "head: 2 of 3 classes from the weights, 1 new"
    assert torch.equal(model.head.fc.weight[[0, 2]], file.state_dict["head.fc.weight"][[2, 0]])
    assert torch.equal(model.head.fc.weight[1], before.head.fc.weight[1])
    assert torch.equal(model.stem[0].weight, file.state_dict["stem.0.weight"])


def test_timm_weights_have_all_their_rows(tmp_path: Path) -> None:
    source = timm.create_model("resnet10t", num_classes=7)
    torch.save(source.state_dict(), tmp_path / "x.pth")
    options = {"checkpoint_path": str(tmp_path / "x.pth")}
    config = ModelConfig(name="timm/resnet10t", num_classes=7, timm_options=options)
    file = timm_weights(config)
    assert torch.equal(file.state_dict["fc.weight"], source.fc.weight)
    overlay = {
        "pretrained": True,
        "pretrained_cfg_overlay": {"file": str(tmp_path / "x.pth"), "num_classes": 7},
    }
    file = timm_weights(dataclasses.replace(config, num_classes=2, timm_options=overlay))
    assert torch.equal(file.state_dict["fc.weight"], source.fc.weight)
    assert timm_weights(dataclasses.replace(config, timm_options={"drop_rate": 0.1})) is None
    wrong = dataclasses.replace(
        config, timm_options={"pretrained": True, "pretrained_cfg_overlay": {"no": 1}}
    )
    with pytest.raises(UserError, match=r"^timm_options: timm cannot find the weights: .*'no'"):
        timm_weights(wrong)


def test_baselines_of_timm_at_another_size_and_number_of_classes() -> None:
    config = ModelConfig(name="timm/vit_tiny_patch16_224", image_size=32, num_classes=6,
                         timm_options={"depth": 1})  # fmt: skip
    file = random_weights(config)
    model = file.build_model(image_size=48, num_classes=4)
    assert model(torch.randn(1, 3, 48, 48)).shape == (1, 4)
    assert torch.equal(model.head.weight, file.state_dict["head.weight"][:4])
    by_timm = model_from_config(config)
    by_timm.load_state_dict(file.state_dict)
    by_timm.set_input_size((48, 48))
    assert torch.equal(model.pos_embed, by_timm.pos_embed)


@pytest.mark.parametrize("case", PARITY, ids=lambda case: case.name)
def test_converted_and_published_agree_to_the_bit(case: Path, tmp_path: Path) -> None:
    published = load_released(case / "config.yaml", case / "model_best.pth")
    weights = open_weights(case / "model_best.pth", case / "config.yaml")
    converted = dataclasses.replace(weights, state_dict=published.state_dict())
    write_safetensors(tmp_path / "x.safetensors", converted)
    converted = vil.create_model(None, checkpoint=tmp_path / "x.safetensors").eval()
    images = torch.randn(2, 3, *published.img_size)
    with torch.no_grad():
        assert torch.equal(converted(images), published(images))
    assert converted.global_pool == published.global_pool


def test_every_option_of_a_published_configuration_is_kept(tmp_path: Path) -> None:
    config = ModelConfig(name="vil", image_size=32, num_classes=6, stages=STAGES, pool="avg", mask="cyclic",
                         norm_embed=False, share_global_projection=False, neighbors="random",
                         dropout=0.1, drop_path=0.2)  # fmt: skip
    write_safetensors(tmp_path / "x.safetensors", random_weights(config))
    assert open_weights(tmp_path / "x.safetensors").model == config
    model = vil.create_model(None, checkpoint=tmp_path / "x.safetensors")
    attention = model.stages[0].blocks[0].attn
    assert (attention.mask, attention.neighbors, attention.shares_projection) == ("cyclic", "random", False)
    assert isinstance(model.stages[0].patch_embed.norm, nn.Identity)
    assert model.stages[0].pos_drop.p == 0.1
    assert model.stages[2].blocks[0].drop_path1.drop_prob == pytest.approx(0.2)


def test_create_model_from_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    file = random_weights(
        ModelConfig(name="vil_tiny", image_size=64, num_classes=3, blocks=(1, 1, 1, 1), window=3)
    )
    write_safetensors(path, file)
    for name in (None, "vil_tiny"):
        model = vil.create_model(name, checkpoint=path)
        assert (model.img_size, model.num_classes) == ((64, 64), 3)
        assert model.stages[0].blocks[0].attn.window == 3
        assert torch.equal(model.norm.weight, file.state_dict["norm.weight"])
    changed = vil.create_model("vil_tiny", image_size=96, num_classes=2, drop_path=0.5, checkpoint=path)
    assert (changed.img_size, changed.num_classes) == ((96, 96), 2)
    assert changed.stages[3].blocks[0].drop_path1.drop_prob == 0.5
    with pytest.raises(UserError, match="it is of another architecture"):
        vil.create_model("vil_small", checkpoint=path)
    with pytest.raises(UserError, match="name: is needed"):
        vil.create_model(None)
    with pytest.raises(UserError, match="does not describe its model"):
        vil.create_model(None, checkpoint=PARITY[0] / "model_best.pth")


def test_a_published_checkpoint_into_a_named_model() -> None:
    case = next(case for case in PARITY if case.name == "vil_ape_chunk")
    published = load_released(case / "config.yaml", case / "model_best.pth")
    stages = [dataclasses.asdict(stage.config) for stage in published.stages]
    model = timm.create_model("vil", stages=stages, img_size=64, num_classes=10)
    open_weights(case / "model_best.pth").load_into(model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in published.state_dict().items())


def test_a_configuration_for_a_checkpoint_that_contains_one(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", random_weights(CONFIG))
    with pytest.raises(UserError, match="not a published checkpoint"):
        open_weights(tmp_path / "x.safetensors", PARITY[0] / "config.yaml")


def test_published_weights_of_odd_shapes_are_named(tmp_path: Path) -> None:
    case = next(case for case in PARITY if case.name == "vil_rpe_chunk")
    content = torch.load(case / "model_best.pth", weights_only=True)
    name = next(key for key in content["net"] if key.endswith("local_relative_position_bias_table"))
    for shape in ((), (3,), (5, 1)):
        content["net"][name] = torch.zeros(shape)
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(UserError, match="bias_table"):
            load_released(case / "config.yaml", tmp_path / "x.pth")


def test_prefixes_of_wrappers_are_removed() -> None:
    weight = torch.ones(2, 3)
    for name in ("weight", "module.weight", "_orig_mod.weight", "module._orig_mod.weight"):
        assert translate_state_dict(nn.Linear(3, 2), {name: weight}) == {"weight": weight}
    assert translate_state_dict(nn.Identity(), {"net": weight}) == {"net": weight}  # a weight of this name
    assert translate_state_dict(nn.Identity(), {"net": {"module.weight": weight}}) == {"weight": weight}


def test_integers_are_refused_and_half_precision_is_loaded() -> None:
    model = nn.BatchNorm1d(2)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    load_state_dict(model, {**weights, "weight": torch.tensor([0.5, 2.0], dtype=torch.bfloat16)}, "x.pt")
    assert model.weight.tolist() == [0.5, 2.0]
    changed = {**weights, "weight": weights["weight"].int(), "num_batches_tracked": torch.tensor(0.5)}
    with pytest.raises(UserError) as caught:
        load_state_dict(model, changed, "x.pt")
    assert "weight is of torch.int32, the model's of torch.float32" in str(caught.value)
    assert "num_batches_tracked is of torch.float32, the model's of torch.int64" in str(caught.value)


def test_names_that_are_not_text_are_reported() -> None:
    with pytest.raises(UserError, match="1 unexpected: 3"):
        load_state_dict(nn.Identity(), {3: torch.ones(1)}, "x.pt")  # type: ignore[dict-item]


@pytest.mark.parametrize("shape", [(), (0,), (0, 16), (3, 0), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
@pytest.mark.parametrize(
    "name",
    ["head.weight", "head.bias", "stages.1.position.rows", "stages.2.blocks.0.attn.bias_table"],
)
def test_weights_of_odd_shapes_are_named(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    file = random_weights(CONFIG)
    changed = dataclasses.replace(file, state_dict={**file.state_dict, name: torch.zeros(shape, dtype=dtype)})
    with pytest.raises(UserError, match=name.replace(".", r"\.") + " is "):
        changed.build_model(num_classes=4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stages.1.position.rows", torch.zeros(0, 8)),
        ("stages.1.position.rows", torch.zeros(6, 8, dtype=torch.int32)),
        ("stages.2.blocks.0.attn.bias_table", torch.zeros(2, 5, 5, dtype=torch.int32)),
    ],
)
def test_empty_tables_and_integers_are_not_resized(name: str, value: torch.Tensor) -> None:
    file = random_weights(CONFIG)
    changed = dataclasses.replace(file, state_dict={**file.state_dict, name: value})
    with pytest.raises(UserError, match=name.replace(".", r"\.") + " is "):
        changed.build_model()


@pytest.mark.parametrize("knows_size", [True, False], ids=["own file", "foreign file"])
@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("swin_tiny_patch4_window7_224", 224, 256),
        ("vit_tiny_patch16_224", 32, 64),
        ("resnet10t", 64, 96),
    ],
)
def test_timm_models_at_another_image_size(name: str, before: int, after: int, knows_size: bool) -> None:
    config = ModelConfig(name=f"timm/{name}", image_size=before, num_classes=5)
    weights = model_from_config(config).state_dict()
    file = Weights("x.pth", "safetensors", "raw", weights, config if knows_size else None)
    model = model_from_config(dataclasses.replace(config, image_size=after))
    file.load_into(model, after)
    assert model(torch.zeros(1, 3, after, after)).shape == (1, 5)
    name = max(weights, key=lambda key: weights[key].numel())
    assert torch.equal(model.state_dict()[name], weights[name])


@pytest.mark.parametrize("name", ["timm/resnet10t", "vil_tiny"])
def test_gray_images_for_a_model_of_color_images(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """The first convolution is summed over the colors, as timm does: gray images keep their activations."""
    config = ModelConfig(name=name, image_size=64, num_classes=5)
    color = model_from_config(config).eval()
    gray = model_from_config(dataclasses.replace(config, in_chans=1)).eval()
    with caplog.at_level("INFO", logger="vil"):
        Weights("x.pth", "safetensors", "raw", color.state_dict(), config).load_into(gray, 64)
    assert "from 3 to 1 channels" in caplog.text
    image = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(gray(image), color(image.expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-4)


def test_errors_name_three_weights_and_count_the_others() -> None:
    config = ModelConfig(name="timm/resnet10t", image_size=64, num_classes=5)
    other = model_from_config(dataclasses.replace(config, name="timm/vit_tiny_patch16_224")).state_dict()
    with pytest.raises(
        UserError, match=r"it is of another architecture; 86 missing: conv1.0.weight, "
    ) as error:
        Weights("x.pth", "foreign", "raw", other).load_into(model_from_config(config))
    assert len(str(error.value)) < 400
    wide = {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}
    with pytest.raises(UserError, match="it is of another size; 2 of another shape: weight is"):
        load_state_dict(nn.Linear(2, 4), wide, "x.pth")
