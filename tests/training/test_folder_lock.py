import os
import subprocess
from pathlib import Path

import pytest
from helpers import forked

from vil.checkpoints import run_folder
from vil.checkpoints.run_folder import FolderLock
from vil.errors import UserError

HOLDER = (
    "import os, sys, time\n"
    "from pathlib import Path\n"
    "from vil.checkpoints.run_folder import FolderLock\n"
    "sys.argv[0] = 'train.py'\n"
    "FolderLock(Path(sys.argv[1])).acquire()\n"
    "print('held', os.getpid(), flush=True)\n"
    "time.sleep(60)\n"
)


@pytest.fixture
def holder(tmp_path: Path):
    """Start another process that holds the lock of the folder `run`."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    argv = [forked.python(), "-c", HOLDER, str(tmp_path / "run")]
    process = subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True)
    word, process.holder = process.stdout.readline().split()
    assert word == "held"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_with_the_holder_of_the_lock(
    tmp_path: Path, holder, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(run_folder, "LOCK_TIMEOUT_S", 0.3)
    lock = FolderLock(tmp_path / "run")
    with pytest.raises(UserError) as caught:
        lock.acquire()
    assert caught.value.location == "output"
    assert (
        f"run is in use: train.py, process {holder.holder} on {os.uname().nodename} since 2"
        in caught.value.reason
    )
    lock.release(remove=True)  # of what another process holds, nothing goes
    assert (tmp_path / "run" / run_folder.LOCK).exists()


def test_a_killed_process_releases_the_lock(tmp_path: Path, holder):
    holder.kill()
    lock = FolderLock(tmp_path / "run")
    lock.acquire()  # waits as long as it takes the system
    lock.release(remove=False)


def test_a_lock_whose_file_system_is_gone_is_released(tmp_path: Path):
    lock = FolderLock(tmp_path / "run")
    lock.acquire()
    os.close(lock._descriptor)  # as the network file system, whose next close fails
    lock.release(remove=True)
    assert not (tmp_path / "run").exists()
