"""Record the audit events of a block of code: processes, network, imports."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

PROCESSES = {
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "pty.spawn",
}
NETWORK = {
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "urllib.Request",
    "http.client.connect",
}

_active: list[list[tuple[str, str]]] = []


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if not _active:
        return
    if event in PROCESSES or event in NETWORK or event == "import":
        _active[-1].append((event, repr(arguments)))


sys.addaudithook(_hook)  # for the life of the process: a hook cannot be removed


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[str, str]]]:
    """Yield a list of (event, arguments) that grows while the block runs."""
    events: list[tuple[str, str]] = []
    _active.append(events)
    try:
        yield events
    finally:
        _active.remove(events)
