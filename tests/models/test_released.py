"""Published models against the outputs of the paper's code, to the last digits."""

import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from vil.checkpoints.loading import load_released
from vil.checkpoints.open import open_weights
from vil.checkpoints.published_config import parse_arch, read_published_config
from vil.errors import UserError
from vil.models.state_dict import translate_published_names

CASES = sorted(filter(Path.is_dir, (Path(__file__).parents[1] / "fixtures" / "parity").iterdir()))


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request):
    return request.param


def load(case, **options):
    return load_released(case / "config.yaml", case / "model_best.pth", **options)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def test_there_are_fourteen_cases():
    assert len(CASES) == 14


def test_logits_and_tokens(case):
    expected = load_file(case / "expected.safetensors")
    model, tokens = load(case), []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, inputs, output: tokens.append(output[0]))
    with torch.no_grad():
        close(model(expected["input"]), expected["logits"], 2e-5)
    for number, ours in enumerate(tokens, 1):
        close(ours, expected[f"stage{number}.tokens"], 2e-5)


@pytest.mark.parametrize(
    ("name", "copy", "original"),
    [
        ("vil_ape_chunk", "layer1.1.attn.query_global.weight", "layer1.1.attn.query.weight"),
        ("vil_ape_chunk", "layer1.1.attn.kv_global.bias", "layer1.1.attn.kv.bias"),
        ("linformer_shared_kv", "layer1.1.attn.proj_v", "layer1.1.attn.proj_k"),
    ],
)
def test_copies_of_a_shared_weight_that_differ_are_refused(tmp_path, name, copy, original):
    folder = CASES[0].parent / name
    content = torch.load(folder / "model_best.pth", weights_only=True)
    assert torch.equal(content["net"][copy], content["net"][original])
    content["net"][copy] = content["net"][copy] + 0.01
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match=f"other.pth: {copy} and {original} differ, but the configuration"):
        load_released(folder / "config.yaml", tmp_path / "other.pth")


def test_gradients(case):
    expected = load_file(case / "expected.safetensors")
    model = load(case)
    x = expected["input"].requires_grad_()
    logits = model(x)
    (torch.linspace(-1, 1, logits.numel()).view_as(logits) * logits).sum().backward()
    close(x.grad, expected["grad.input"], 1e-4)
    published = {
        key.removeprefix("grad."): value for key, value in expected.items() if key.startswith("grad.")
    }
    published.pop("input")
    gradients = translate_published_names(model, published)
    assert len(gradients) >= len(published)
    parameters = dict(model.named_parameters())
    for name, gradient in gradients.items():
        close(parameters[name].grad, gradient, 1e-4)


def test_random_shift_per_neighbor():
    case = next(c for c in CASES if c.name == "vil_random_shift")
    expected = load_file(case / "expected.safetensors")
    model = load(case).train()
    for neighbor in range(8):
        model.set_neighbors(neighbor)
        with torch.no_grad():
            close(model(expected["input"]), expected[f"train.mode{neighbor + 1}.logits"], 2e-5)


@pytest.mark.parametrize("name", ["finetune_resolution_ape", "finetune_resolution_rpe_head"])
def test_another_resolution_and_number_of_classes(name):
    case = next(c for c in CASES if c.name == name)
    about, expected = json.loads((case / "case.json").read_text()), load_file(case / "expected.safetensors")
    model = load(case, image_size=about["finetune_image_size"], num_classes=about["finetune_classes"])
    x = expected["finetune.input"].requires_grad_()
    logits = model(x)
    close(logits, expected["finetune.logits"], 2e-5)
    (torch.linspace(-1, 1, logits.numel()).view_as(logits) * logits).sum().backward()
    close(x.grad, expected["finetune.grad.input"], 1e-4)


