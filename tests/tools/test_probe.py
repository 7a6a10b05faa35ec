"""tools/probe.py: k-nearest neighbors and logistic regression on frozen features."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from data.sources.digits import Digits
from data.transforms import evaluation_transform
from tools.ablation.results import estimate
from tools.programs.probe import (
    REGULARIZATION,
    Features,
    choose_regularization,
    draw_images,
    fit_logistic,
    main,
)
from vil.checkpoints.safetensors_file import write_safetensors
from vil.checkpoints.weights import Weights
from vil.config import DataConfig, ModelConfig, StageConfig
from vil.errors import UserError
from vil.models.zoo import model_from_config

STAGE = StageConfig(dim=24, heads=2, patch=8, attention="full")
MODEL = ModelConfig(name="vil", image_size=16, num_classes=10, stages=[STAGE])
TRANSFORM = {"crop_pct": 0.9, "mean": [0.3] * 3, "std": [0.4] * 3}
DIGITS = ["--data.source", "digits", "--data.workers", "0", "--device", "cpu", "--progress", "false"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "x.safetensors"
    torch.manual_seed(0)
    state = model_from_config(MODEL).state_dict()
    write_safetensors(path, Weights("x", "run", "raw", state, MODEL, transform=TRANSFORM))
    return path


@pytest.fixture(scope="module")
def probed(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any, Path]:
    """Results, features and their folder."""
    folder = tmp_path_factory.mktemp("probe")
    files = ["--json", str(folder / "x.json"), "--csv", str(folder / "x.csv")]
    files += ["--features", str(folder / "x.npz")]
    options = ["--k", "1", "20", "--C", "0.01", "--shots", "5", "--draws", "3", "--seed", "7"]
    main([str(weights), *files, *options, *DIGITS])
    return json.loads((folder / "x.json").read_text()), np.load(folder / "x.npz"), folder


def test_features_are_the_input_of_the_head_under_the_evaluation_transform(
    weights: Path, probed: Any
) -> None:
    _, features, _ = probed
    assert features["train_features"].shape == (1437, 24)
    assert features["val_features"].dtype == np.float32
    assert features["class_names"].tolist() == list("0123456789")
    source = Digits("val", "RGB")
    assert features["val_targets"].tolist() == source.targets.tolist()
    data = DataConfig(crop_pct=0.9, mean=(0.3,) * 3, std=(0.4,) * 3)
    transform = evaluation_transform(data, image_size=16, in_chans=3)
    model = model_from_config(MODEL).eval()
    torch.manual_seed(0)
    model.load_state_dict(model_from_config(MODEL).state_dict())
    with torch.no_grad():
        tokens = model.forward_features(torch.stack([transform(source.load(i)[0]) for i in range(5)]))
        np.testing.assert_allclose(
            features["val_features"][:5], model.forward_head(tokens, pre_logits=True), atol=1e-5
        )


def accuracies(train: Features, val: Features) -> dict[str, float]:
    """Return Top-1 of scikit-learn, in percent."""
    found = {}
    for k in (1, 20):
        knn = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
        )
        knn.fit(train.values.astype(np.float64), train.targets)
        found[f"knn {k}"] = 100 * knn.score(val.values.astype(np.float64), val.targets)
    scaler = StandardScaler().fit(train.values)
    regression = LogisticRegression(C=0.01, max_iter=1000).fit(scaler.transform(train.values), train.targets)
    found["logistic"] = 100 * regression.score(scaler.transform(val.values), val.targets)
    return found


def test_results_are_those_of_scikit_learn_on_the_features(probed: Any) -> None:
    result, features, _ = probed
    train, val = (
        Features(features[f"{split}_features"], features[f"{split}_targets"]) for split in ("train", "val")
    )
    by_key = {(row["method"], row["k"], row["shots"]): row for row in result["results"]}
    expected = accuracies(train, val)
    assert expected["knn 1"] != expected["knn 20"]
    for method, k, key in (("knn", 1, "knn 1"), ("knn", 20, "knn 20"), ("logistic", None, "logistic")):
        row = by_key[method, k, None]
        assert row["top1"] == pytest.approx(expected[key])
        assert (row["values"], row["low"], row["high"]) == ([row["top1"]], None, None)
        draws = [train.subset(draw_images(train.targets, 5, 7, draw)) for draw in range(3)]
        values = [accuracies(draw, val)[key] for draw in draws]
        row = by_key[method, k, 5]
        assert row["values"] == pytest.approx(values)
        found = estimate(values, (0, 100))
        assert (row["top1"], row["low"], row["high"]) == pytest.approx((found.mean, *found.interval))
    assert (result["train_images"], result["images"], result["features"]) == (1437, 360, 24)
    assert (result["model"], result["weights"], result["data"], result["seed"]) == ("vil", "raw", "digits", 7)


def test_files(probed: Any) -> None:
    result, _, folder = probed
    rows = list(csv.DictReader((folder / "x.csv").open()))
    assert [row["top1"] for row in rows] == [str(row["top1"]) for row in result["results"]]
    assert {row["checkpoint"] for row in rows} == {result["checkpoint"]}
    assert [row["shots"] for row in rows] == ["", "", "5", "5", "", "5"]


def test_a_draw_has_as_many_images_of_each_class() -> None:
    targets = np.array([0, 1, 2] * 30)
    drawn = draw_images(targets, 4, seed=0, draw=0)
    assert np.bincount(targets[drawn]).tolist() == [4, 4, 4]
    assert len(set(drawn.tolist())) == 12
    assert drawn.tolist() == draw_images(targets, 4, 0, 0).tolist()
    for seed, draw in ((0, 1), (1, 0)):
        assert drawn.tolist() != draw_images(targets, 4, seed, draw).tolist()


def test_the_regularization_is_chosen_on_held_out_training_images() -> None:
    rng = np.random.default_rng(0)
    targets = np.arange(60) % 2
    noise = rng.normal(size=(60, 40)) + 0.5 * targets[:, None] * (np.arange(40) < 2)
    train = Features(noise.astype(np.float32), targets)
    chosen = choose_regularization(train, seed=0)
    assert chosen in REGULARIZATION
    assert fit_logistic(train, None, 0)[1] == chosen
    assert fit_logistic(train, 0.5, 0)[1] == 0.5
    few = train.subset(np.arange(8))
    assert choose_regularization(few, seed=0) == 1.0
    perfect = Features(np.eye(2, dtype=np.float32)[targets], targets)
    assert choose_regularization(perfect, seed=0) == REGULARIZATION[0]  # the smallest of equal ones


def test_a_model_of_timm_and_few_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    timm_options = ["--model.image_size", "32", "--data.images_per_class", "6"]
    options = [
        "--methods",
        "knn",
        "--k",
        "3",
        "100",
        "--shots",
        "2",
        "9",
        "--features",
        str(tmp_path / "x.npz"),
    ]
    main(["timm/test_resnet", *options, *timm_options, *DIGITS])
    screen = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in screen[1:3]] == [["knn,", "k", "3", "all"], ["knn,", "k", "3", "2"]]
    features = timm.create_model("test_resnet").num_features
    assert screen[3] == (
        f"timm/test_resnet, untrained weights, {features} features; "
        "60 training and 360 validation images of digits"
    )
    assert "skipping --shots 9: a class has only 6 training images" in caplog.messages
    assert np.load(tmp_path / "x.npz")["train_features"].shape == (60, features)


def error_of(argv: list[str]) -> str:
    with pytest.raises(UserError) as refused:
        main(argv)
    return str(refused.value)


def test_refusals(weights: Path, tmp_path: Path) -> None:
    path = str(weights)
    few = [*DIGITS, "--data.images_per_class", "2"]
    for classes, split in (("ab", "train"), ("ac", "val")):
        for number, name in enumerate(classes):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (20, 20), (100 * number, 0, 0)).save(tmp_path / split / name / "1.png")
    for argv, message in (
        ([str(tmp_path / "none"), *few], f"checkpoint: {tmp_path / 'none'}: no such file or folder"),
        (
            ["timm/resnet_18", *few],
            "command line: model.name: timm has no model 'resnet_18'; did you mean timm/resnet18?",
        ),
        ([path, *few, "--tta", "hflip"], "command line: --tta: is not an option of probe.py"),
        ([*few, path], "command line: --data.source: options of eval.py follow the checkpoints"),
        (
            [path, *few, "--k", "21", "--methods", "knn"],
            "--k: expected at most 20, the number of training images",
        ),
        (
            [path, *few, "--k", "0"],
            "command line: argument --k: expected an integer from 1 to 1000000, got '0'",
        ),
        ([path, "--C", "-1"], "command line: argument --C: expected auto or a number above 0, got '-1'"),
        ([path, *few, "--json", path], f"--json: {path} is an input of this command; name another file"),
        ([path, *few, "--csv", str(tmp_path)], f"--csv: {tmp_path} cannot be written: Is a directory"),
        (
            ["timm/test_resnet", *DIGITS[2:], "--data.source", "folder", "--data.root", str(tmp_path)],
            f"command line: data.root: {tmp_path / 'val'}: classes that the training split lacks: c",
        ),
    ):
        assert error_of(argv) == message
