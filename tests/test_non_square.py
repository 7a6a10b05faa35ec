"""Images that are not square: `model.image_size: [height, width]` in every program."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from helpers.beton_files import convert_folder
from helpers.loading import load, load_validation
from helpers.sample_images import write_image
from helpers.tiny_run import TinyModel, make_config
from PIL import Image
from torch.nn import functional as F

import eval as eval_program
import train as train_program
import vil
from data.ffcv_loader import FFCVTrainLoader
from data.sources import open_source
from data.transforms import evaluation_transform, train_transform
from tools.data_inspection import main as inspect_data
from tools.programs import export, predict
from tools.report_page.runs import open_run
from tools.visualization import main as visualize
from vil.attention import ATTENTIONS
from vil.checkpoints.checkpoint_files import step_files
from vil.checkpoints.open import open_weights
from vil.checkpoints.training_state import read_training_state
from vil.checkpoints.weights import Weights
from vil.command_line import resolve_eval_command
from vil.config import AugmentConfig, DataConfig, EvalConfig, ModelConfig
from vil.errors import UserError
from vil.evaluation.complexity import multiply_adds
from vil.evaluation.cost import images_per_second, measure_memory
from vil.models.attention_image import GAP_WIDTH, PANEL_HEIGHT, attention_sheet
from vil.models.zoo import model_from_config
from vil.runtime.distributed import Process
from vil.runtime.epoch_steps import EpochSteps
from vil.runtime.seeding import seeded
from vil.training import model_updater
from vil.validation import as_tree, validate

PARITY = Path(__file__).parent / "fixtures" / "parity"
SIZE = (160, 224)
CPU = torch.device("cpu")
CROPS = ("random_resized", "pad_random", "resize_random", "eval_resize_random", "none")
RECIPE = {"auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.5, "vflip": 0.3}
STAGES = [
    {"dim": 8, "heads": 2, "patch": 16, "window": 4},
    {"dim": 8, "heads": 2, "patch": 2, "attention": "full"},
    {"dim": 8, "heads": 2, "patch": 2, "attention": "full", "global_tokens": 0},
]  # maps of 10×14, 5×7 and 2×3
CONFIG = {
    "model": {"name": "vil", "image_size": list(SIZE), "stages": STAGES},
    "schedule": {
        "epochs": 2,
        "batch_size": 4,
        "progressive_resizing": [[0, [80, 112]], [0.5, [160, 224]]],
        "augment": {**RECIPE, "mixup": 0.8, "cutmix": 1.0, "interpolation": "bicubic"},
    },
    "data": {"source": "folder", "workers": 0},
    "device": "cpu",
    "precision": "float32",
    "log_every": 1,
}


def call(program, *argv):
    """Run a program in this process and return its output."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        program([*map(str, argv)])
    return out.getvalue()


