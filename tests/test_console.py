import os
import subprocess
import sys
from pathlib import Path

import pytest

from vil import console

ROOT = Path(__file__).parents[1]


def test_a_line_is_printable_and_one(capsys):
    console.say("a\\x1bb\nc")
    console.say("to the other", sys.stderr)
    assert capsys.readouterr() == ("a\\x1bb c\n", "to the other\n")


PROGRAM = """
import atexit, os, sys, tempfile
import torch.distributed as dist
from vil.command_line import main
from vil.config import ConfigError

def program(words):
    atexit.register(print, "waits for the others")
    print("begun")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if words[0] == "over":
        dist.destroy_process_group()
    if words[1] == "config":
        raise ConfigError("key", "is wrong")
    if words[1] == "exit":
        raise SystemExit(5)
    raise KeyError("a bug")

main(program)
"""


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [("config", 2, "error: key: is wrong"), ("exit", 5, ""), ("bug", 1, "KeyError: 'a bug'")],
)
@pytest.mark.parametrize("group", ["left", "over"])
def test_a_process_group_that_is_left_is_not_waited_for(group, error, status, said):
    """NCCL's waits for all ranks when it is destroyed, which Python does at its end."""
    words = [sys.executable, "-c", PROGRAM, group, error]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert ended.returncode == status
    assert said in ended.stderr
    assert ("waits" in ended.stdout) == (group == "over")
    assert "begun" in ended.stdout


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_streams_that_cannot_encode_a_line_show_the_rest_of_it(stream):
    """As in a container without a locale, where standard output is ASCII."""
    program = (
        "import sys\nfrom vil import console\nfrom vil.command_line import main\n"
        f"def run(argv):\n    console.say('Top-1 97 % \\u00b7 EMA', sys.{stream})\n"
        f"    print('na\\u00efve', file=sys.{stream})\n"
        "main(run)\n"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, cwd=ROOT)
    assert done.returncode == 0
    assert getattr(done, stream) == b"Top-1 97 % ? EMA\nna?ve\n"


def test_yaml_is_read_as_utf8_in_any_locale(tmp_path):
    path = tmp_path / "data.yaml"
    path.write_bytes("# naïve\ntrain_split: été\n".encode())
    words = [sys.executable, "train.py", "--data", str(path), "--print_config=skip_default"]
    environment = {**os.environ, "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(words, env=environment, capture_output=True, cwd=ROOT, check=True)
    assert "train_split: été" in done.stdout.decode()
