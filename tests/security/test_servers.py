"""No program starts a server that other machines can reach."""

import os
import subprocess
import time
from pathlib import Path

import pytest
from helpers import forked

ROOT = Path(__file__).parents[2]
LOOPBACK = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")


def processes_below(pid: int) -> list[int]:
    """Return a process and its descendants."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += processes_below(int(child))
    return found


def listening(pid: int) -> set[str]:
    """Return the addresses, as in /proc/net/tcp, on which a process or its descendants listen."""
    inodes = set()
    for one in processes_below(pid):
        try:
            names = [os.readlink(path) for path in Path(f"/proc/{one}/fd").iterdir()]
        except OSError:
            continue
        inodes |= {name[8:-1] for name in names if name.startswith("socket:[")}
    found = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            is_server = fields[3] == ("0A" if table.startswith("tcp") else "07")
            if is_server and fields[9] in inodes:
                found.add(fields[1].partition(":")[0])
    return found


NAME_PROCESS = """
import os, runpy, sys
print(os.getpid(), flush=True)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def addresses(*argv: str) -> set[str]:
    """Return the addresses on which a program or its descendants listen while it runs."""
    found = set()
    command = [forked.python(), "-c", NAME_PROCESS, *argv]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        pid = int(process.stdout.readline())
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            try:
                found |= listening(pid)
            except OSError:  # it has exited
                continue
            time.sleep(0.02)
        process.kill()
        assert process.wait() == 0, process.stderr.read().decode()
    return found


TRAIN = [
    "train.py",
    "--device",
    "cpu",
    "--schedule.epochs",
    "1",
    "--schedule.max_steps",
    "2",
    "--data.workers",
    "1",
]


def test_the_test_sees_a_server(tmp_path: Path):
    code = "import socket, time; s = socket.create_server(('0.0.0.0', 0)); time.sleep(1)"
    (tmp_path / "server.py").write_text(code)
    assert addresses(str(tmp_path / "server.py")) == {"00000000"}


def test_a_training_and_an_evaluation_of_one_process(tmp_path: Path):
    run = str(tmp_path / "run")
    assert addresses(*TRAIN, "--output", run) <= set(LOOPBACK)
    assert addresses("eval.py", "--checkpoint", run, "--device", "cpu") <= set(LOOPBACK)


@pytest.mark.parametrize("text", ["Use trusted networks only", "listens on all interfaces"])
def test_the_store_of_torchrun_is_documented(text: str):
    page = " ".join((ROOT / "docs" / "training.md").read_text().split())
    assert text in page
