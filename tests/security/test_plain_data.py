"""Untrusted configurations, in any kind of file, execute and download nothing, and write no files.

Every payload names a command that would make the file PWNED, a module that would, or a place on the network
or the disk. Each is put into every carrier of a model section and given to every program that opens it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import resource
import sys
import typing
from pathlib import Path

import pytest
import timm
import torch
import yaml
from helpers.audit import NETWORK, PROCESSES, recorded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import eval as eval_program
import train as train_program
import vil
from data.sources import open_source
from tools.ablation import main as ablate
from tools.programs import export, predict
from tools.report_page import main as report
from tools.visualization import main as visualize
from vil import command_line
from vil.checkpoints import checkpoint_files
from vil.command_line import resolve_train_command
from vil.config import DataConfig, EvalConfig, TrainConfig
from vil.errors import UserError
from vil.validation import TIMM_NUMBER_OPTIONS, TIMM_START_OPTIONS, TIMM_TEXT_OPTIONS

ROOT = Path(__file__).parents[2]
PARITY = ROOT / "tests" / "fixtures" / "parity" / "vil_rpe_chunk"
MARKER = "PWNED"

COMMAND = {"class_path": "subprocess.Popen", "init_args": {"args": f"touch {MARKER}", "shell": True}}
CALL = {"class_path": "subprocess.call", "init_args": {"popenargs": [f"touch {MARKER}"], "shell": True}}
MODULE = {"class_path": "strangers_module.Payload"}

# Options of a timm model, as in an untrusted file.
PAYLOADS: dict[str, dict[str, typing.Any]] = {
    "text": {"x": json.dumps(COMMAND)},
    "text of a known option": {"drop_rate": json.dumps(COMMAND)},
    "function": {"drop_rate": json.dumps(CALL)},
    "escaped text": {"drop_rate": json.dumps(COMMAND).replace("class_path", "class\\u005fpath")},
    "YAML text": {
        "drop_rate": f"{{? class_path : subprocess.Popen, init_args: {{args: touch {MARKER}, shell: true}}}}"
    },
    "module": {"drop_rate": json.dumps(MODULE)},
    "name of a class": {"drop_rate": "strangers_module.Payload"},
    "list of text": {"depth": [json.dumps(COMMAND)]},
    "mapping": {"x": COMMAND},
    "nested mapping": {"drop_rate": {"y": [COMMAND]}},
    "pretrained": {"pretrained": True},
    "url": {"pretrained": True, "pretrained_cfg": {"url": "http://192.0.2.1/wandb.py"}, "cache_dir": "."},
    "overlay": {"pretrained": True, "pretrained_cfg_overlay": {"hf_hub_id": "stranger/model"}},
    "checkpoint_path": {"checkpoint_path": "/dev/stdin"},
    "unknown option": {"custom_load": True},
}
ONLY_FETCHES = ("pretrained", "url", "overlay", "checkpoint_path")
"""Payloads of which a run's own files may hold remnants of an earlier version: they are left out, unused."""


def model_section(options: dict[str, typing.Any]) -> dict[str, typing.Any]:
    return {"name": "timm/resnet10t", "image_size": 32, "num_classes": 10, "timm_options": options}


def run_state(options: dict[str, typing.Any]) -> dict[str, typing.Any]:
    config = {"model": model_section(options), "data": {"source": "digits", "workers": 0}}
    return {
        "model": {"w": torch.ones(1)},
        "ema": None,
        "best": {},
        "class_names": list("0123456789"),
        "config": config,
    }


def safetensors(options: dict[str, typing.Any]) -> list[str]:
    save_file({"w": torch.ones(1)}, "strange.safetensors", {"model": json.dumps(model_section(options))})
    return ["strange.safetensors"]


def checkpoint(options: dict[str, typing.Any]) -> list[str]:
    torch.save(run_state(options), "strange.pt")
    return ["strange.pt"]


def run_folder(options: dict[str, typing.Any]) -> list[str]:
    state, best = run_state(options), Path("strange_run") / checkpoint_files.BEST
    best.parent.mkdir(parents=True)
    torch.save(state, best)
    checkpoint_files.digest_file(best).write_text(f"{checkpoint_files.file_digest(best)}  {best.name}\n")
    Path("strange_run/config.yaml").write_text(yaml.safe_dump(state["config"]))
    Path("strange_run/metrics.jsonl").write_text("")
    return ["strange_run"]