def edited(tmp_path, case, **changes):
    """A copy of a case's configuration with values changed, by dotted key; None removes one."""
    tree = yaml.safe_load((case / "config.yaml").read_text())
    for key, value in changes.items():
        node, *_ = [tree]
        *parents, last = key.split("__")
        for parent in parents:
            node = node[parent]
        if value is None:
            node.pop(last)
        else:
            node[last] = value
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_configuration_gives_the_evaluation_transform(tmp_path):
    path = edited(
        tmp_path, CASES[0], INPUT__CROP_PCT=0.922, INPUT__INTERPOLATION="2", INPUT__MEAN="(0.5, 0.5, 0.5)"
    )
    transform = read_published_config(path).transform
    assert (transform["crop_pct"], transform["interpolation"]) == (0.922, "bilinear")
    assert transform["mean"] == [0.5, 0.5, 0.5]
    assert read_published_config(CASES[0] / "config.yaml").transform["interpolation"] == "bicubic"


def test_missing_keys_have_the_defaults_of_the_papers_code(tmp_path):
    path = edited(tmp_path, CASES[0], MODEL__VIT__MSVIT__SHARE_W=None, MODEL__VIT__MSVIT__SW_EXACT=None,
                  MODEL__VIT__AVG_POOL=None, INPUT=None, DATA=None)  # fmt: skip
    config = read_published_config(path)
    assert (config.model.image_size, config.model.num_classes) == (224, 1000)
    assert config.transform["interpolation"] == "bilinear"
    assert config.model.share_global_projection is True
    assert config.model.mask == "chunk"


def test_epsilon_of_the_norms_is_never_the_published_one(tmp_path):
    path = edited(tmp_path, CASES[0], MODEL__VIT__MSVIT__LN_EPS=1e-2)
    assert load_released(path, CASES[0] / "model_best.pth").norm.eps == 1e-6


def test_architecture_notation():
    first, second = parse_arch("l1,h3,d96,n2,s1,g4,p4,f8,a0_l2,h6,d192,n1,s0", "linformer")
    assert dataclasses.asdict(first) == {
        "dim": 96, "heads": 3, "blocks": 2, "patch": 4, "attention": "linformer", "global_tokens": 4,
        "position": "relative", "window": 8, "projected_tokens": 8, "random_features": 8, "reduction": 8,
    }  # fmt: skip
    assert (second.attention, second.position, second.patch, second.global_tokens) == (
        "full",
        "absolute",
        2,
        1,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MODEL__VIT__MSVIT__ARCH": None}, "MODEL.VIT.MSVIT.ARCH: is missing"),
        ({"MODEL__VIT__MSVIT__ARCH": "l1,x3"}, "MODEL.VIT.MSVIT.ARCH: 'x3' is not one of the letters"),
        ({"MODEL__VIT__MSVIT__ARCH": "l1,h3"}, "MODEL.VIT.MSVIT.ARCH: stage 'l1,h3' lacks d, n"),
        (
            {"MODEL__VIT__MSVIT__ARCH": "l1,h3,d96,n1_l2,h3,d192,h6,n1"},
            "MODEL.VIT.MSVIT.ARCH: stage 'l2,h3,d192,h6,n1' gives h twice",
        ),
        ({"MODEL.VIT.DROP_PATH": 0.2}, "MODEL.VIT.DROP_PATH: is given twice, by nested and by dotted keys"),
        ({"MODEL__VIT__MSVIT__ATTN_TYPE": "magic"}, "MODEL.VIT.MSVIT.ATTN_TYPE: must be one of"),
        ({"MODEL__VIT__MSVIT__SW_EXACT": 7}, "MODEL.VIT.MSVIT.SW_EXACT: must be one of 0, 1, -1"),
        ({"INPUT__MEAN": "(0.5,)"}, "INPUT.MEAN: expected a value like"),
        ({"INPUT__IMAGE_SIZE": "__import__('os')"}, "INPUT.IMAGE_SIZE: expected a value like 224"),
        ({"MODEL": "none"}, "MODEL"),
    ],
)
def test_invalid_configurations(tmp_path, changes, message):
    path = edited(tmp_path, CASES[0], **changes)
    with pytest.raises(UserError) as error:
        read_published_config(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path):
    victim, path = tmp_path / "created", tmp_path / "model.pth"
    torch.save({"net": {"head.weight": torch.zeros(1)}, "extra": Malicious(victim)}, path)
    with pytest.raises(UserError, match="refused"):
        open_weights(path)
    path.write_bytes(pickle.dumps(Malicious(victim), protocol=2))
    with pytest.raises(UserError):
        open_weights(path)
    assert not victim.exists()


