"""train.py before the first step: defaults, the output folder, and errors of one rank."""

import contextlib
import io
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from helpers import forked
from helpers.tiny_run import CPU
from PIL import Image

import eval as eval_program
import train as program
from vil.checkpoints import run_folder
from vil.command_line import resolve_train_command
from vil.command_line.train_command import default_output
from vil.config import DataConfig, ModelConfig, TrainConfig
from vil.errors import UserError
from vil.models.zoo import model_from_config
from vil.runtime import consistency
from vil.validation import stored_tree, with_absolute_paths

ROOT = Path(__file__).parents[1]
VIL_32 = str(ROOT / "configs" / "models" / "vil_32.yaml")
DIGITS = str(ROOT / "configs" / "data" / "digits.yaml")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder without runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def configure(*argv):
    return resolve_train_command([*map(str, argv)]).config


def ranks(*argv):
    line = [forked.python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *argv]
    environment = {**ENVIRONMENT, "PYTHON_EXEC": forked.python()}
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=200)


def test_a_named_model_is_not_merged_with_the_demos(folder):
    config = configure("--model.name", "timm/resnet10t")
    assert config.model == ModelConfig(name="timm/resnet10t")
    assert config.schedule.epochs == configure().schedule.epochs == 25
    (folder / "tiny.yaml").write_text("model: {name: vil_tiny}\n")
    assert configure("--config", "tiny.yaml").model == ModelConfig(name="vil_tiny")
    assert configure("--model", VIL_32, "--model.name", "vil").model.stages is not None
    assert configure("--model.window", "3").model.stages is not None


def test_importing_a_program_sets_defaults_for_pytorch():
    names = ("OMP_WAIT_POLICY", "THP_MEM_ALLOC_ENABLE")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    for module in ("train", "eval"):
        reload = f"import {module}, importlib; importlib.reload({module})"  # may be imported already
        code = f"{reload}; import os; print(*map(os.environ.get, {names}))"
        command = [forked.python(), "-c", code]
        printed = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert printed.stdout == "PASSIVE 1\n"


def test_paths_of_a_run_are_stored_absolute(folder, monkeypatch):
    config = configure(
        "--data.source", "folder", "--data.root", "photos", "--data.list_file", "x/../list.txt"
    )
    assert (config.data.root, config.output) == ("photos", "runs/photos")
    run_folder.write_config(folder, config)
    stored = yaml.safe_load((folder / "config.yaml").read_text())["data"]
    assert (stored["root"], stored["list_file"]) == (f"{folder}/photos", f"{folder}/list.txt")
    assert stored["val_list"] is None
    of_timm = {"teacher": "timm/resnet10t", "teacher_weights": "pretrained"}
    assert with_absolute_paths({"schedule": of_timm}) == {"schedule": of_timm}
    assert with_absolute_paths({"schedule": {"teacher": "old"}})["schedule"]["teacher"] == f"{folder}/old"
    older = stored_tree(config) | {"data": {**stored, "root": "photos", "list_file": "list.txt"}}
    assert run_folder.differences(stored_tree(config), config) == []
    assert run_folder.differences(older, config) == []
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    assert configure("--output", str(folder)).data.root == f"{folder}/photos"
    changed = ("data.root", f"{folder}/photos", f"{folder}/elsewhere/photos")
    config.data.list_file = f"{folder}/list.txt"
    assert run_folder.differences(yaml.safe_load((folder / "config.yaml").read_text()), config) == [changed]
    monkeypatch.setenv("HOME", "/home/someone")
    home = with_absolute_paths(
        {"data": {"root": "~/photos", "val_list": "", "real_labels": None}, "model": {"init_from": "runs/x"}}
    )
    assert home == {
        "data": {"root": "/home/someone/photos", "val_list": "", "real_labels": None},
        "model": {"init_from": f"{folder}/elsewhere/runs/x"},
    }


def test_a_run_of_relative_paths_continues_and_is_evaluated_from_another_folder(folder, monkeypatch):
    for split, name in (("train", "a"), ("train", "b"), ("val", "a"), ("val", "b")):
        (folder / "photos" / split / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), (90 * (name == "a"), 0, 0)).save(
            folder / "photos" / split / name / "1.png"
        )
    options = ["--data.source", "folder", "--data.root", "photos", "--data.workers", "0", "--device", "cpu",
               "--model", VIL_32, "--model.blocks", "1", "1", "1", "--schedule.batch_size", "2", "--progress",
               "false", "--loggers", "[]", "--schedule.warmup_epochs", "0"]  # fmt: skip
    program.main([*options, "--schedule.epochs", "1", "--output", "run"])
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    program.main(["--output", "../run", "--schedule.epochs", "2"])
    eval_program.main(
        ["--checkpoint", "../run", "--json", "x.json", "--device", "cpu", "--progress", "false"]
    )
    (result,) = json.loads(Path("x.json").read_text())
    assert (result["data"], result["images"]) == (f"{folder}/photos/val", 2)
    summary = json.loads(Path("../run/summary.json").read_text())[0]
    assert [row["class"] for row in summary["per_class"]] == ["a", "b"]
    assert "balanced_accuracy" in Path("../run/metrics.jsonl").read_text()