def model_yaml(options: dict[str, typing.Any]) -> list[str]:
    Path("strange.yaml").write_text(yaml.safe_dump(model_section(options)))
    return ["--model", "strange.yaml"]


def config_yaml(options: dict[str, typing.Any]) -> list[str]:
    Path("strange.yaml").write_text(yaml.safe_dump({"model": model_section(options)}))
    return ["--config", "strange.yaml"]


def grid(options: dict[str, typing.Any]) -> list[str]:
    content = {
        "base": {f"model.{key}": value for key, value in model_section(options).items()},
        "factors": {"rate": {"low": {"schedule.lr": 0.1}, "high": {"schedule.lr": 0.2}}},
        "seeds": [0],
    }
    Path("strange.yaml").write_text(yaml.safe_dump(content))
    return ["strange.yaml"]


QUICK = ["--data.workers", "0", "--device", "cpu", "--progress", "false"]
WEIGHTS = [safetensors, checkpoint, run_folder]
SECTIONS = [model_yaml, config_yaml]
ENTRIES = [
    *((carrier, eval_program.main, ["--checkpoint", "{}", *QUICK]) for carrier in WEIGHTS),
    *((carrier, eval_program.main, ["--checkpoint", "{}", "--complexity", *QUICK]) for carrier in WEIGHTS),
    *((carrier, eval_program.main, ["--checkpoint", "{}", "--print_config", *QUICK]) for carrier in WEIGHTS),
    *(
        (carrier, train_program.main, ["--model.init_from", "{}", "--output", "new", *QUICK])
        for carrier in WEIGHTS
    ),
    *((carrier, predict.main, ["{}", "photo.png"]) for carrier in WEIGHTS),
    *((carrier, export.main, ["{}", "out.safetensors", "--format", "safetensors"]) for carrier in WEIGHTS),
    *((carrier, export.main, ["{}", "out.pt2", "--format", "torch"]) for carrier in WEIGHTS),
    *((carrier, visualize.main, ["{}", "photo.png", "--output", "sheets"]) for carrier in WEIGHTS),
    (run_folder, train_program.main, ["--output", "{}", *QUICK]),
    (run_folder, train_program.main, ["--output", "{}", "--print_config", *QUICK]),
    (run_folder, report.main, ["{}", "--output", "page.html"]),
    *((carrier, eval_program.main, ["{}", "--complexity", *QUICK]) for carrier in SECTIONS),
    *((carrier, eval_program.main, ["{}", "--print_config", *QUICK]) for carrier in SECTIONS),
    *((carrier, train_program.main, ["{}", "--output", "new", *QUICK]) for carrier in SECTIONS),
    *(
        (carrier, train_program.main, ["{}", "--output", "new", "--print_config", *QUICK])
        for carrier in SECTIONS
    ),
    (grid, ablate.main, ["{}", "--output", "grids"]),
    (grid, ablate.main, ["{}", "--output", "grids", "--report"]),
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder, with a module that a payload could import and an image."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = f"import pathlib\npathlib.Path({MARKER!r}).touch()\nclass Payload: pass\n"
    Path("strangers_module.py").write_text(module)
    Path("wandb.py").write_text("")
    Image.new("RGB", (8, 8)).save("photo.png")
    monkeypatch.delitem(sys.modules, "strangers_module", raising=False)
    return tmp_path


@contextlib.contextmanager
def harmless(*, may_write: tuple[str, ...] = ()):
    """Fail if the block starts a process for the payload, uses the network, or writes elsewhere."""
    with recorded() as events:
        yield
    assert not Path(MARKER).exists()
    assert Path("wandb.py").read_text() == ""
    started = [event for event in events if event[0] in PROCESSES and MARKER in event[1]]
    reached = [event for event in events if event[0] in NETWORK and "family=1," not in event[1]]
    imported = [event for event in events if event[0] == "import" and "strangers_module" in event[1]]
    assert not started + reached + imported


def call(monkeypatch, capsys, main, argv):
    """Return the exit status of a program, its output and its errors."""
    monkeypatch.setattr(sys, "argv", ["program", *argv])
    with pytest.raises(SystemExit) as ended:
        command_line.main(main)
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def filled(argv, given):
    return [part for word in argv for part in (given if word == "{}" else [word])]


@pytest.mark.parametrize("payload", ["text of a known option", "url"])
@pytest.mark.parametrize(
    "entry", ENTRIES, ids=lambda e: f"{e[0].__name__}-{e[1].__module__}-{'-'.join(e[2])}"
)
def test_every_entry_point_of_every_carrier(monkeypatch, capsys, entry, payload):
    carrier, main, argv = entry
    given = carrier(PAYLOADS[payload])
    before = sorted(Path().rglob("*"))
    with harmless():
        status, _, error = call(monkeypatch, capsys, main, filled(argv, given))
    is_dropped = payload in ONLY_FETCHES and carrier in WEIGHTS
    if main is report.main:  # it shows what it can read, and says why the images are missing
        assert status == 0
        assert "strange_run" in Path("page.html").read_text()
        return
    assert status in ((0, 2) if "--print_config" in argv else (2,))  # text that stays text can be printed
    if status:
        assert error.count("\n") == 1
        assert "strange" in error or is_dropped, "the file is not named"
        written = [str(path) for path in sorted(Path().rglob("*")) if path not in before]
        assert written in ([], ["grids"], ["strange_run/.lock"])


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("carrier", [*WEIGHTS, *SECTIONS, grid], ids=lambda carrier: carrier.__name__)
def test_every_payload_in_every_carrier(monkeypatch, capsys, carrier, payload):
    given = carrier(PAYLOADS[payload])
    if carrier in WEIGHTS:
        main, argv = predict.main, [*given, "photo.png"]
    elif carrier is grid:
        main, argv = ablate.main, [*given, "--output", "grids"]
    else:
        main, argv = eval_program.main, [*given, "--complexity", *QUICK]
    with harmless():
        status, _, error = call(monkeypatch, capsys, main, argv)
    assert status == 2
    assert error.count("\n") == 1
    if payload not in ONLY_FETCHES or carrier not in WEIGHTS:
        assert "timm_options" in error


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("carrier", [safetensors, checkpoint], ids=lambda carrier: carrier.__name__)
def test_library_functions(carrier, payload):
    (path,) = carrier(PAYLOADS[payload])
    for name in (None, "timm/resnet10t", "vil_tiny"):
        with harmless(), pytest.raises(UserError):
            vil.create_model(name, checkpoint=path)


@pytest.mark.parametrize(
    "text", [json.dumps(COMMAND), "!!python/object/apply:os.system [touch PWNED]", "os.system"]
)
def test_published_configurations(text):
    config = yaml.safe_load((PARITY / "config.yaml").read_text())
    config["MODEL"]["VIT"]["MSVIT"]["ARCH"] = text
    Path("strange.yaml").write_text(yaml.safe_dump(config))
    with harmless(), pytest.raises(UserError):
        vil.load_released("strange.yaml", PARITY / "model_best.pth")


def options(config_class, prefix=()):
    """Yield the path of every option of a configuration."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from options(hints[field.name], (*prefix, field.name))
        else:
            yield (*prefix, field.name)


OPTIONS = [(c, key) for c in (TrainConfig, EvalConfig) for key in options(c)]
TEXTS = [json.dumps(COMMAND), json.dumps(MODULE), "strangers_module.Payload", "!!python/name:os.system"]


@pytest.mark.parametrize(("config_class", "key"), OPTIONS)
def test_text_stays_text_in_every_option(config_class, key):
    """Every option of the schema, from a file and from the command line, is given text that names a class."""
    for text in TEXTS:
        values = [text, {"a": text}, [text], yaml.safe_load(text) if text.startswith("{") else text]
        lines = [(["--config", "strange.yaml"], value) for value in values]
        lines += [([f"--{'.'.join(key)}={text}"], None)]
        for argv, value in lines:
            tree = value
            for name in reversed(key):
                tree = {name: tree}
            Path("strange.yaml").write_text(yaml.safe_dump(tree))
            with harmless(), contextlib.suppress(UserError):
                found = command_line.parse(config_class, argv).config
                for name in key:
                    found = getattr(found, name)
                is_mapping = key[-1] in ("timm_options", "optimizer_options")
                is_plain = found in (text, [text]) or (is_mapping and json.dumps(found))
                assert is_plain, f"{'.'.join(key)} became {found!r}"


NAMES = st.text(max_size=9) | st.just("class_path")
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats()
    | st.sampled_from(TEXTS)
    | st.text(max_size=9)
)
PLAIN = st.deferred(lambda: LEAVES | st.lists(PLAIN, max_size=2) | st.dictionaries(NAMES, PLAIN, max_size=2))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(tree=PLAIN, option=st.sampled_from(["drop_rate", "act_layer", "x", "pretrained", "cache_dir"]))
def test_any_value_of_a_timm_option_is_data_or_refused(tree, option):
    Path("strange.yaml").write_text(
        yaml.safe_dump({"name": "timm/resnet10t", "timm_options": {option: tree}})
    )
    with harmless(), contextlib.suppress(UserError):
        found = command_line.parse(EvalConfig, ["--model", "strange.yaml"]).config.model.timm_options
        assert option in ("drop_rate", "act_layer")
        json.dumps(found)


def test_options_that_a_file_may_set_are_those_of_timms_models():
    """Each is a parameter of a model class of timm; what loads weights is none of them."""
    parameters = set()
    for name in timm.list_models():
        module = sys.modules[timm.model_entrypoint(name).__module__]
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, torch.nn.Module):
                parameters |= inspect.signature(value.__init__).parameters.keys()
    assert parameters >= TIMM_NUMBER_OPTIONS | TIMM_TEXT_OPTIONS
    assert not TIMM_START_OPTIONS & (TIMM_NUMBER_OPTIONS | TIMM_TEXT_OPTIONS)
    assert inspect.signature(timm.create_model).parameters.keys() >= TIMM_START_OPTIONS - {
        "pretrained_strict"
    }


@pytest.mark.parametrize(
    "section",
    [
        {"name": "vil", "stages": [{"dim": 20_000, "heads": 1}]},
        {"name": "vil", "stages": [{"dim": 1_024, "heads": 1, "blocks": 200}]},
        {"name": "vil_base_wide", "num_classes": 900_000},
        {"name": "timm/vit_tiny_patch16_224", "timm_options": {"embed_dim": 20_001, "num_heads": 3}},
        {"name": "timm/vit_small_patch16_224", "image_size": 8_192},
    ],
    ids=lambda section: f"{section}",
)
def test_a_small_file_describes_no_large_model(section):
    """Memory is bounded by the size of the file, not by that of the machine."""
    section = {"image_size": 32, "num_classes": 10, **section}
    save_file({"w": torch.ones(1)}, "strange.safetensors", {"model": json.dumps(section)})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for argv in (["strange.safetensors", "photo.png"], None):
        with pytest.raises(UserError) as refusal:
            predict.main(argv) if argv else vil.create_model(None, checkpoint="strange.safetensors")
        assert "strange.safetensors: describes a model of more than 256 MB" in str(refusal.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000  # kilobytes


def test_a_small_file_describes_no_model_of_many_blocks():
    stages = [{"dim": 64, "heads": 1, "blocks": 100_000}]
    section = {"name": "vil", "stages": stages, "image_size": 32, "num_classes": 10}
    save_file({"w": torch.ones(1)}, "strange.safetensors", {"model": json.dumps(section)})
    with pytest.raises(UserError, match=r"^blocks: a model has at most 2,000 blocks, got 100,000$"):
        predict.main(["strange.safetensors", "photo.png"])


def test_the_command_line_may_load_weights(monkeypatch, capsys):
    torch.save({"w": torch.ones(1)}, "mine.pth")
    argv = [
        "--model.name",
        "timm/resnet10t",
        "--complexity",
        "--model.timm_options",
        "{checkpoint_path: mine.pth}",
    ]
    with harmless():
        status, output, error = call(monkeypatch, capsys, eval_program.main, [*argv, *QUICK])
    assert status == 2
    assert "timm loads weights: checkpoint_path" in output
    assert "timm cannot create resnet10t" in error  # because mine.pth does not fit it: it was opened


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "output: ../elsewhere\n",
            "strange.yaml: output: a file cannot set this option; use --output ",
        ),
        (
            "data: {download: true}\n",
            "strange.yaml: data.download: a file cannot set this option; use --",
        ),
        (
            "loggers: [csv, wandb]\n",
            "strange.yaml: loggers: a file cannot set this option; use --loggers on the command line",
        ),
    ],
)
def test_a_file_cannot_set_outputs_or_start_downloads(monkeypatch, capsys, content, message):
    Path("strange.yaml").write_text(content)
    with harmless():
        status, _, error = call(monkeypatch, capsys, train_program.main, ["--config", "strange.yaml"])
    assert (status, message in error) == (2, True)
    assert not Path("../elsewhere").exists()
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("stored", "used"), [(["mlflow"], []), (["csv", "wandb"], ["csv"]), (["csv"], ["csv"])]
)
def test_a_stored_configuration_starts_no_tracker(stored, used):
    Path("run").mkdir()
    Path("run/config.yaml").write_text(yaml.safe_dump({"loggers": stored}))
    assert resolve_train_command(["--output", "run"]).config.loggers == used
    assert resolve_train_command(["--output", "run", "--loggers", "mlflow"]).config.loggers == ["mlflow"]


@pytest.mark.parametrize("source", ["torch/cifar10", "hfds/stranger/images"])
@pytest.mark.parametrize("program", [eval_program.main, report.main], ids=lambda program: program.__module__)
def test_the_data_section_of_a_checkpoint_downloads_nothing(monkeypatch, capsys, source, program):
    (folder,) = run_folder({})
    path = Path(folder) / checkpoint_files.BEST
    state = run_state({})
    model = vil.create_model("timm/resnet10t", image_size=32, num_classes=10)
    state["model"] = model.state_dict()
    state["config"]["model"]["timm_options"] = None
    state["config"]["data"] = {"source": source, "root": "planted/there", "download": True, "workers": 0}
    torch.save(state, path)
    checkpoint_files.digest_file(path).write_text(f"{checkpoint_files.file_digest(path)}  {path.name}\n")
    argv = (
        ["--checkpoint", folder, *QUICK] if program is eval_program.main else [folder, "--output", "p.html"]
    )
    with harmless():
        status, _, error = call(monkeypatch, capsys, program, argv)
    assert not Path("planted").exists()
    if program is eval_program.main:
        assert status == 2
        assert error == "error: data.root: planted/there: no such file or folder\n"


def test_evaluation_logs_the_images_named_by_a_checkpoint(monkeypatch, capsys):
    (folder,) = run_folder({})
    path = Path(folder) / checkpoint_files.BEST
    state = run_state({})
    state["model"] = vil.create_model("timm/resnet10t", image_size=32, num_classes=10).state_dict()
    state["config"]["model"]["timm_options"] = None
    torch.save(state, path)
    checkpoint_files.digest_file(path).write_text(f"{checkpoint_files.file_digest(path)}  {path.name}\n")
    status, output, _ = call(monkeypatch, capsys, eval_program.main, ["--checkpoint", folder, *QUICK])
    assert status == 0
    assert f"evaluating on digits, the data of {folder}" in output
    argv = ["--checkpoint", folder, "--data.source", "digits", *QUICK]
    status, output, _ = call(monkeypatch, capsys, eval_program.main, argv)
    assert status == 0
    assert "evaluating on" not in output


def test_hugging_face_data_sets_are_read_from_the_cache_without_download(monkeypatch):
    """timm's reader asks the library for the data set; whether that may use the network is a flag there."""
    constants = pytest.importorskip("huggingface_hub.constants")
    asked = []

    def create(*args, **options):
        asked.append(constants.HF_HUB_OFFLINE)
        raise FileNotFoundError("not in the cache")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("data.sources.timm_datasets.create_dataset", create)
    for download in (False, True):
        with pytest.raises(UserError, match="not in the cache"):
            open_source(DataConfig(source="hfds/stranger/images", download=download), "val", 3)
    assert asked == [True, False]
    assert constants.HF_HUB_OFFLINE is False
