"""Peak memory of a function in a separate process."""

import multiprocessing
import resource
import sys
from collections.abc import Callable
from typing import Any

_CONTEXT = multiprocessing.get_context("fork")


def _run(function: Callable[..., Any], arguments: tuple[Any, ...], pipe: Any, room: int) -> None:
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    # Beyond this the machine is not in danger, and the test has failed.
    resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = _peak()
    try:
        outcome = f"returned {function(*arguments)!r}"[:300]
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    pipe.send((outcome, _peak() - before))
    sys.stdout.flush()


def _peak() -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def measured(function: Callable[..., Any], *arguments: Any, seconds: float = 120.0) -> tuple[str, int]:
    """Call a function in a fork, with 6 GB of address space beyond what it has.

    Returns:
        what it returned or raised, as text, and by how many bytes the peak of its memory grew.
    """
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_run, args=(function, arguments, sender, 6 << 30), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            return f"TimeoutError: nothing after {seconds:g} s", 0
        return receiver.recv()
    except EOFError:
        return "the process died", 0
    finally:
        process.kill()
        process.join()
