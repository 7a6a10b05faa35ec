"""The package vil and the start of the programs: imports and the parsing of arguments."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

import vil
from vil.command_line import resolve_train_command

ROOT = Path(__file__).parents[1]


def python(code):
    """Run a program in a new interpreter; return its standard output."""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_package_imports_neither_pytorch_nor_timm():
    assert python("import sys, vil; print({'torch', 'timm'} & set(sys.modules))") == "set()\n"


@pytest.mark.parametrize(
    "imports", ["import timm, vil", "import vil, timm", "import vil.models.stage, timm", "import data, timm"]
)
def test_models_are_registered_with_timm_in_any_order_of_imports(imports):
    assert python(f"{imports}; print(timm.is_model('vil_tiny'))") == "True\n"


def test_public_names_exist():
    assert sorted(vil.__all__) == ["MultiScaleViT", "create_model", "list_models", "load", "load_released"]
    for name in vil.__all__:
        assert callable(getattr(vil, name))
        assert name in dir(vil)
    with pytest.raises(AttributeError, match="module 'vil' has no attribute 'nothing'"):
        _ = vil.nothing


@pytest.mark.parametrize("program", ["train.py", "eval.py"])
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["--modell", "x"], ["--print_config"]])
def test_programs_parse_before_they_import_pytorch(program, arguments):
    if (program, arguments) == ("eval.py", ["--print_config"]):
        arguments = ["--model.name", "vil_tiny", "--print_config"]
    imported = python(
        "import runpy, sys\n"
        f"sys.argv = [{program!r}, *{arguments!r}]\n"
        "try:\n"
        f"    runpy.run_path({program!r}, run_name='__main__')\n"
        "except SystemExit as ended:\n"
        "    print()\n"
        "    print(ended.code, 'torch' in sys.modules)\n"
    ).splitlines()[-1]
    assert imported == f"{2 if '--modell' in arguments else 0} False"


def test_the_version_has_one_source():
    for program in ("train.py", "eval.py"):
        result = subprocess.run(
            [sys.executable, program, "--version"], cwd=ROOT, capture_output=True, text=True
        )
        assert result.stdout == f"vil {vil.__version__}\n"
    assert 'attr = "vil.__version__"' in (ROOT / "pyproject.toml").read_text()
    assert f"version: {vil.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_arguments_are_parsed_once(monkeypatch, tmp_path):
    parsers, parses = [], []
    build, parse = argparse.ArgumentParser.__init__, argparse.ArgumentParser.parse_known_args

    def counted_build(parser, *args, **kwargs):
        parsers.append(parser)
        build(parser, *args, **kwargs)

    def counted_parse(parser, *args, **kwargs):
        parses.append(parser)
        return parse(parser, *args, **kwargs)

    monkeypatch.setattr(argparse.ArgumentParser, "__init__", counted_build)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", counted_parse)
    resolve_train_command(["--schedule.epochs", "1", "--output", str(tmp_path)])
    assert (len(parsers), len(parses)) == (1, 1)
