import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, signal, sys, time
from vil.runtime.orphans import terminate_with_agent

if sys.argv[1] == "torchrun":
    os.environ["TORCHELASTIC_RUN_ID"] = "x"
agent = os.fork()
if agent == 0:
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), os._exit(0)))
        with terminate_with_agent(3):
            print("ready", os.getppid(), flush=True)
            time.sleep(float(sys.argv[2]))
        print("finished", flush=True)
        os._exit(0)
    time.sleep(60)
    os._exit(0)
time.sleep(1)
os.kill(agent, signal.SIGKILL)
os.waitpid(agent, 0)
"""


@pytest.mark.parametrize(
    ("launcher", "seconds", "end"), [("torchrun", 30, "saved"), ("nohup", 2, "finished")]
)
def test_a_rank_ends_with_torchrun_and_another_process_goes_on_without_its_parent(
    launcher: str, seconds: int, end: str
):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, launcher, str(seconds)],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    ready, last = done.stdout.splitlines()
    assert last == end
    agent = ready.split()[1]
    line = f"[rank 3] torchrun (process {agent}) has exited: sending SIGTERM to this rank\n"
    assert done.stderr == (line if launcher == "torchrun" else "")
