"""Processes of train.py: started as a user starts them, watched, and struck.

A run is a folder and a command line; a life is one time that the command is called. It ends by itself or is
ended. A life is one process, or those of torchrun. With `forked`, its processes are forks of this one, which
has imported train.py already: that saves the seconds of an import, and is a process like any other after it.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.torturing import driver
from tools.torturing.driver import Trouble
from vil.checkpoint_files import FOLDER
from vil.training.logging import METRICS

ROOT = Path(__file__).resolve().parents[2]
MARK = "VIL_TORTURE"
PATIENCE = 300.0
"""Seconds without a step or a word, after which a life that does not do what it should is given up."""

_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_numbers = itertools.count()
_alive: list[Life] = []


class StuckError(RuntimeError):
    """A life did not do in time what it should."""


@dataclass
class Run:
    """A folder that train.py works in, and what it is called with.

    Attributes:
        folder: the run's.
        words: options of train.py.
        logs: where what its processes say is, a folder for each life.
        ranks: number of processes that train together.
        forked: whether its lives are forks of this process.
        lives: all that there were.
    """

    folder: Path
    words: tuple[str, ...]
    logs: Path
    ranks: int = 1
    forked: bool = False
    lives: list[Life] = field(default_factory=list)

    def start(
        self,
        *words: str,
        ranks: int | None = None,
        restarts: int = 0,
        trouble: Trouble | None = None,
        file_size: int | None = None,
    ) -> Life:
        """Calls train.py.

        Args:
            words: further options.
            ranks: in the place of the run's own.
            restarts: how often torchrun starts the ranks again.
            trouble: what the driver does to a rank.
            file_size: bytes that a file may have, RLIMIT_FSIZE.
        """
        words = (*self.words, *words, "--output", str(self.folder))
        logs = self.logs / f"{len(self.lives) + 1:03}"
        life = Life(self, words, ranks or self.ranks, logs, restarts, trouble, file_size)
        self.lives.append(life)
        return life

    def finish(self, *words: str, **options: Any) -> Life:
        """Calls train.py and waits for its end."""
        life = self.start(*words, **options)
        life.end()
        return life

    def last_step(self) -> int:
        """The last step that metrics.jsonl tells of; 0 for none."""
        with suppress(OSError), (self.folder / METRICS).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 14)))
            for line in reversed(file.read().split(b"\n")[:-1]):
                with suppress(ValueError, LookupError, TypeError):
                    return int(json.loads(line)["step"])
        return 0

    def temporary_files(self) -> list[str]:
        """What a save that is not over has left in the folder of the checkpoints."""
        try:
            return [name for name in os.listdir(self.folder / FOLDER) if name.endswith(".tmp")]
        except OSError:
            return []

    def unfinished(self) -> set[tuple[str, int]]:
        """(name, inode) of these: what an earlier life left is no save of a later one."""
        found = set()
        for name in self.temporary_files():
            with suppress(OSError):
                found.add((name, (self.folder / FOLDER / name).stat().st_ino))
        return found


class Life:
    """One call of train.py; see `Run.start`."""

    def __init__(
        self,
        run: Run,
        words: Sequence[str],
        ranks: int,
        logs: Path,
        restarts: int,
        trouble: Trouble | None,
        file_size: int | None,
    ) -> None:
        self.run, self.ranks, self.logs = run, ranks, logs
        self._mark = f"{os.getpid()}.{next(_numbers)}"
        self._metrics_before = _inode(run.folder / METRICS)
        self._aimed: list[int] = []
        self.first = 0
        """The step that it continued from, as it said itself."""
        logs.mkdir(parents=True)
        environment = {key: value for key, value in os.environ.items() if key not in _LAUNCHER}
        environment |= {"OMP_NUM_THREADS": "1", MARK: self._mark}
        self.processes: list[Any] = []
        if run.forked:
            port = _free_port()
            for rank in range(ranks):
                if ranks > 1:
                    environment |= dict(zip(_LAUNCHER, (str(rank), str(rank), *[str(ranks)] * 2)))
                    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                self.processes.append(_Fork(words, environment, logs / f"rank{rank}", trouble, file_size))
        else:
            command = [sys.executable]
            if ranks > 1:
                command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
                command += [f"--max-restarts={restarts}", "--redirects=3", f"--log-dir={logs}"]
            command += [str(ROOT / "train.py")] if trouble is None else [driver.__file__, *trouble.words()]
            with (logs / "rank0.out").open("wb") as out, (logs / "rank0.err").open("wb") as err:
                process = subprocess.Popen(  # noqa: S603 (our own program)
                    [*command, *words],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    env=environment,
                    cwd=ROOT,
                    start_new_session=True,
                    preexec_fn=lambda: _prepare(file_size),
                )
            self.processes.append(process)
        self.began = time.monotonic()
        _alive.append(self)

    def said(self) -> str:
        """What rank 0 wrote to standard output so far."""
        return "".join(self._text(path) for path in self._files("out", "0/stdout.log"))

    def complaints(self) -> str:
        """What the ranks wrote to standard error so far; torchrun's own report is not theirs."""
        return "".join(self._text(path) for path in self._files("err", "*/stderr.log"))

    def steps(self) -> int:
        """The steps that this life has logged."""
        path = self.run.folder / METRICS
        inode = _inode(path)
        if inode is None or inode == self._metrics_before:  # not cut yet
            return 0
        return max(0, self.run.last_step() - self.continued())

    def continued(self) -> int:
        """The step that it says to continue from; 0 where it says nothing of the kind."""
        if not self.first and (line := self.said().partition(" after step ")[2]):
            self.first = int(line.partition(",")[0])
        return self.first

    def until(self, happened: Callable[[], Any], seconds: float = PATIENCE, poll: float = 0.01) -> bool:
        """Waits until `happened()`; whether it did before all was over.

        Raises:
            StuckError: after so many seconds in which the run made no progress either.
        """
        progress, deadline = None, time.monotonic() + seconds
        while not happened():
            if all(process.poll() is not None for process in self.processes):
                return bool(happened())
            if time.monotonic() > deadline:
                before, progress = progress, (self.run.last_step(), self.said())
                if progress != before:
                    deadline += seconds
                    continue
                self.kill()
                raise StuckError(f"nothing happened for {seconds:.0f} s: {self.tail()}")
            time.sleep(poll)
        return True

    def until_step(self, count: int) -> bool:
        """Waits until this life has logged so many steps."""
        return self.until(lambda: self.steps() >= count)

    def tell(self, signum: int, everyone: bool = False) -> None:
        """Sends a signal to train.py or torchrun, or to its whole group, as a terminal does."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                (os.killpg if everyone else os.kill)(process.pid, signum)

    def rank(self, number: int) -> int | None:
        """The process of one rank; None where it is not there (yet, or any more)."""
        if len(self.processes) > 1 or self.ranks == 1:
            return int(self.processes[number].pid)
        for pid in self._members():
            if _parent(pid) == self.processes[0].pid and f"RANK={number}" in _environment(pid):
                return pid
        return None

    def workers(self) -> list[int]:
        """The processes that load images for rank 0."""
        return [pid for pid in self._members() if _parent(pid) == self.rank(0)]

    def aim(self) -> None:
        """Looks up the processes that `kill` ends, so that it takes no time then."""
        self._aimed = self._members()

    def kill(self) -> None:
        """kill -9 of everything that this life has started; returns when all of it is gone."""
        for pid in self._aimed:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while members := self._members():
            for pid in members:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for process in self.processes:
                process.poll()
            time.sleep(0.002)
        self.end()

    def end(self, seconds: float = PATIENCE) -> tuple[int, ...]:
        """Waits for the end; the exit statuses, of torchrun or of all processes, -9 where it was killed."""
        self.until(lambda: all(process.poll() is not None for process in self.processes), seconds)
        if self in _alive:
            _alive.remove(self)
        return self.statuses()

    def statuses(self) -> tuple[int, ...]:
        """The exit statuses of what has ended."""
        return tuple(p.returncode for p in self.processes if p.poll() is not None)

    def tail(self) -> str:
        """The last words, for whoever has to find out what happened."""
        lines = [*self.said().splitlines()[-2:], *self.complaints().splitlines()[-2:]]
        return f"{' / '.join(lines)[-300:]} ({self.logs})"

    def _files(self, end: str, of_torchrun: str) -> list[Path]:
        if self.ranks > 1 and not self.run.forked:
            return sorted(self.logs.glob(f"*/attempt_*/{of_torchrun}"))
        return sorted(self.logs.glob(f"rank*.{end}"))

    @staticmethod
    def _text(path: Path) -> str:
        try:
            return path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def _members(self) -> list[int]:
        """All processes of this life that are not over."""
        own, found = {process.pid for process in self.processes}, []
        for name in os.listdir("/proc"):
            if not name.isdigit():
                continue
            fields = _stat(int(name))
            if not fields or fields[0] in "ZX":
                continue
            if int(fields[3]) in own or f"{MARK}={self._mark}" in _environment(int(name)):
                found.append(int(name))
        return found


def kill_all() -> None:
    """Ends what is still alive, when this program ends."""
    for life in tuple(_alive):
        with suppress(StuckError):
            life.kill()


class _Fork:
    """A fork of this process that goes on as train.py; behaves like `subprocess.Popen`."""

    def __init__(
        self,
        words: Sequence[str],
        environment: dict[str, str],
        log: Path,
        trouble: Trouble | None,
        file_size: int | None,
    ) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.setsid()
                _prepare(file_size)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                for number, name in enumerate((os.devnull, f"{log}.out", f"{log}.err")):
                    os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o644), number)
                os.environ.clear()
                os.environ.update(environment)
                status = driver.run(words, trouble)
            except BaseException:  # as the interpreter does
                traceback.print_exc()
            finally:
                with suppress(OSError):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(status)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def _prepare(file_size: int | None) -> None:
    """Between fork and exec: signals as a shell's foreground job has them, and the limit of a file's size."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_DFL)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


def _stat(pid: int) -> list[str]:
    """State, parent, process group, session … of a process; nothing where it is gone."""
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return []


def _parent(pid: int) -> int:
    return int((_stat(pid) or ["", "0"])[1])


def _environment(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/environ").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:
        return []


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