@pytest.mark.parametrize("content", [b"", b"hello\n", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(100)])
def test_files_that_are_not_checkpoints(tmp_path, content):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        open_weights(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_truncated_missing_and_damaged_checkpoints(tmp_path):
    whole = (CASES[0] / "model_best.pth").read_bytes()
    path = tmp_path / "model.pth"
    for length in (10, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"model\.pth: "):
            open_weights(path)
    with pytest.raises(UserError, match="no such file"):
        open_weights(tmp_path / "none.pth")
    weights = torch.load(CASES[0] / "model_best.pth", weights_only=True)
    weights["net"]["head.bias"][0] = float("nan")
    torch.save(weights, path)
    with pytest.raises(UserError, match=r"model\.pth: head\.bias holds values that are not finite"):
        open_weights(path)


def test_loading_is_strict_and_names_everything(tmp_path):
    case, path = next(c for c in CASES if c.name == "vil_ape_chunk"), tmp_path / "model.pth"
    content = torch.load(case / "model_best.pth", weights_only=True)
    net = content["net"]
    net["layer9.0.extra"] = net.pop("norm.weight")
    net["layer1.1.attn.proj.bias"] = torch.zeros(3)
    torch.save(content, path)
    with pytest.raises(UserError) as error:
        load_released(case / "config.yaml", path)
    text = str(error.value)
    assert "missing: norm.weight" in text
    assert "unexpected: layer9.0.extra" in text
    assert "stages.0.blocks.0.attn.projection.bias is (3,), the model's (8,)" in text
    other = next(c for c in CASES if c.name == "srformer")
    with pytest.raises(UserError, match="does not fit the model"):
        load_released(other / "config.yaml", case / "model_best.pth")


def test_resizing_is_logged(caplog):
    case = next(c for c in CASES if c.name == "finetune_resolution_ape")
    with caplog.at_level("INFO", logger="vil"):
        load(case, image_size=96, num_classes=4)
    assert "stages.0.position.rows: (16, 4) → (24, 4)" in caplog.text
    assert "head.weight: (10, 32) → (4, 32)" in caplog.text


@pytest.mark.parametrize("line", ["MODEL: {}", "A: !!int ''", "A: !!timestamp x"])
def test_published_configurations_are_read_as_strictly_as_ours(tmp_path, line):
    path = tmp_path / "config.yaml"
    path.write_text(f"{(CASES[0] / 'config.yaml').read_text()}\n{line}\n")
    with pytest.raises(UserError) as error:
        read_published_config(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "line" in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["layer0.1.attn.proj.weight", f"layer{'9' * 5000}.0.proj.weight", f"layer1.{'9' * 5000}.norm.bias",
     "layer01.0.proj.bias", "layer1.00.proj.bias", "layer².0.proj.bias", "layer-1.0.proj.bias"],
)  # fmt: skip
def test_names_with_invalid_layer_numbers(tmp_path, name):
    content = torch.load(CASES[0] / "model_best.pth", weights_only=True)
    content["net"][name] = torch.zeros(8)
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(UserError) as error:
        load_released(CASES[0] / "config.yaml", tmp_path / "model.pth")
    assert f"1 unexpected: {name[:1000]}" in str(error.value)


@pytest.mark.parametrize("text", ["{[]: 1}", "{{}}", "{1: {[]}}", "1if 1else 2", "'\\\\d'"])
def test_literals_that_python_refuses_or_warns_about(tmp_path, text, recwarn):
    tree = yaml.safe_load((CASES[0] / "config.yaml").read_text())
    tree["MODEL"]["VIT"]["DROP"] = text
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=r"config\.yaml: MODEL\.VIT\.DROP: expected a value like 0\.0, got "):
        read_published_config(tmp_path / "config.yaml")
    assert not recwarn.list
