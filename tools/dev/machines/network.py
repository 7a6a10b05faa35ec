"""Two machines: namespaces of one Linux system with their own network, host name, processes and mounts.

A namespace ends with its first process, which the kernel kills together with this program: nothing is left
behind, whatever happens.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from vil.errors import UserError

NAMES = ("machine-a", "machine-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
_TOOLS = ("ip", "unshare", "nsenter", "setpriv", "mount", "hostname")


class Machine:
    """A namespace with the `pid` of its first process; `interface` is its end of the veth pair."""

    def __init__(self, name: str, address: str, interface: str, pid: int) -> None:
        self.name, self.address, self.interface, self.pid = name, address, interface, pid

    def start(
        self, argv: Sequence[str], log: Path, cwd: Path, environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start a program on this machine, with both output streams in the file `log`."""
        enter = ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount", "--pid", f"--wd={cwd}"]
        with log.open("ab") as file:
            return subprocess.Popen(  # noqa: S603 (the project's own programs)
                [*enter, *argv], stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment
            )

    def run(self, *argv: str) -> None:
        """Run a command on this machine. Raises CalledProcessError if it fails."""
        enter = ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount"]
        subprocess.run([*enter, *argv], check=True, capture_output=True)  # noqa: S603

    def processes(self, word: str) -> list[psutil.Process]:
        """Return the processes on this machine whose command line has `word`, in the order of their start."""
        namespace = os.readlink(f"/proc/{self.pid}/ns/net")
        found = []
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):  # it has ended
                if os.readlink(f"/proc/{process.pid}/ns/net") == namespace and word in process.cmdline():
                    found.append(process)
        return [process for process in found if process.name() != "nsenter"]

    def cut_network(self) -> None:
        """Take down this machine's network interface."""
        self.run("ip", "link", "set", self.interface, "down")


@contextmanager
def two_machines(
    folder: Path, hosts: Mapping[str, str], mounts: Mapping[Path, Path]
) -> Iterator[tuple[Machine, Machine]]:
    """Create two machines that a veth pair connects; remove them at the end.

    Args:
        folder: for the files of the set-up.
        hosts: machine → further lines of its /etc/hosts, before those of both machines.
        mounts: path → file or folder that the second machine sees there instead.

    Raises:
        UserError: this system does not allow it.
    """
    if missing := [name for name in _TOOLS if shutil.which(name) is None]:
        raise UserError("", f"two machines need the programs {', '.join(missing)}")
    interfaces = [f"vil{os.getpid() % 1_000_000}{end}" for end in "ab"]
    try:
        with ExitStack() as stack:
            pids = [stack.enter_context(_namespace()) for _ in NAMES]
            machines = [Machine(*item) for item in zip(NAMES, ADDRESSES, interfaces, pids)]
            _run("ip", "link", "add", interfaces[0], "type", "veth", "peer", "name", interfaces[1])
            for machine in machines:
                _run("ip", "link", "set", machine.interface, "netns", str(machine.pid))
            for machine in machines:
                _set_up(machine, folder, hosts.get(machine.name, ""))
            for path, source in mounts.items():
                machines[1].run("mount", "--bind", str(source), str(path))
            yield machines[0], machines[1]
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or b"").decode(errors="replace").strip().splitlines()[-1:] or [str(error)]
        raise UserError(
            "", f"two machines need network namespaces (as root, on Linux): {reason[0]}"
        ) from None


def _set_up(machine: Machine, folder: Path, lines: str) -> None:
    hosts = folder / f"hosts_{machine.name}"
    both = "".join(f"{address} {name}\n" for name, address in zip(NAMES, ADDRESSES))
    hosts.write_text(f"127.0.0.1 localhost\n{lines}{both}", encoding="utf-8")
    machine.run("hostname", machine.name)
    machine.run("mount", "--bind", str(hosts), "/etc/hosts")
    machine.run("ip", "address", "add", f"{machine.address}/24", "dev", machine.interface)
    for interface in ("lo", machine.interface):
        machine.run("ip", "link", "set", interface, "up")


@contextmanager
def _namespace() -> Iterator[int]:
    """Create a namespace; yield the id of its first process."""
    kinds = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    program = ["sh", "-c", "echo ready; exec sleep infinity"]
    process = subprocess.Popen(  # noqa: S603
        ["setpriv", "--pdeathsig", "KILL", "unshare", *kinds, *program],  # noqa: S607
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise subprocess.CalledProcessError(process.wait(), "unshare", stderr=process.communicate()[1])
        yield psutil.Process(process.pid).children()[0].pid
    finally:
        process.kill()
        process.communicate()


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True)  # noqa: S603


def wait_until_ended(processes: Sequence[subprocess.Popen[bytes]], timeout_s: float) -> list[int | None]:
    """Return the exit statuses of processes, None for those that still run after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [process.returncode for process in processes]


def torchrun(program: Path, *options: str) -> list[str]:
    """Return the command that starts one rank of a program on each of two machines."""
    rendezvous = ["--rdzv_backend=c10d", f"--rdzv_endpoint={ADDRESSES[0]}:29500", "--rdzv_id=two_machines"]
    module = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    return [*module, *rendezvous, *options, str(program)]
