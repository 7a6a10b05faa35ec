"""Run jobs under a real Slurm on two machines: time limit, requeue, cancellation, srun and mpirun.

    python -m tools.dev.slurm_jobs                                all scenarios; four minutes on two cores
    python -m tools.dev.slurm_jobs --only time-limit              some of them

The machines are those of tools.dev.two_machines; Slurm's daemons run on them with a configuration of their
own, and end with this program. The batch script is that of docs/reliability.md, with small numbers. Exit
status 1 if a scenario does not end as expected; the output is then kept. Needs Linux, root, and on Debian
the packages slurmctld, slurmd, slurm-client, munge and openmpi-bin.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tools.dev.machines.network import ADDRESSES, NAMES, Machine, two_machines
from vil import command_line
from vil.command_line import ToolParser
from vil.errors import UserError
from vil.runtime.console import print_text

ROOT = Path(__file__).resolve().parents[2]
_TOOLS = ("slurmctld", "slurmd", "srun", "munged", "mpirun")
_TRAIN = "train.py --device cpu --schedule.epochs {epochs} --output {output}"
_CONFIGURATION = """\
ClusterName=vil
SlurmctldHost={names[0]}({addresses[0]})
SlurmUser=root
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n/slurmd.pid
SlurmdLogFile={folder}/slurmd_%n.log
SlurmdParameters=config_overrides
NodeName={names[0]} NodeAddr={addresses[0]} CPUs=2
NodeName={names[1]} NodeAddr={addresses[1]} CPUs=2
PartitionName=main Nodes=ALL Default=YES
"""
_CHANGES = {
    "--nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=96": "--nodes=2 --ntasks-per-node=1",
    "--time=24:00:00": "--time=2",
    "--signal=B:USR1@120": "--signal=B:USR1@60",
    '--cpus-per-task="$SLURM_CPUS_PER_TASK" ': "",
    "--nproc_per_node=8": "--nproc_per_node=1",
}
"""Changes to the batch script of the documentation, besides those of the options of train.py."""


class Cluster:
    """Slurm on two machines.

    Args:
        folder: for output and runs.
        machine: the one with slurmctld, on which commands are run.
    """

    def __init__(self, folder: Path, machine: Machine) -> None:
        self.folder, self._machine = folder, machine
        root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._environment = {**os.environ, **root, "PATH": path, "OMP_NUM_THREADS": "1"}
        self._environment["SLURM_CONF"] = str(folder / "slurm.conf")

    def start(self, name: str, *argv: str) -> subprocess.Popen[bytes]:
        """Start a command in a clone's root, with its output in the file `name`.out."""
        return self._machine.start(argv, self.folder / f"{name}.out", ROOT, self._environment)

    def run(self, *argv: str) -> str:
        """Return the output of a command of Slurm."""
        name = f"command_{secrets.token_hex(4)}"
        status = self.start(name, *argv).wait(60)
        output = self.output(name)
        if status:
            raise RuntimeError(f"{argv[0]} ended with status {status}: {output.strip()}")
        return output

    def output(self, name: str) -> str:
        """Return the content of the file `name`.out; empty if there is none."""
        path = self.folder / f"{name}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(self, name: str, pattern: str, timeout_s: float = 180) -> re.Match[str]:
        """Return the first match in the file `name`.out, as soon as it has one.

        Raises:
            RuntimeError: there is none within `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        while (match := re.search(pattern, self.output(name))) is None:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name}.out has no {pattern!r} after {timeout_s} s")
            time.sleep(0.5)
        return match


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[Cluster]:
    """Start Slurm on two machines; end it with them.

    Raises:
        UserError: programs are missing, or this system does not allow it.
    """
    if missing := [name for name in _TOOLS if shutil.which(name) is None]:
        raise UserError("", f"the programs {', '.join(missing)} are missing (docs/reliability.md, Slurm)")
    for name in ("state", *NAMES):
        (folder / name).mkdir()
    configuration = _CONFIGURATION.format(folder=folder, names=NAMES, addresses=ADDRESSES)
    (folder / "slurm.conf").write_text(configuration, encoding="utf-8")
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    with two_machines(folder, {}, {}) as machines:
        cluster = Cluster(folder, machines[0])
        files = {"key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "munged.pid"}
        files |= {"log-file": folder / "munged.log", "seed-file": folder / "munged.seed"}
        options = [f"--{name}={path}" for name, path in files.items()]
        cluster.start("munged", "munged", "--foreground", "--force", *options)
        cluster.start("slurmctld", "slurmctld", "-D", "-f", str(folder / "slurm.conf"))
        for machine in machines:
            node = Cluster(folder, machine)
            node.start(f"slurmd_{machine.name}", "slurmd", "-D", "-N", machine.name)
        deadline = time.monotonic() + 30
        while not _are_nodes_idle(cluster):
            if time.monotonic() > deadline:
                raise UserError("", "Slurm does not start within 30 s")
            time.sleep(0.5)
        yield cluster


def _are_nodes_idle(cluster: Cluster) -> bool:
    try:
        states = cluster.run("sinfo", "--Node", "--noheader", "--format=%T").split()
    except RuntimeError:  # slurmctld does not answer yet
        return False
    return states == ["idle"] * len(NAMES)


def batch_script(output: Path, run: Path) -> str:
    """Return the batch script of the documentation, which trains on the digits here.

    Raises:
        ValueError: a text that is changed is not in the script once.
    """
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    script = re.findall(r"```sh\n(#!/bin/bash\n.*?)```", text, re.DOTALL)[0]
    train = re.findall(r"train\.py .*? &\n", script, re.DOTALL)[0]
    options = _TRAIN.format(epochs=1000, output=run)
    for old, new in {**_CHANGES, train: f"{options} &\n"}.items():
        if script.count(old) != 1:
            raise ValueError(f"the batch script has {script.count(old)} times {old!r}")
        script = script.replace(old, new)
    return script.replace("#SBATCH", f"#SBATCH --output={output}\n#SBATCH", 1)


def time_limit(cluster: Cluster) -> str:
    """Run the batch script until its time limit, then again, and cancel it."""
    script, run = cluster.folder / "job.sh", cluster.folder / "run_batch"
    script.write_text(batch_script(cluster.folder / "batch.out", run), encoding="utf-8")
    job = cluster.run("sbatch", "--parsable", str(script)).strip()
    step = cluster.wait_for("batch", r"SIGTERM: saved after step (\d+)")[1]
    wait_for_state(cluster, job, "PENDING")  # it is requeued
    cluster.run("scontrol", "update", f"jobid={job}", "starttime=now")
    cluster.wait_for("batch", rf"continuing \S+ after step {step},")
    cluster.wait_for("batch", r"(?s)continuing.*\nepoch ")
    cluster.run("scancel", job)
    later = cluster.wait_for("batch", r"(?s)continuing.*SIGTERM: saved after step (\d+)")[1]
    wait_for_state(cluster, job, "")  # and not requeued
    return f"saved after step {step}, requeued, continued; cancelled, saved after step {later}, ended"


def wait_for_state(cluster: Cluster, job: str, expected: str) -> None:
    """Wait until squeue shows this state of a job, empty for one that has ended.

    Raises:
        RuntimeError: it does not within a minute.
    """
    deadline = time.monotonic() + 60
    while (state := cluster.run("squeue", "--noheader", "--format=%T", f"--jobs={job}").strip()) != expected:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the job's state is {state or 'ended'}, expected {expected or 'ended'}")
        time.sleep(0.5)


def srun(cluster: Cluster) -> str:
    """Train by srun, one task per machine."""
    train = _TRAIN.format(epochs=1, output=cluster.folder / "run_srun").split()
    return _finished(cluster, "srun", "srun", "--nodes=2", "--ntasks=2", "python", *train)


def mpirun(cluster: Cluster) -> str:
    """Train by Open MPI's mpirun in an allocation, one process per machine."""
    train = _TRAIN.format(epochs=1, output=cluster.folder / "run_mpirun").split()
    launch = ["mpirun", "-x", f"MASTER_ADDR={NAMES[0]}", "python"]
    return _finished(cluster, "mpirun", "salloc", "--nodes=2", "--ntasks=2", *launch, *train)


