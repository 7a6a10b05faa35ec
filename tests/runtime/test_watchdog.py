import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vil.runtime.watchdog import Watchdog

ROOT = Path(__file__).parents[2]


def test_a_hang_is_reported_once_with_rank_activity_and_line(capsys: pytest.CaptureFixture[str]):
    watchdog = Watchdog(3, 0.2, 60, stop_signal=lambda: 0)
    with watchdog.running():
        watchdog.report_progress("computing step 7")
        time.sleep(0.8)
        watchdog.report_progress("computing step 8")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "[rank 3] no progress for 0 s while computing step 7, at tests/runtime/test_watchdog.py:"
    )
    assert line.endswith(" in test_a_hang_is_reported_once_with_rank_activity_and_line")
    assert all(thread.name != "watchdog" for thread in threading.enumerate())


PROGRAM = """
import ctypes, os, signal, sys, threading, time
from vil.runtime.signals import SignalHandler
from vil.runtime.watchdog import Watchdog

def hang_in_c_code(signals):
    def send():
        for signum in signals:
            time.sleep(0.2)
            os.kill(os.getpid(), signum)
    handler = SignalHandler()
    with handler.installed(), Watchdog(1, 60, 1, stop_signal=handler.pending_stop).running() as watchdog:
        watchdog.report_progress("computing step 5")
        threading.Thread(target=send, daemon=True).start()
        mutex, libc = ctypes.create_string_buffer(128), ctypes.CDLL(None)
        for _ in range(2):
            libc.pthread_mutex_lock(mutex)  # the second one waits forever

def sleep(signals):
    with SignalHandler().installed():
        for signum in signals:
            os.kill(os.getpid(), signum)
        time.sleep(60)

for function, signals in (
    (hang_in_c_code, [signal.SIGTERM]),
    (hang_in_c_code, [signal.SIGINT, signal.SIGINT]),
    (sleep, [signal.SIGINT, signal.SIGINT]),
):
    child = os.fork()
    if child == 0:
        function(signals)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_process_that_does_not_respond_to_signals_is_ended():
    """Python runs no signal handler while the main thread is in C code."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stderr.splitlines() == [
        "[rank 1] no response to SIGTERM for 1 s (computing step 5): exiting without saving",
        "second SIGINT: exiting without saving",
        "second SIGINT: exiting without saving",
    ]
    assert done.stdout.split() == ["143", "130", "130"]


EXITING = """
import os, time
from vil.runtime import watchdog
from vil.runtime.watchdog import Watchdog

watchdog._FILE_SYSTEM_TIMEOUT_S = 0.2

def hang():
    time.sleep(60)

for last_checkpoint in (lambda: "the last checkpoint is step_4.pt", hang):
    child = os.fork()
    if child == 0:
        watched = Watchdog(1, 0.3, 60, True, stop_signal=lambda: 0, last_checkpoint=last_checkpoint)
        with watched.running():
            watched.report_progress("computing step 5")
            hang()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_hang_ends_the_process_and_names_the_last_checkpoint():
    """Even if the file system does not respond."""
    done = subprocess.run(
        [sys.executable, "-c", EXITING], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    start = "[rank 1] no progress for 0 s while computing step 5: exiting;"
    assert done.stderr.splitlines() == [
        f"{start} the last checkpoint is step_4.pt",
        f"{start} its folder does not respond",
    ]
    assert done.stdout.split() == ["1", "1"]
