import subprocess
import sys

import pytest

from vil import console


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