def test_a_refused_run_writes_no_split(folder):
    for name in "ab":
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (16, 16)).save(folder / "photos" / name / f"{number}.png")
    options = ["--data.source", "folder", "--data.root", "photos", "--data.workers", "0", "--device", "cpu",
               "--model", VIL_32, "--data.val_fraction", "0.5", "--output", "run"]  # fmt: skip
    with pytest.raises(UserError) as error:
        program.main([*options, "--schedule.batch_size", "4", "--schedule.class_weights", "1", "2", "3"])
    assert error.value.location == "schedule.class_weights"
    assert not (folder / "run").exists()


def test_a_run_writes_its_split_and_compares_data_and_weights_between_ranks(folder, monkeypatch):
    for name in "ab":
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (16, 16)).save(folder / "photos" / name / f"{number}.png")
    compared = []
    monkeypatch.setattr(consistency, "check_data", lambda key, describe: compared.append(key))
    monkeypatch.setattr(consistency, "check_weights", lambda key, model: compared.append(key))
    program.main(["--data.source", "folder", "--data.root", "photos", "--data.workers", "0",
                  "--device", "cpu",
                  "--model", VIL_32, "--data.val_fraction", "0.5", "--output", "run",
                  "--schedule.max_steps", "1",
                  "--schedule.batch_size", "4", "--progress", "false", "--loggers", "[]"])  # fmt: skip
    assert len((folder / "run" / "split.txt").read_text().splitlines()) == 4
    eval_program.main(["--checkpoint", "run", "--device", "cpu", "--progress", "false"])
    data = ["data.root", "data.real_labels"]
    assert compared == [*data, "model", *data, "checkpoint"]


def test_a_named_data_set_is_not_merged_with_the_digits():
    given, plain = ["--data.source", "folder", "--data.root", "x"], DataConfig(source="folder", root="x")
    assert configure(*given).data == plain
    assert configure("--data", DIGITS, *given).data.mean == (0.309, 0.309, 0.309)
    assert configure("--data.source", "digits").data.mean == (0.309, 0.309, 0.309)


@pytest.mark.parametrize("name", ["timm/resnet10t", "vil_tiny"])
def test_any_model_of_the_zoo_and_of_timm_is_built_from_its_name(name):
    config = configure("--model.name", name, "--model.image_size", "64", "--data.workers", "0")
    _, model, _ = program.build(config, CPU, is_new=True)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 10)


def test_a_model_of_timm_without_logits_is_not_trained():
    options = ["--model.name", "timm/resnet10t", "--model.image_size", "64", "--data.workers", "0"]
    config = configure(*options, "--model.timm_options", "{global_pool: ''}")
    with pytest.raises(UserError, match=r"^model\.timm_options: timm/resnet10t cannot compute images of 64"):
        program.build(config, CPU, is_new=True)


def test_what_a_run_starts_from_is_named_with_its_file(folder):
    (folder / "model.yaml").write_text("init_from: nowhere\n")
    with pytest.raises(UserError, match=r"^model\.yaml: model\.init_from: nowhere"):
        configure("--model", "model.yaml")
    (folder / "model.yaml").write_text("init_released_config: x.yaml\n")
    with pytest.raises(UserError, match=r"^model\.yaml: model\.init_released_config: "):
        configure("--model", "model.yaml")


def test_the_first_lines_of_a_run_name_data_model_and_recipe():
    def describe(*argv):
        command = resolve_train_command(
            [*argv, "--data.workers", "0", "--device", "cpu", "--precision", "float32"]
        )
        loaders, model, _ = program.build(command.config, CPU, is_new=True)
        return program.describe_run(command.config, loaders, model, CPU, command)

    data, model, recipe = describe()
    assert data == "data: 10 classes, 1,437 training and 360 validation images (digits)"
    assert model.startswith("model: vil, 32×32 pixels, 0.")
    assert recipe.startswith("recipe: 25 epochs of ")
    *_, recipe, warning = describe("--schedule.epochs", "1", "--schedule.lr", "0.25")
    assert recipe.startswith("recipe: 1 epoch of ")
    reason = "schedule.warmup_epochs 3 is not below epochs 1: the learning rate does not reach 0.25"
    assert warning == f"warning: {reason}"


