import errno
import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from helpers import forked
from tqdm import tqdm

from vil.command_line import run_program
from vil.runtime import console
from vil.runtime.console import print_line

ROOT = Path(__file__).parents[2]


def test_a_line_is_printable_and_one(capsys: pytest.CaptureFixture[str]):
    print_line("a\\x1bb\nc")
    print_line("error", sys.stderr)
    assert capsys.readouterr() == ("a\\x1bb c\n", "error\n")


def test_columns_are_aligned_by_the_width_of_characters_on_a_terminal():
    rows = [("cafe\u0301", "1"), ("猫 ねこ", "22"), ("b", "333")]
    lines = console.align(rows)
    assert lines == ["cafe\u0301       1", "猫 ねこ   22", "b        333"]
    assert {console.text_width(line) for line in lines} == {12}


def test_the_width_is_that_of_a_terminal_or_of_columns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "72")
    assert console.width() == 72
    monkeypatch.delenv("COLUMNS")
    assert console.width() is None
    for stream, expected in ((None, None), (closed := io.StringIO(), None), (Terminal(), 33)):
        closed.close()
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((33, 9)))
        assert console.width() == expected


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_programs_for_maintainers_print_to_a_closed_pipe_without_a_traceback():
    """As `| head -1`; the built-in print would raise BrokenPipeError."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "tools.dev.scaling_tables"]
    with open(writer, "w") as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, b"")
    for path in (ROOT / "tools" / "dev").rglob("*.py"):
        assert not re.search(r"(?<![\w.])print\(", path.read_text()), path


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_line_that_cannot_be_written_is_discarded(unbuffered: str):
    """Multiprocessing flushes standard output before it forks, and would raise."""
    program = "import sys\nfrom vil.runtime.console import print_line\nprint_line('lost')\nsys.stdout.flush()"
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, stdout=full, stderr=subprocess.PIPE, cwd=ROOT
        )
    assert (done.returncode, done.stderr) == (0, b"")


PROGRAM = """
import atexit, sys
import torch.distributed as dist
from vil.command_line import main
from vil.errors import UserError

def program(argv):
    atexit.register(print, "waits for the others")
    print("started")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if argv[0] == "destroyed":
        dist.destroy_process_group()
    if argv[1] == "user":
        raise UserError("key", "is wrong")
    if argv[1] == "exit":
        raise SystemExit(5)
    raise KeyError("a bug")

main(program)
"""


@pytest.mark.parametrize(
    ("group", "error", "status", "message"),
    [
        ("open", "user", 2, "error: key: is wrong"),
        ("open", "exit", 5, ""),
        ("open", "bug", 1, "KeyError: 'a bug'"),
        ("destroyed", "user", 2, "error: key: is wrong"),
    ],
)
def test_a_process_with_an_open_group_exits_at_once(group: str, error: str, status: int, message: str):
    """Python would destroy the group on exit, and NCCL then waits for all ranks."""
    command = [forked.python(), "-c", PROGRAM, group, error]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == status
    assert message in done.stderr
    assert ("waits" in done.stdout) == (group == "destroyed")
    assert "started" in done.stdout


def test_characters_that_a_stream_cannot_encode_are_replaced():
    """For example in a container without a locale, where standard output is ASCII."""
    program = (
        "import sys\nfrom vil.runtime.console import print_line\nfrom vil.command_line import main\n"
        "def run(argv):\n"
        "    for stream in (sys.stdout, sys.stderr):\n"
        "        print_line('Top-1 97 % \\u00b7 EMA', stream)\n"
        "        print('na\\u00efve', file=stream)\n"
        "main(run)\n"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, cwd=ROOT)
    assert done.returncode == 0
    assert done.stdout == done.stderr == b"Top-1 97 % ? EMA\nna?ve\n"


def test_yaml_is_read_as_utf8_in_any_locale(tmp_path: Path):
    path = tmp_path / "data.yaml"
    path.write_bytes("# naïve\ntrain_split: été\n".encode())
    command = [sys.executable, "train.py", "--data", str(path), "--print_config=skip_default"]
    environment = {**os.environ, "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, env=environment, capture_output=True, cwd=ROOT, check=True)
    assert "train_split: été" in done.stdout.decode()


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)], ids=str)
def test_closed_streams_are_replaced(tmp_path: Path, closed: tuple[int, ...]):
    """`train.py >&-`: otherwise the next file has the number of standard output, and printing fails."""
    program = f"""