def _finished(cluster: Cluster, name: str, *argv: str) -> str:
    status = cluster.start(name, *argv).wait(180)
    if status:
        raise RuntimeError(f"status {status}, {name}.out")
    cluster.wait_for(name, r"2 × cpu", 1)
    return cluster.wait_for(name, r"Top-1 .* of 360 images", 1)[0]


def cancel(cluster: Cluster) -> str:
    """Cancel a job of srun."""
    train = _TRAIN.format(epochs=1000, output=cluster.folder / "run_cancel").split()
    options = ["--nodes=2", "--ntasks=2", "--job-name=cancelled"]
    process = cluster.start("cancel", "srun", *options, "python", *train)
    cluster.wait_for("cancel", r"\nepoch ")
    cluster.run("scancel", "--name=cancelled")
    status = process.wait(60)
    if status != 128 + signal.SIGTERM:
        raise RuntimeError(f"status {status}, expected 143")
    return f"{cluster.wait_for('cancel', r'SIGTERM: saved after step .*', 1)[0]}, status 143"


def without_srun(cluster: Cluster) -> str:
    """Start train.py in a batch script of two tasks, without srun."""
    train = _TRAIN.format(epochs=1, output=cluster.folder / "run_without")
    output = f"--output={cluster.folder / 'without.out'}"
    command = ["sbatch", "--wait", "--nodes=2", "--ntasks=2", output, f"--wrap=python {train}"]
    status = cluster.start("sbatch", *command).wait(120)
    if status != 2:
        raise RuntimeError(f"status {status}, expected 2")
    return f"{cluster.wait_for('without', r'error: environment: .*srun.*', 1)[0]}, status 2"


SCENARIOS: dict[str, Callable[[Cluster], str]] = {
    "time-limit": time_limit,
    "srun": srun,
    "mpirun": mpirun,
    "cancel": cancel,
    "without-srun": without_srun,
}


def has_ended_as_expected(cluster: Cluster, name: str) -> bool:
    """Run a scenario, and print its result."""
    try:
        result = SCENARIOS[name](cluster)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        print_text(f"{name}: FAILED: {error}")
        return False
    print_text(f"{name}: {result}")
    return True


def main(argv: Sequence[str]) -> None:
    """Run the scenarios, and print a line for each."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = Path(tempfile.mkdtemp(prefix="slurm_jobs_"))
    has_failed = True
    try:
        with slurm_cluster(folder) as cluster:
            results = [has_ended_as_expected(cluster, name) for name in arguments.only or SCENARIOS]
            has_failed = not all(results)
    finally:
        if has_failed and any(folder.iterdir()):
            print_text(f"output: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    if has_failed:
        raise SystemExit(1)


def _parser() -> ToolParser:
    parser = ToolParser(prog="python -m tools.dev.slurm_jobs", description=__doc__, allow_abbrev=False)
    names = list(SCENARIOS)
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of: {', '.join(names)}")
    return parser


if __name__ == "__main__":
    command_line.main(main)
