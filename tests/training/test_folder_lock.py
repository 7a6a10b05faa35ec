import os
import subprocess
import sys
from pathlib import Path

import pytest

from vil.config import ConfigError
from vil.training import folder_lock
from vil.training.folder_lock import FolderLock

HOLDER = (
    "import sys, time\n"
    "from pathlib import Path\n"
    "from vil.training.folder_lock import FolderLock\n"
    "sys.argv[0] = 'train.py'\n"
    "FolderLock(Path(sys.argv[1])).acquire()\n"
    "print('held', flush=True)\n"
    "time.sleep(60)\n"
)


@pytest.fixture
def holder(tmp_path: Path):
    """Another process, which holds the folder `run`."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    words = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_told_who_holds_the_folder(tmp_path: Path, holder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(folder_lock, "PATIENCE", 0.3)
    lock = FolderLock(tmp_path / "run")
    with pytest.raises(ConfigError) as caught:
        lock.acquire()
    assert caught.value.key == "output"
    assert (
        f"run is in use: train.py, process {holder.pid} on {os.uname().nodename} since 2"
        in caught.value.reason
    )
    lock.release(remove=True)  # of what another process holds, nothing goes
    assert (tmp_path / "run" / folder_lock.NAME).exists()


def test_a_killed_process_holds_nothing(tmp_path: Path, holder):
    holder.kill()
    lock = FolderLock(tmp_path / "run")
    lock.acquire()  # waits as long as it takes the system
    lock.release(remove=False)