import os, sys
from vil.command_line import main

def program(argv):
    path = {str(tmp_path / "file")!r}
    with open(path, "wb") as file:
        assert file.fileno() > 2
        print("text", flush=True)
        os.write(2, b"of a library")
        file.write(b"content")

main(program)
"""
    done = subprocess.run(
        [sys.executable, "-c", f"import os\nfor n in {closed}: os.close(n)\nos.execv({sys.executable!r}, "
         f"[{sys.executable!r}, '-c', {program!r}])"],
        cwd=ROOT, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == (b"" if 1 in closed else b"text\n")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_too_many_open_files_are_one_line(capsys: pytest.CaptureFixture[str]):
    def fail() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with pytest.raises(SystemExit) as ended:
        run_program(fail)
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert error == "error: Too many open files; raise the limit (ulimit -n), or use fewer worker processes\n"


def progress(interval: float, monkeypatch: pytest.MonkeyPatch, items: Iterable[int], **options: Any) -> None:
    monkeypatch.setattr(console, "PROGRESS_INTERVAL_S", interval)
    for _ in console.progress_bar(items, unit="batch", **options):
        time.sleep(0.01)


def test_progress_without_a_terminal_is_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    progress(0.025, monkeypatch, range(12), desc="evaluate")
    progress(0.025, monkeypatch, iter(range(12)), desc="indexing")
    lines = capsys.readouterr().err.split("\n")
    assert lines.pop() == ""
    sized = [
        line
        for line in lines
        if re.fullmatch(r"evaluate: \d+ %, \d+/12 \[\d+:\d+<.+(batch/s|s/batch)\]", line)
    ]
    unsized = [
        line for line in lines if re.fullmatch(r"indexing: \d+ \[\d+:\d+, .+(batch/s|s/batch)\]", line)
    ]
    assert [*sized, *unsized] == lines
    assert sized
    assert unsized


def test_a_line_of_progress_is_not_repeated_when_iterations_become_slower(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """As tqdm's monitor thread does for a bar that looks at the clock after several iterations only."""
    monkeypatch.setattr(console, "PROGRESS_INTERVAL_S", 0.05)
    monkeypatch.setattr(tqdm, "monitor_interval", 0.02)
    monkeypatch.setattr(tqdm, "monitor", None)
    for item in console.progress_bar(range(100), desc="evaluate"):
        time.sleep(0.001 if item < 80 else 0.05)
    tqdm.monitor.exit()
    counts = re.findall(r"(\d+)/100", capsys.readouterr().err)
    assert len(counts) > 2
    assert len(set(counts)) == len(counts)


def test_short_or_hidden_progress_prints_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    progress(60.0, monkeypatch, range(3), desc="evaluate")
    progress(0.0, monkeypatch, range(3), desc="evaluate", is_hidden=True)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("is_closed_later", [False, True])
def test_progress_without_standard_error_is_hidden(is_closed_later: bool, monkeypatch: pytest.MonkeyPatch):
    """As of a process that was started by 2>&-."""
    stream = io.StringIO() if is_closed_later else None
    if stream is not None:
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(console, "PROGRESS_INTERVAL_S", 0.0)
    assert list(console.progress_bar(range(3), desc="evaluate")) == [0, 1, 2]
    with console.progress_bar(desc="indexing", delay=2) as bar:
        bar.update()


def test_progress_at_a_terminal_is_a_bar_that_disappears(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    for _ in console.progress_bar(range(3), desc="evaluate"):
        pass
    written = sys.stderr.getvalue()
    assert "evaluate:   0%|" in written
    assert written.endswith("\r")
    assert "\n" not in written
