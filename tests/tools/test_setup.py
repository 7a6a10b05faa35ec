"""tools/setup.sh waits for another one in the same folder; here without a Python that it could use."""

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "setup.sh"
NO_PYTHON = "setup: Python 3.10 or newer is missing"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a folder with the script, and with the programs of its first lines in `bin`."""
    for name in ("tools", "bin"):
        (tmp_path / name).mkdir()
    shutil.copy(SCRIPT, tmp_path / "tools" / "setup.sh")
    for name in ("bash", "dirname", "flock", "grep"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or pytest.skip(f"{name} is missing"))
    return tmp_path


def start(checkout: Path) -> subprocess.Popen[str]:
    environment = {"PATH": str(checkout / "bin"), "PYTHON": "missing"}
    argv = [checkout / "bin" / "bash", checkout / "tools" / "setup.sh"]
    return subprocess.Popen(argv, env=environment, stderr=subprocess.PIPE, text=True)


def replace_flock(checkout: Path, script: str) -> None:
    path = checkout / "bin" / "flock"
    path.unlink()
    path.write_text(f"#!{checkout / 'bin' / 'bash'}\n{script}\n")
    path.chmod(0o755)


def test_it_says_that_it_waits_for_another_one(checkout: Path):
    with open(checkout / "tools" / "setup.sh", "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = start(checkout)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
    first, second = process.communicate(timeout=20)[1].splitlines()
    assert first == "setup: waiting for another tools/setup.sh in this folder"
    assert second.startswith(NO_PYTHON)


def test_nfs_locks_files_that_are_open_for_writing(checkout: Path):
    record = checkout / "flags"
    replace_flock(checkout, f"grep flags /proc/self/fdinfo/9 >{record}")
    assert start(checkout).communicate(timeout=20)[1].startswith(NO_PYTHON)
    assert int(record.read_text().split()[1], 8) & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR)


@pytest.mark.parametrize("status", [65, 127], ids=["no locks", "no flock"])
def test_without_locks_it_does_not_wait(checkout: Path, status: int):
    replace_flock(checkout, f"exit {status}")
    assert start(checkout).communicate(timeout=20)[1].startswith(NO_PYTHON)