def printed(main, *argv):
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen), pytest.raises(SystemExit) as exit_:
        main([*map(str, argv)])
    assert exit_.value.code in (0, None)
    return yaml.safe_load(screen.getvalue())


@pytest.mark.parametrize("option", ["--print_config", "--print_config=skip_default"])
def test_the_printed_configuration_is_the_one_that_would_run(folder, option):
    (folder / "run").mkdir()
    run_folder.write_config(folder / "run", TrainConfig(seed=77, data=DataConfig(train_split="08")))
    found = printed(program.main, "--output", "run", option)
    assert (found["seed"], found["data"]["train_split"]) == (77, "08")
    assert printed(program.main, option, "--output", "new", "--seed", "5")["seed"] == 5
    found = printed(eval_program.main, option, "--model.name", "timm/resnet10t", "--device", "cpu")
    assert found["model"]["name"] == "timm/resnet10t"


@pytest.mark.parametrize(
    ("root", "name"),
    [
        ("imagenet/", "imagenet"),
        (".", "here"),
        ("..", "above"),
        ("x/..", "here"),
        ("/", "data"),
        ("link", "link"),
    ],
)
def test_the_output_is_named_after_the_data(folder, monkeypatch, root, name):
    (folder / "above" / "here").mkdir(parents=True)
    (folder / "above" / "here" / "link").symlink_to("/")
    monkeypatch.chdir(folder / "above" / "here")
    assert default_output(DataConfig(source="folder", root=root)) == f"runs/{name}"
    assert default_output(DataConfig(source="torch/cifar10", root=root)) == "runs/cifar10"


def test_all_machines_follow_the_run_that_rank_0_continues(folder):
    """Each rank works in a separate folder, as on machines without a shared disk."""
    for rank, seed in (("0", 77), ("1", 5)):
        (folder / rank / "run").mkdir(parents=True)
        run_folder.write_config(folder / rank / "run", TrainConfig(seed=seed, device="cpu"))
    (folder / "machine.py").write_text(
        "import os, pathlib, train\n"
        "os.chdir(os.environ['RANK'])\n"
        "def build(config, process, is_new, order_version):\n"
        "    pathlib.Path('seed').write_text(str(config.seed))\n"
        "    raise SystemExit(0)\n"
        "train.build = build\n"
        "train.main(['--output', 'run'])\n"
    )
    ended = ranks("machine.py")
    assert ended.returncode == 0, ended.stderr
    assert [(folder / rank / "seed").read_text() for rank in "01"] == ["77", "77"]


def test_the_rank_with_an_unreadable_image_prints_the_error(folder):
    """Validation images are assigned to ranks in turn: the second one to rank 1."""
    for split in ("train", "val"):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (32, 32)).save(folder / split / name / f"{number}.png")
    (folder / "val" / "a" / "1.png").write_bytes(b"damaged")
    argv = [
        "--data.source", "folder", "--data.root", ".", "--device", "cpu", "--progress", "false",
        "--data.workers", "0",
    ]  # fmt: skip
    model = ["--model", VIL_32]
    train = ["--schedule.batch_size", "2", "--schedule.epochs", "1", "--schedule.warmup_epochs", "0"]
    train += ["--schedule.augment.mixup", "0", "--schedule.augment.cutmix", "0"]  # a rank has one image
    for line in (
        [str(ROOT / "eval.py"), *model, *argv],
        [str(ROOT / "train.py"), *model, *argv, *train, "--loggers", "[]"],
    ):
        ended = ranks(*line)
        assert ended.returncode != 0
        named = [text for text in ended.stderr.splitlines() if "1.png" in text]
        assert len(named) == 1, ended.stderr
        assert named[0].startswith("[rank 1] error: command line: data.root: ")
    ended = ranks(str(ROOT / "eval.py"), *model, "--data.source", "folder", "--data.root", "none")
    assert ended.stderr.count("error: ") == ended.stderr.count("error: command line: data.root: ") == 1


def test_a_model_that_takes_one_size_only_is_refused_others():
    options = ["--model.name", "timm/vit_tiny_patch16_224", "--model.image_size", "32"]
    model = model_from_config(resolve_train_command([*options, "--output", "x"]).config.model, 10)
    program.check_sizes(model, "schedule.progressive_resizing", [32], 3, torch.device("cpu"))
    with pytest.raises(
        UserError,
        match=r"schedule\.progressive_resizing: VisionTransformer does not support images of 16×16: ",
    ):
        program.check_sizes(model, "schedule.progressive_resizing", [16, 32], 3, torch.device("cpu"))
