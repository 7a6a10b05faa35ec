"""Programs in processes forked from one that has imported PyTorch and timm, which takes seconds.

`python()` returns an executable for use in place of `sys.executable`. It is a small client: it sends its
arguments, environment, working folder and standard streams to a server, which forks a process that runs the
program with them and ends as any program of Python. The client forwards signals, ends with the same status,
and if it is killed, so is the program. Variables that are read when PyTorch is imported have no effect.
"""

import array
import atexit
import contextlib
import ctypes
import functools
import gc
import io
import json
import os
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).parents[2]
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


@functools.cache
def python() -> str:
    """Start the server of this process; return the path of the client, or Python's own except on Linux."""
    if not hasattr(os, "pidfd_open"):
        return sys.executable
    # No TemporaryDirectory: Python 3.13 drops the functions of atexit, and with them an object to which they
    # alone refer, in each process that multiprocessing forks.
    folder = tempfile.mkdtemp(prefix="forked_")
    client, address = Path(folder, "python"), Path(folder, "socket")
    line = [sys.executable, "-S", "-E", __file__, "client", str(address)]
    client.write_text(f'#!/bin/sh\nexec {shlex.join(line)} "$@"\n')
    client.chmod(0o700)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "FORKED_SPACE": "x" * 4096}
    server = subprocess.Popen(
        [sys.executable, __file__, "server", str(address)], cwd=ROOT, env=environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert server.stdout.readline() == b"ready\n"
    server.stdout.close()

    def stop() -> None:
        server.stdin.close()
        server.wait()
        shutil.rmtree(folder)

    atexit.register(stop)
    return str(client)


def run_client(address: str, argv: list[str]) -> None:
    """Request a program, and end as it does."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    connection.connect(address)
    request = json.dumps({"argv": argv, "cwd": os.getcwd(), "environment": dict(os.environ)}).encode()
    streams = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
    connection.sendmsg([len(request).to_bytes(4, "big")], streams)
    connection.sendall(request)

    def forward() -> None:
        while True:
            connection.sendall(bytes([signal.sigwait(FORWARDED)]))

    threading.Thread(target=forward, daemon=True).start()
    status = int.from_bytes(connection.recv(2), "big", signed=True)
    if status < 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        signal.signal(-status, signal.SIG_DFL) if status != -signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    os._exit(status)


def serve(address: str) -> list[str]:
    """Fork a process for each request, in which this function returns the arguments of its program."""
    import tensorboard.compat.proto
    import torch.distributed.run
    import torch.utils.tensorboard

    import eval
    import train
    from vil.evaluation import cost

    assert all((eval, train, torch, tensorboard))
    cost.SPEED_SECONDS = 0.05  # as in conftest.py
    gc.freeze()
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(address)
    server.listen(64)
    os.write(1, b"ready\n")
    while True:
        ready, _, _ = select.select([server, sys.stdin], [], [])
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if sys.stdin in ready:
            break
        connection, _ = server.accept()
        if os.fork():
            connection.close()
            continue
        server.close()
        argv = follow(connection)
        if argv is not None:
            return argv
        os._exit(0)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    os._exit(0)


def follow(connection: socket.socket) -> list[str] | None:
    """Fork the process of a program, where this returns its arguments; return None when it has ended."""
    head, control, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(3 * 4))
    streams = array.array("i", control[0][2])
    length, content = int.from_bytes(head, "big"), b""
    while len(content) < length:
        content += connection.recv(length - len(content))
    pid = os.fork()
    if not pid:
        connection.close()
        prepare(json.loads(content), streams)
        return json.loads(content)["argv"]
    for descriptor in (0, 1, *streams):
        os.close(descriptor)
    process = os.pidfd_open(pid)
    while True:
        ready, _, _ = select.select([process, connection], [], [])
        if process in ready:
            break
        try:
            signals = connection.recv(16)
        except ConnectionError:
            signals = b""
        for number in signals or [signal.SIGKILL]:
            os.kill(pid, number)
        if not signals:
            break
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(status.to_bytes(2, "big", signed=True))
    return None


def prepare(request: dict, streams: array.array) -> None:
    """Make this process that of a new program."""
    os.setsid()
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False))
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        binary = io.BufferedWriter(io.FileIO(descriptor, "w", closefd=False))
        errors = "backslashreplace" if name == "stderr" else "strict"
        setattr(sys, name, io.TextIOWrapper(binary, errors=errors, line_buffering=name == "stderr"))
        setattr(sys, f"__{name}__", getattr(sys, name))
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    show_environment(request["environment"])
    for number in FORWARDED:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [
        *paths,
        *(path for path in sys.path if path not in (str(Path(__file__).parent), str(ROOT))),
    ]


def show_environment(environment: dict[str, str]) -> None:
    """Write the environment where Linux reads it for /proc; nothing else uses the old one any more."""
    start, end = map(int, Path("/proc/self/stat").read_text().rpartition(") ")[2].split()[47:49])
    content = b"".join(os.fsencode(f"{name}={value}\0") for name, value in environment.items())
    ctypes.memmove(start, content.ljust(end - start, b"\0")[: end - start], end - start)


def execute(argv: list[str]) -> None:
    """Run `script.py …`, `-m module …` or `-c code …` as Python does."""
    while argv[0].startswith("-") and argv[0] not in ("-m", "-c"):
        argv = argv[1:]  # -u
    if argv[0] in ("-m", "-c"):
        sys.path.insert(0, os.getcwd() if argv[0] == "-m" else "")
        sys.argv = argv[argv[0] == "-m" :]
        if argv[0] == "-m":
            sys.modules.pop(argv[1], None)
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = ["-c", *argv[2:]]
            exec(compile(argv[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = argv
        sys.path.insert(0, str(Path(argv[0]).resolve().parent))
        runpy.run_path(argv[0], run_name="__main__")


def execute_and_exit(argv: list[str]) -> None:
    """Run a program and end as the interpreter does, without its slow deletion of all modules."""
    status = 0
    try:
        execute(argv)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if status and status is not ended.code:
            print(ended.code, file=sys.stderr)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        status = 120
    os._exit(status & 0xFF)


if __name__ == "__main__":
    if sys.argv[1] == "client":
        run_client(sys.argv[2], sys.argv[3:])
    else:
        sys.path.insert(0, str(ROOT))
        execute_and_exit(serve(sys.argv[2]))