def evaluated(folder, *argv):
    output = call(
        eval_program.main, *argv, "--device", "cpu", "--progress", "false", "--json", folder / "e.json"
    )
    return json.loads((folder / "e.json").read_text()), output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of several sizes in two classes, and a run on them in `run`, whose output is in out.txt."""
    root = tmp_path_factory.mktemp("non_square")
    for split, count in (("train", 4), ("val", 3)):
        for index, name in enumerate(("ant", "bee")):
            for number in range(count):
                size = (200 + 30 * number, 300 - 60 * number)  # wide and tall
                write_image(root / "images" / split / name / f"{number}.png", 10 * index + number, size)
    config = {**CONFIG, "data": {**CONFIG["data"], "root": str(root / "images")}}
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    torch.set_num_threads(1)
    out = call(train_program.main, "--config", root / "config.yaml", "--output", root / "run")
    (root / "out.txt").write_text(out)
    return root


@pytest.fixture(scope="module")
def model(folder):
    return open_weights(folder / "run").build_model()


def photo(folder):
    return folder / "images/val/ant/0.png"  # 200 wide, 300 high


# Options


def test_a_pair_of_equal_sides_is_stored_as_one_number():
    assert validate(EvalConfig, {"model": {"image_size": [64, 64]}}).model == ModelConfig(image_size=64)
    config = validate(EvalConfig, {"model": {"image_size": [64, 96]}}).model
    assert (config.image_size, config.size) == ((64, 96), (64, 96))
    assert as_tree(config)["image_size"] == [64, 96]
    assert (as_tree(ModelConfig(image_size=64))["image_size"], ModelConfig(image_size=64).size) == (
        64,
        (64, 64),
    )


@pytest.mark.parametrize("argv", [["160", "224"], ["[160, 224]"]])
def test_the_command_line_takes_two_numbers_or_a_list(argv):
    _, command = resolve_eval_command(
        ["--model.name", "vil_tiny", "--model.image_size", *argv, "--complexity"]
    )
    assert command.config.model.size == SIZE


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ([160], "[160]"),
        ([0, 224], "[0, 224]"),
        ([160, 224, 3], "[160, 224, 3]"),
        ("160x224", "'160x224'"),
        ([160, 9000], "[160, 9000]"),
        ([160.5, 224], "[160.5, 224]"),
    ],
)
def test_refused_sizes(tmp_path, value, shown):
    expected = "expected an integer from 1 to 8,192 or a list of 2 integers from 1 to 8,192"
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump({"name": "vil_tiny", "image_size": value}))
    with pytest.raises(UserError) as refused:
        resolve_eval_command(["--model", str(path), "--complexity"])
    assert str(refused.value) == f"{path}: model.image_size: {expected}, got {shown}"
    with pytest.raises(UserError) as refused:
        resolve_eval_command(["--model.image_size", str(value), "--complexity"])
    assert str(refused.value) == f"command line: model.image_size: {expected}, got {shown}"
    with pytest.raises(UserError) as refused:
        vil.create_model("vil_tiny", image_size=value)
    assert str(refused.value) == f"image_size: {expected}, got {shown}"


def test_refused_sizes_of_progressive_resizing(folder):
    argv = ["--config", folder / "config.yaml", "--output", folder / "no", "--schedule.progressive_resizing"]
    with pytest.raises(UserError) as refused:
        call(train_program.main, *argv, "[[0, [80, 112, 3]]]")
    reason = (
        "expected a list of pairs, e.g. [[0, 160], [0.6, 224]], rising fractions of the epochs, the first of "
    )
    reason += "them 0, each with an image size in pixels or null, got [[0, [80, 112, 3]]]"
    assert str(refused.value) == f"command line: schedule.progressive_resizing: {reason}"
    with pytest.raises(UserError) as refused:
        call(train_program.main, *argv, "[[0, [80, 16]]]")
    reason = "MultiScaleViT does not support images of 80×16: a map of 5×1 is smaller than a patch of 2"
    assert str(refused.value) == f"command line: schedule.progressive_resizing: {reason}"


# Models


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_models_are_built_for_their_size(attention):
    options = {"attention": attention, "num_classes": 3, "blocks": (1, 1, 1)}
    model = vil.create_model("vil_tiny_3stage", image_size=(64, 96), **options)
    assert model.config.size == model.img_size == (64, 96)
    assert [stage.size for stage in model.stages] == [(8, 12), (4, 6), (2, 3)]
    assert model(torch.zeros(1, 3, 64, 96)).shape == (1, 3)


def test_timm_models_are_built_and_resized():
    config = ModelConfig(
        name="timm/vit_tiny_patch16_224", num_classes=3, image_size=(32, 48), timm_options={"depth": 1}
    )
    model = model_from_config(config)
    assert model(torch.zeros(1, 3, 32, 48)).shape == (1, 3)
    weights = Weights("x", "run", "raw", model.state_dict(), config)
    for size in ((48, 32), (64, 64)):
        resized = weights.build_model(size)
        assert resized.pos_embed.shape[1] == 1 + size[0] // 16 * (size[1] // 16)
        assert resized(torch.zeros(1, 3, *size)).shape == (1, 3)
    assert torch.equal(weights.build_model().pos_embed, model.pos_embed)


def test_published_checkpoints():
    case = PARITY / "vil_rpe_chunk"
    files = (case / "config.yaml", case / "model_best.pth")
    model = vil.load_released(*files, image_size=(64, 96))
    square = vil.load_released(*files, image_size=64)
    assert model.img_size == (64, 96)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    rows = [stage.size[0] for stage in square.stages]
    assert [stage.size for stage in model.stages] == [(n, 3 * n // 2) for n in rows]
    with torch.no_grad():
        assert model(F.pad(images, (0, 32))).shape == square(images).shape
    again = vil.create_model(None, image_size=(64, 96), checkpoint=open_weights(files[1], files[0]))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_an_evaluation_of_a_published_checkpoint(folder):
    case = PARITY / "vil_rpe_chunk"
    argv = [
        "--checkpoint",
        case / "model_best.pth",
        "--released-config",
        case / "config.yaml",
        "--complexity",
    ]
    (result,), _ = evaluated(folder, *argv, "--model.image_size", "64", "96")
    assert result["image_size"] == [64, 96]
    model = vil.load_released(case / "config.yaml", case / "model_best.pth", image_size=(64, 96))
    assert result["flops"] == model.multiply_adds()


# Transforms and loaders


def image(width, height):
    rng = np.random.default_rng(width)
    return Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)).resize((width, height))


def draw(transform, picture):
    with seeded(0, "augmentation", 0, 0, 0):
        return transform.pixels(picture)


@pytest.mark.parametrize("crop", CROPS)
def test_training_crops(crop):
    augment = AugmentConfig(crop=crop, **RECIPE)
    data = DataConfig(crop_pct=0.8)
    for size in ((24, 40), (40, 24)):
        transform = train_transform(augment, data, image_size=size, in_chans=3)
        for shape in ((60, 50), (30, 90), (20, 20)):
            assert draw(transform, image(*shape)).shape == (3, *size)
    square = train_transform(augment, data, image_size=32, in_chans=3)
    pair = train_transform(augment, data, image_size=(32, 32), in_chans=3)
    assert torch.equal(draw(square, image(60, 50)), draw(pair, image(60, 50)))


def test_the_resized_image_covers_the_size():
    """In training without a random crop: the smallest image that covers (24, 48), then its center."""
    augment = AugmentConfig(crop="none", hflip=0, interpolation="bilinear")
    transform = train_transform(augment, DataConfig(), image_size=(24, 48), in_chans=3)
    for shape, resized, top, left in (((96, 72), (48, 36), 6, 0), ((200, 50), (96, 24), 0, 24)):
        picture = image(*shape)
        expected = np.asarray(picture.resize(resized, Image.Resampling.BILINEAR))[
            top : top + 24, left : left + 48
        ]
        assert np.array_equal(transform.pixels(picture).permute(1, 2, 0).numpy(), expected)


def test_evaluation_covers_the_size_divided_by_crop_pct():
    data = DataConfig(crop_pct=0.8)
    transform = evaluation_transform(data, image_size=(24, 48), in_chans=3)
    picture = image(120, 90)
    resized = np.asarray(picture.resize((60, 45), Image.Resampling.BICUBIC))  # covers 30×60
    pixels = transform.pixels(picture)
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), resized[10:34, 6:54])  # 10.5 is rounded to 10
    by_timm = timm.data.create_transform((3, 24, 48), crop_pct=0.8, interpolation="bicubic")
    torch.testing.assert_close(transform(picture), by_timm(picture))
    square, pair = (evaluation_transform(data, image_size=size, in_chans=3) for size in (32, (32, 32)))
    assert torch.equal(square(picture), pair(picture))


def test_a_resized_side_that_is_too_long():
    with pytest.raises(UserError) as refused:
        evaluation_transform(DataConfig(crop_pct=0.01), image_size=(20, 160), in_chans=3)
    assert (
        str(refused.value) == "data.crop_pct: image_size / crop_pct is 16,000 pixels, expected at most 8,192"
    )


def test_progressive_resizing_with_pairs(folder):
    data = DataConfig(source="folder", root=str(folder / "images"), workers=0)
    plan = [(0, (16, 24)), (0.5, 24)]
    train = load(data, batch_size=4, image_size=(24, 40), progressive_resizing=plan, epochs=2).train
    shapes = [next(iter(train.epoch(epoch)))[0].shape for epoch in (0, 1, 0)]
    assert shapes == [(4, 3, 16, 24), (4, 3, 24, 24), (4, 3, 16, 24)]
    validation = load_validation(data, batch_size=2, image_size=(24, 40))
    assert next(iter(validation.loader))[0].shape == (2, 3, 24, 40)


@pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed")
@pytest.mark.parametrize("policy", [RECIPE, {"auto_augment": "trivial"}, {"color_jitter": 0.4}])
def test_ffcv_gives_the_views_of_the_folder(folder, tmp_path, policy):
    options = {"batch_size": 4, "image_size": (40, 64)}
    data = DataConfig(source="folder", root=str(folder / "images"), workers=0)
    for split in ("train", "val"):
        convert_folder(open_source(data, split, 3), tmp_path / f"{split}.beton")
    augment, beton = AugmentConfig(**policy), DataConfig(source="ffcv", root=str(tmp_path), workers=1)
    expected = list(load(data, augment, **options).train.epoch(0))
    train = load(beton, augment, **options).train
    assert isinstance(train, FFCVTrainLoader)
    for (images, targets), (others, other_targets) in zip(train.epoch(0), expected, strict=True):
        assert images.shape == (4, 3, 40, 64)
        assert torch.equal(images, others)
        assert torch.equal(targets, other_targets)
    train._augment_on_batches = True  # as on a GPU
    for (images, _), (others, _) in zip(train.epoch(0), expected, strict=True):
        assert (images - others).abs().mean() < 0.3 / 255 / 0.225


# A run and what is made of it


def test_a_run(folder, model):
    out = (folder / "out.txt").read_text()
    assert "model: vil, 160×224 pixels, " in out
    stored = yaml.safe_load((folder / "run/config.yaml").read_text())
    assert stored["model"]["image_size"] == [160, 224]
    assert stored["schedule"]["progressive_resizing"] == [[0, [80, 112]], [0.5, [160, 224]]]
    (summary,) = json.loads((folder / "run/summary.json").read_text())
    assert summary["image_size"] == [160, 224]
    assert summary["flops"] == model.multiply_adds(SIZE) == multiply_adds(model, SIZE, 3)
    assert summary["train_memory_mb"] > summary["eval_memory_mb"] > 0
    assert list((folder / "run/tensorboard").iterdir())
    assert "vil, 160×224" in open_run(folder / "run", "run", "run").model


def test_a_continued_run_is_the_same(folder, tmp_path):
    argv = ["--config", folder / "config.yaml", "--output", tmp_path / "run"]
    call(train_program.main, *argv, "--schedule.max_steps", 3)
    call(train_program.main, *argv)
    ours, theirs = (read_training_state(step_files(run)[0][1]) for run in (tmp_path / "run", folder / "run"))
    assert ours["step"] == theirs["step"] == 4
    assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in theirs["model"])


def test_ranks_start_with_images_of_the_size(tmp_path, monkeypatch):
    shapes = []

    def data_parallel(model, process, shape):
        shapes.append(shape)
        return model

    monkeypatch.setattr(model_updater, "data_parallel", data_parallel)
    config = make_config(tmp_path, model=ModelConfig(image_size=(8, 12), num_classes=4))
    process = Process(0, 0, 2, CPU)
    model_updater.ModelUpdater(TinyModel(), config, process, EpochSteps.constant(5)).wrap_network()
    assert shapes == [(3, 8, 12)]


def test_evaluation(folder):
    (summary,) = json.loads((folder / "run/summary.json").read_text())
    (result,), table = evaluated(folder, "--checkpoint", folder / "run", "--csv", folder / "e.csv")
    (row,) = csv.DictReader((folder / "e.csv").read_text().splitlines())
    assert row["image_size"] == "160×224"
    keys = ("top1", "images", "image_size", "flops", "params", "train_memory_mb", "eval_memory_mb")
    assert [result[key] for key in keys] == [summary[key] for key in keys]
    assert result["loss"] == pytest.approx(summary["loss"])
    assert "160×224" in table
    for given, stored in (("[96, 64]", [96, 64]), ("64", 64), ("[64, 64]", 64)):
        argv = ["--checkpoint", folder / "run", "--complexity", "--model.image_size", given]
        (result,), _ = evaluated(folder, *argv)
        assert result["image_size"] == stored


def test_memory_and_speed_are_those_of_the_size():
    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x):
            shapes.add(tuple(x.shape[1:]))
            return x.mean((2, 3)) * self.weight

    shapes, spy = set(), Spy()
    options = {"device": CPU, "train_precision": "float32", "eval_precision": "float32"}
    measure_memory(spy, (4, 6), 3, **options)
    images_per_second(spy, (4, 6), 3, device=CPU, precision="float32", batch_size=1, seconds=0)
    multiply_adds(spy, (4, 6), 3)
    assert shapes == {(3, 4, 6)}


def test_files_of_other_programs_have_the_size(folder, tmp_path, model):
    call(export.main, folder / "run", tmp_path / "x.safetensors", "--format", "safetensors")
    call(export.main, folder / "run", tmp_path / "hub", "--format", "hf")
    by_timm = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    assert by_timm.img_size == SIZE
    picture = Image.open(photo(folder))
    for path in (folder / "run", tmp_path / "x.safetensors"):
        loaded = vil.load(path)
        x = loaded.transform(picture)[None]
        assert x.shape == (1, 3, *SIZE)
        with torch.no_grad():
            assert torch.equal(loaded.model(x), model(x))
            torch.testing.assert_close(by_timm(x), model(x))
    options = timm.data.resolve_model_data_config(by_timm)
    torch.testing.assert_close(timm.data.create_transform(**options)(picture), x[0])


def test_figures(folder, tmp_path):
    argv = [folder / "run", photo(folder), "--output", tmp_path, "--query", "10,200", "--stages", "1"]
    names = {Path(line).name for line in call(visualize.main, *argv).splitlines()}
    assert names == {f"stage1_{name}.png" for name in ("query_10_200", "globals", "rollout", "bias")}
    with pytest.raises(UserError) as refused:
        call(visualize.main, *argv, "--query", "200,10")
    assert str(refused.value) == "--query: 200,10 is outside the model input of 160×224 pixels"


def test_attention_sheet(model):
    images = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    sheet = attention_sheet(model, images, (0.5,) * 3, (0.5,) * 3)
    panels, panel_width = (
        6,
        round(PANEL_HEIGHT * 224 / 160),
    )  # the image, two stages with globals, one without
    assert sheet.shape[1] == 2 * PANEL_HEIGHT + GAP_WIDTH
    assert sheet.shape[2] == panels * panel_width + (panels - 1) * GAP_WIDTH


def test_predictions(folder, model):
    argv = [folder / "run", photo(folder), "--format", "json", "--device", "cpu", "--workers", 0]
    (prediction,) = json.loads(call(predict.main, *argv))
    loaded = vil.load(folder / "run")
    with torch.no_grad():
        probabilities = loaded.model(loaded.transform(Image.open(photo(folder)))[None]).softmax(1)[0]
    best = prediction["classes"][0]
    assert best["name"] == loaded.class_names[probabilities.argmax()]
    assert best["probability"] == pytest.approx(probabilities.max().item(), abs=1e-4)


def test_inspection(folder, tmp_path):
    argv = [folder / "images", "--json", tmp_path / "r.json", "--workers", 0, "--image-size", "200,250"]
    out = call(inspect_data.main, *argv)
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["image_size"] == [200, 250]
    small = {(x["width"], x["height"]) for x in report["smaller_images"]}
    assert small == {(200, 300), (230, 240), (260, 180), (290, 120)}
    assert "images are smaller than 200×250; the smallest is " in out
    with pytest.raises(UserError) as refused:
        call(inspect_data.main, folder / "images", "--image-size", "1,2,3")
    assert refused.value.reason.endswith("expected PIXELS or HEIGHT,WIDTH, e.g. 160,224, got '1,2,3'")
