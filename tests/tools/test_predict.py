"""tools/predict.py: probabilities and class names of every readable image."""

from __future__ import annotations

import csv
import json
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo

from data.transforms import evaluation_transform
from data.workers import limit_workers
from tools.programs import predict as program
from vil.checkpoints.safetensors_file import write_safetensors
from vil.checkpoints.weights import Weights
from vil.command_line import main
from vil.config import DataConfig, ModelConfig, StageConfig
from vil.errors import UserError
from vil.models.zoo import model_from_config

NAMES = ("ant", "bee", "cat", "dog", "eel")
STAGES = [StageConfig(dim=8, heads=2, patch=8, window=3)]
CONFIG = ModelConfig(name="vil", image_size=32, num_classes=5, stages=STAGES)
DATA = {"crop_pct": 0.8, "interpolation": "bilinear", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


def write_checkpoint(path, config=CONFIG, names=NAMES):
    """Write safetensors of a model whose predictions differ from image to image."""
    torch.manual_seed(0)
    model = model_from_config(config)
    torch.nn.init.normal_(model.head.weight, std=2.0)
    write_safetensors(
        path, Weights("x", "run", "raw", model.state_dict(), config, transform=DATA, class_names=names)
    )
    return model.eval()


def write_image(path, seed, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Create images in numbered folders, one damaged, other files, and circular links."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(
        ("img10.png", "img2.png", "Img1.jpg", "sub/b.bmp", "sub/a.webp", ".git/no.txt")
    ):
        write_image(tmp_path / "pics" / name, seed) if not name.endswith("txt") else None
    (tmp_path / "pics" / "notes.txt").write_text("no image")
    (tmp_path / "pics" / "sub" / "c.jpg").write_bytes((tmp_path / "pics" / "Img1.jpg").read_bytes()[:300])
    (tmp_path / "pics" / "sub" / "up").symlink_to("..")
    (tmp_path / "pics" / "again").symlink_to("sub")
    (tmp_path / "pics" / "gone.png").symlink_to("nowhere.png")
    return tmp_path


def run(capsys, *argv):
    """Run the program; return exit status, standard output and standard error."""
    sys.argv = ["predict.py", *map(str, argv)]
    with pytest.raises(SystemExit) as ended:
        main(program.main)
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def expected(model, path):
    """Return the probabilities by hand: decode, transform, softmax."""
    data = DataConfig(crop_pct=0.8, interpolation="bilinear", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    transform = evaluation_transform(data, image_size=32, in_chans=3)
    with Image.open(path) as image, torch.no_grad():
        return model(transform(image.convert("RGB"))[None]).softmax(dim=1)[0]


READABLE = ["pics/again/a.webp", "pics/again/b.bmp", "pics/Img1.jpg", "pics/img2.png", "pics/img10.png"]


def test_folder_as_json(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    model = write_checkpoint(folder / "x.safetensors")
    argv = ["x.safetensors", "pics", "pics/img2.png", "--format", "json", "--top", "2", "--batch-size", "2"]
    status, out, err = run(capsys, *argv, "--workers", "2", "--output", "new/out.json")
    assert (status, out) == (1, "new/out.json: 8 images\n")
    entries = json.loads((folder / "new" / "out.json").read_text())
    # Natural order; what a link leads to once; links in a circle not at all.
    assert [entry["image"] for entry in entries] == [
        "pics/again/a.webp", "pics/again/b.bmp", "pics/again/c.jpg", "pics/gone.png",
        "pics/Img1.jpg", "pics/img2.png", "pics/img10.png", "pics/img2.png",
    ]  # fmt: skip
    broken = {entry["image"]: entry["error"] for entry in entries if "error" in entry}
    assert list(broken) == ["pics/again/c.jpg", "pics/gone.png"]
    assert broken["pics/gone.png"] == "No such file or directory"
    assert err.splitlines() == [f"{path}: cannot be read: {reason}" for path, reason in broken.items()]
    for entry in entries:
        if "error" in entry:
            continue
        probable = expected(model, entry["image"])
        assert [c["class"] for c in entry["classes"]] == probable.topk(2).indices.tolist()
        shares = torch.tensor([c["probability"] for c in entry["classes"]])
        assert torch.allclose(shares, probable.topk(2).values, atol=1e-5)
        assert all(c["name"] == c["label"] == NAMES[c["class"]] for c in entry["classes"])
    assert os.listdir(folder / "new") == ["out.json"]


def test_csv_and_table(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    model = write_checkpoint(folder / "x.safetensors")
    strange = write_image(folder / "new\nline, é.png", 7)
    argv = ["x.safetensors", READABLE[2], strange, "--workers", "0", "--top", "9"]  # more than there are
    status, out, err = run(capsys, *argv, "--format", "csv")
    assert (status, err) == (0, "")
    rows = list(csv.DictReader(out.splitlines(keepends=True)))
    assert [row["image"] for row in rows] == [READABLE[2]] * 5 + [str(strange)] * 5
    assert [row["rank"] for row in rows[:5]] == list("12345")
    order = expected(model, READABLE[2]).argsort(descending=True).tolist()
    assert [(int(row["class"]), row["name"]) for row in rows[:5]] == [(i, NAMES[i]) for i in order]
    assert sum(float(row["probability"]) for row in rows[:5]) == pytest.approx(1, abs=1e-4)

    status, out, _ = run(capsys, *argv, "missing.png")
    lines = out.splitlines()
    assert status == 1
    assert len(lines) == 1 + 10 + 1  # the line break in the name is none here
    assert lines[0].split() == ["image", "class", "probability", "name"]
    best = expected(model, READABLE[2]).max().item()
    assert lines[1].split() == [READABLE[2], str(order[0]), f"{100 * best:.2f}", "%", NAMES[order[0]]]
    assert lines[6].startswith(f"{folder}/new line, é.png ")
    assert lines[-1].split(maxsplit=1) == ["missing.png", "cannot be read: No such file or directory"]


def test_exif_and_grayscale_are_decoded_as_in_training(folder, capsys, monkeypatch):
    """Decoding is the sources': EXIF is not applied, gray becomes RGB."""
    monkeypatch.setattr(sys, "argv", [])
    model = write_checkpoint(folder / "x.safetensors")
    gray = write_image(folder / "gray.png", 8, "L")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = folder / "turned.jpg"
    with Image.open(write_image(folder / "flat.png", 9)) as image:
        image.save(turned, exif=exif, quality=95)
    _, out, _ = run(capsys, "x.safetensors", gray, turned, "--workers", "0", "--format", "json", "--top", "5")
    for path, entry in zip((gray, turned), json.loads(out)):
        shares = {c["class"]: c["probability"] for c in entry["classes"]}
        assert [shares[i] for i in range(5)] == pytest.approx(expected(model, path).tolist(), abs=1e-4)


def test_imagenet_class_names():
    """The order of the challenge: known positions, sorted synsets."""
    classes = program.name_classes(1000, None)
    known = {
        0: "tench", 1: "goldfish", 2: "great white shark", 207: "golden retriever", 281: "tabby",
        388: "giant panda", 504: "coffee mug", 817: "sports car", 963: "pizza", 999: "toilet tissue",
    }  # fmt: skip
    for index, name in known.items():
        assert classes[index].name.split(",")[0] == name
    labels = [c.label for c in classes]
    assert labels == sorted(labels)
    assert (labels[0], labels[999]) == ("n01440764", "n15075141")
    # A run on ten of its classes has stored their synsets.
    synsets = ImageNetInfo("imagenet-1k").label_names()[200:210]
    assert program.name_classes(10, synsets)[7] == program.ClassName(7, "n02099601", "golden retriever")
    assert program.name_classes(3, None)[2] == program.ClassName(2, "2", "2")
    known = program.name_classes(1000, ("one", "two"))  # a larger head than the data has classes
    assert [known[row].name for row in (0, 1, 2, 999)] == ["one", "two", "2", "999"]


def test_thousand_classes_without_names_are_imagenets(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    config = ModelConfig(name="timm/resnet10t", image_size=64, num_classes=1000)
    model = model_from_config(config)
    write_safetensors("x.safetensors", Weights("x", "run", "raw", model.state_dict(), config))
    status, out, _ = run(capsys, "x.safetensors", READABLE[3], "--workers", "0", "--format", "json")
    imagenet = ImageNetInfo("imagenet-1k")
    classes = json.loads(out)[0]["classes"]
    assert (status, len(classes)) == (0, 5)
    for entry in classes:
        assert entry["label"] == imagenet.index_to_label_name(entry["class"])
        assert entry["name"] == imagenet.index_to_description(entry["class"])


def test_natural_order():
    names = ["b10", "B2", "a", "b2", "b02", "10", "9", "b2a", "b1x10", "b1x9"]
    assert sorted(names, key=program.natural_key) == [
        "9", "10", "a", "b1x9", "b1x10", "B2", "b02", "b2", "b2a", "b10",
    ]  # fmt: skip


def test_folder_without_images_is_reported(folder, capsys, monkeypatch):
    """Every error is reported, and the other images are processed."""
    monkeypatch.setattr(sys, "argv", [])
    write_checkpoint(folder / "x.safetensors")
    (folder / "empty").mkdir()
    argv = ["x.safetensors", "empty", READABLE[3], "--workers", "0", "--format", "json"]
    status, out, err = run(capsys, *argv)
    assert (status, err) == (1, "empty: cannot be read: Is a directory\n")
    assert [entry["image"] for entry in json.loads(out)] == ["empty", READABLE[3]]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["x.safetensors"], "the following arguments are required: images"),
        (["nothing", "pics"], "nothing: no such file or folder"),
        (["x.safetensors", "pics", "--top", "0"], "argument --top: expected an integer of at least 1"),
        (["x.safetensors", "pics", "--workers", "-1"], "argument --workers: expected an integer of at least"),
        (["x.safetensors", "pics", "--batch-size", "0"], "argument --batch-size: expected an integer of"),
        (["x.safetensors", "pics", "--output", "pics"], "--output: pics is a folder; expected a file"),
        (["x.safetensors", READABLE[3], "--workers", "0", "--output", "x.safetensors/out"],
         "--output: x.safetensors/out cannot be written: "),
        (["pics/img2.png", "pics"], "pics/img2.png: not a checkpoint"),
    ],
)  # fmt: skip
def test_invalid_arguments(folder, argv, message):
    write_checkpoint(folder / "x.safetensors")
    with pytest.raises(UserError) as error:
        program.main(argv)
    assert str(error.value).removeprefix("command line: ").startswith(message)


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_an_image_without_finite_logits_has_no_prediction(folder, capsys, monkeypatch, form):
    """Weights and pixels are finite, but their products are not."""
    monkeypatch.setattr(sys, "argv", [])
    torch.manual_seed(0)
    model = model_from_config(CONFIG)
    state_dict = {name: value * 1e30 for name, value in model.state_dict().items()}
    weights = Weights("x", "run", "raw", state_dict, CONFIG, transform=DATA, class_names=NAMES)
    write_safetensors("x.safetensors", weights)
    argv = ["x.safetensors", "pics/img2.png", "--workers", "0", "--format", form]
    status, out, err = run(capsys, *argv)
    assert (status, err) == (1, "pics/img2.png: the logits are not finite\n")
    assert "nan" not in out.lower()
    assert "the logits are not finite" in out


def test_features_are_no_classes(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    state_dict = model_from_config(CONFIG).state_dict()
    config = ModelConfig(name="vil", image_size=32, num_classes=0, stages=STAGES)
    write_safetensors("x.safetensors", Weights("x", "run", "raw", state_dict, config))
    status, out, err = run(capsys, "x.safetensors", "pics/img2.png", "--workers", "0")
    assert status == 2
    assert "%" not in out
    assert err.startswith("error: model.num_classes: the model has no classifier (0 classes)")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_predictions_that_cannot_be_written_are_an_error(folder, capsys, monkeypatch):
    write_checkpoint(folder / "x.safetensors")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        status, _, err = run(capsys, "x.safetensors", "pics/img2.png", "--workers", "0")
    assert status == 2
    assert err == "error: --output: standard output cannot be written: No space left on device\n"


def test_workers_are_limited_to_the_cores(folder, capsys, monkeypatch):
    write_checkpoint(folder / "x.safetensors")
    counts = []
    loader = program.DataLoader

    def counted(*arguments, num_workers, **options):
        counts.append(num_workers)
        return loader(*arguments, num_workers=0, **options)

    monkeypatch.setattr(program, "DataLoader", counted)
    status, _, err = run(capsys, "x.safetensors", "pics/img2.png", "--workers", "1000000")
    assert status == 0, err
    assert counts == [limit_workers(1_000_000)]
