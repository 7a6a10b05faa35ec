"""The environment variables of a process: its rank, by torchrun, srun or mpirun, and defaults for PyTorch.

srun and Open MPI's mpirun set their own; `set_ranks` translates them into those of torchrun, which PyTorch
reads. PyTorch is not imported here.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from vil.errors import UserError

_ORIGIN = "environment"
_USER_ERROR = 2
"""Exit status of a `UserError`."""
_MAX_RANKS, _MAX_PORT, _MAX_NUMBER = 1_000_000, 65_535, 10**18 - 1
_SINGLE_PROCESS_COMMAND = "RANK=0 WORLD_SIZE=1 python ... for one process"

_is_rendezvous_complete = False


@dataclass(frozen=True)
class Ranks:
    """Rank of this process among all processes, and among those of this machine, with their numbers."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def is_multi_node(self) -> bool:
        """True if processes of the job may run on other machines."""
        return self.local_world_size < self.world_size


def set_torch_environment() -> None:
    """Set variables that PyTorch reads when it is imported or first allocates memory, unless they are set.

    Waiting OpenMP threads sleep instead of spinning: they share the cores with the processes that load
    images. Tensors of 2 MB or more are in huge pages, where the system allows that: page faults for every
    4 kB of a new tensor take longer than writing it.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def read_ranks() -> Ranks:
    """Return the ranks of this process by torchrun's variables; without them, those of a single process.

    Raises:
        UserError: a variable is no number, or they do not fit one another.
    """
    sizes = ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    world_size, local_world_size = (_read(name, 1, _MAX_RANKS) for name in sizes)
    rank, local_rank = (_read(name, 0) for name in ("RANK", "LOCAL_RANK"))
    if rank >= world_size:
        raise UserError("RANK", f"expected an integer below WORLD_SIZE, {world_size}, got {rank}", _ORIGIN)
    if world_size > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                reason = f"is not set, but WORLD_SIZE is {world_size}; start the program by torchrun"
                raise UserError(name, reason, _ORIGIN)
        _read("MASTER_PORT", 1, _MAX_PORT)
    return Ranks(rank, world_size, local_rank, local_world_size)


def _read(name: str, minimum: int, maximum: int = _MAX_NUMBER) -> int:
    """Return an integer of the environment; `minimum` if the variable is not set."""
    text = os.environ.get(name)
    if text is None:
        return minimum
    number = int(text) if text.isdecimal() and len(text) < 19 else -1
    if not text.isdecimal() or 0 <= number < minimum:
        raise UserError(name, f"expected an integer of at least {minimum}, got {text!r}", _ORIGIN)
    if not 0 <= number <= maximum:
        raise UserError(name, f"expected an integer up to {maximum:,}, got {text!r}", _ORIGIN)
    return number


def set_ranks() -> None:
    """Set torchrun's variables if srun or mpirun started several processes, and check them.

    Variables of torchrun that are set already are used. MASTER_ADDR and MASTER_PORT, if they are set, are
    kept; else they are the first host of the job and a port that its id determines.

    Raises:
        UserError: a variable is invalid, or Slurm's describe several processes that srun has not started.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        for name, value in (_mpi_variables() or _slurm_variables()).items():
            os.environ.setdefault(name, value)
    read_ranks()


def _mpi_variables() -> dict[str, str]:
    """Return torchrun's variables for a process of Open MPI's mpirun; empty for any other."""
    size, local_size = (_read(f"OMPI_COMM_WORLD_{name}", 1) for name in ("SIZE", "LOCAL_SIZE"))
    if size == 1:
        return {}
    if local_size < size and not os.environ.get("MASTER_ADDR"):
        reason = "is not set; start with mpirun -x MASTER_ADDR=<host of rank 0>, or use torchrun"
        raise UserError("MASTER_ADDR", reason, _ORIGIN)
    job = os.environ.get("PMIX_NAMESPACE") or os.environ.get("OMPI_MCA_ess_base_jobid", "")  # noqa: SIM112
    return {
        "RANK": str(_read("OMPI_COMM_WORLD_RANK", 0)),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(_read("OMPI_COMM_WORLD_LOCAL_RANK", 0)),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_port(zlib.crc32(job.encode()))),
    }


def _slurm_variables() -> dict[str, str]:
    """Return torchrun's variables for a process of a job step of srun; empty for any other.

    A batch script has SLURM_NTASKS and SLURM_PROCID too, but no step: it is one process, which must not wait
    for others, nor train alone if the user expects several.
    """
    is_step = "SLURM_STEP_ID" in os.environ
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS"
    size = _read(name, 1)
    if size == 1 or "SLURM_PROCID" not in os.environ:
        return {}
    if not is_step:
        reason = f"{size}, but srun did not start this process; use srun python ..., torchrun, or"
        raise UserError(name, f"{reason} {_SINGLE_PROCESS_COMMAND}", _ORIGIN)
    node = _read("SLURM_NODEID", 0)
    hosts = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    if not hosts and not os.environ.get("MASTER_ADDR"):
        raise UserError("MASTER_ADDR", "is not set, and neither is SLURM_JOB_NODELIST", _ORIGIN)
    return {
        "RANK": str(_read("SLURM_PROCID", 0)),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(_read("SLURM_LOCALID", 0)),
        "LOCAL_WORLD_SIZE": str(_tasks_of_node(node, size)),
        "MASTER_ADDR": first_host(hosts),
        "MASTER_PORT": str(_port(_read("SLURM_JOB_ID", 0) + _read("SLURM_STEP_ID", 0))),
    }


def _tasks_of_node(node: int, size: int) -> int:
    """Return the number of processes on a node, from a list as `2(x3),1`; `size` without one."""
    counts: list[int] = []
    for text in filter(None, os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(",")):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", text)
        if match is None:
            raise UserError(
                "SLURM_STEP_TASKS_PER_NODE", f"expected numbers as 2(x3),1, got {text!r}", _ORIGIN
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[node] if node < len(counts) else size


def first_host(hosts: str) -> str:
    """Return the first host of Slurm's compact list: `gpu07` for `gpu[07-12,20],login1`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else "")


def _port(number: int) -> int:
    """Return a port below those that the system gives to connections."""
    return 20_000 + number % 10_000


def single_process_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment for a process that trains alone, whatever started this one."""
    names = re.compile(r"(TORCHELASTIC_|GROUP_|ROLE_|MASTER_).*")
    kept = {name: value for name, value in environment.items() if not names.fullmatch(name)}
    return {**kept, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def has_agent() -> bool:
    """Return True if torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def max_restarts() -> int:
    """Return the number of times that torchrun restarts failed processes."""
    return _read("TORCHELASTIC_MAX_RESTARTS", 0)


def restart_count() -> int:
    """Return how often torchrun has restarted the processes of this machine."""
    return _read("TORCHELASTIC_RESTART_COUNT", 0)


def must_report_failure(status: int) -> bool:
    """Return True if a rank that fails with this exit status must tell the other ranks and later restarts.

    Connected ranks notice the end of another by themselves, and on one machine torchrun ends them. A
    failure that torchrun repeats must not end the next attempt, unless it is a user's error.
    """
    ranks = read_ranks()
    if has_agent() and max_restarts() > 0:
        return ranks.world_size > 1 and status == _USER_ERROR
    return not _is_rendezvous_complete and (ranks.is_multi_node or (ranks.world_size > 1 and not has_agent()))


def mark_rendezvous_complete() -> None:
    """Record that all ranks are connected: they no longer wait for the start of this one."""
    global _is_rendezvous_complete
    _is_rendezvous_complete = True
