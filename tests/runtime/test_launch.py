import pytest

from vil.errors import UserError
from vil.runtime import launch
from vil.runtime.launch import (
    Ranks,
    first_host,
    must_report_failure,
    read_ranks,
    set_ranks,
    set_torch_environment,
    single_process_environment,
)

SLURM = {
    "SLURM_JOB_ID": "40017",
    "SLURM_STEP_ID": "2",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[07-08,20]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
}
TORCHRUN = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}
STORE = {"MASTER_ADDR": "a", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment without variables of a launcher."""
    variables: dict[str, str] = {}
    monkeypatch.setattr(launch.os, "environ", variables)
    monkeypatch.setattr(launch, "_is_rendezvous_complete", False)
    return variables


def test_a_process_without_variables_is_alone(environment: dict[str, str]):
    set_ranks()
    assert not any("RANK" in name for name in environment)
    assert read_ranks() == Ranks(0, 1, 0, 1)


def test_defaults_for_pytorch(environment: dict[str, str]):
    environment["OMP_WAIT_POLICY"] = "ACTIVE"
    set_torch_environment()
    environment.pop("PYTEST_CURRENT_TEST", None)
    assert environment == {"OMP_WAIT_POLICY": "ACTIVE", "THP_MEM_ALLOC_ENABLE": "1"}


def test_variables_of_srun(environment: dict[str, str]):
    environment.update(SLURM)
    set_ranks()
    assert read_ranks() == Ranks(3, 5, 1, 2)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("gpu07", "20019")
    environment["SLURM_NODEID"] = "2"
    for name in launch.single_process_environment({}):
        del environment[name]
    set_ranks()
    assert read_ranks().local_world_size == 1


def test_variables_of_mpirun_come_before_those_of_srun_that_started_it(environment: dict[str, str]):
    environment.update(SLURM | MPI)
    set_ranks()
    assert read_ranks() == Ranks(3, 4, 3, 4)
    assert environment["MASTER_ADDR"] == "127.0.0.1"
    assert 20_000 <= int(environment["MASTER_PORT"]) < 30_000


def test_variables_of_torchrun_and_the_address_of_the_user_are_kept(environment: dict[str, str]):
    environment.update(SLURM | MPI | TORCHRUN | STORE)
    set_ranks()
    assert read_ranks() == Ranks(3, 4, 1, 2)
    environment.clear()
    environment.update(SLURM | STORE)
    set_ranks()
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("a", "29500")


def test_one_task_and_the_shell_of_an_allocation_are_one_process(environment: dict[str, str]):
    for variables in (
        SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"},
    ):
        environment.clear()
        environment.update(variables)
        set_ranks()
        assert read_ranks() == Ranks(0, 1, 0, 1)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE: expected an integer of at least 1, got ''"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: expected an integer of at least 1, got '0'"),
        (TORCHRUN | STORE | {"RANK": "x"}, "RANK: expected an integer of at least 0, got 'x'"),
        (TORCHRUN | STORE | {"RANK": "4"}, "RANK: expected an integer below WORLD_SIZE, 4, got 4"),
        ({"RANK": "1"}, "RANK: expected an integer below WORLD_SIZE, 1, got 1"),
        (TORCHRUN, "MASTER_ADDR: is not set, but WORLD_SIZE is 4; start the program by torchrun"),
        ({"WORLD_SIZE": "2"}, "RANK: is not set, but WORLD_SIZE is 2; start the program by torchrun"),
        (
            {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
            "SLURM_NTASKS: 4, but srun did not start this process; use srun python ..., torchrun, or RANK=0 "
            "WORLD_SIZE=1 python ... for one process",
        ),
        (
            {key: value for key, value in SLURM.items() if "NODELIST" not in key},
            "MASTER_ADDR: is not set, and neither is SLURM_JOB_NODELIST",
        ),
        (
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2x"},
            "SLURM_STEP_TASKS_PER_NODE: expected numbers as 2(x3),1, got '2x'",
        ),
        (
            MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
            "MASTER_ADDR: is not set; start with mpirun -x MASTER_ADDR=<host of rank 0>, or use torchrun",
        ),
    ],
)
def test_invalid_variables(environment: dict[str, str], variables: dict[str, str], message: str):
    environment.update(variables)
    with pytest.raises(UserError) as caught:
        set_ranks()
    assert str(caught.value) == f"environment: {message}"


def test_the_first_host_of_a_list():
    lists = ("gpu[07-12,20],login1", "a,b", "node1", "rack[0-1]node[3,4],x", "")
    assert [first_host(text) for text in lists] == ["gpu07", "a", "node1", "rack0node3", ""]


def test_an_environment_for_one_process(environment: dict[str, str]):
    started = TORCHRUN | STORE | {"TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "1", "PATH": "/bin"}
    environment.update(single_process_environment(started | SLURM))
    assert "TORCHELASTIC_RUN_ID" not in environment
    assert environment["PATH"] == "/bin"
    set_ranks()
    assert read_ranks() == Ranks(0, 1, 0, 1)


def test_failures_that_other_ranks_must_know(environment: dict[str, str]):
    agent = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_MAX_RESTARTS": "0"}
    one_machine = TORCHRUN | STORE | {"LOCAL_WORLD_SIZE": "4"}
    restarts = agent | {"TORCHELASTIC_MAX_RESTARTS": "3"}
    for variables, status, is_shared in (
        ({}, 2, False),
        (one_machine, 1, True),
        (one_machine | agent, 2, False),
        (one_machine | restarts, 2, True),
        (one_machine | restarts, 1, False),
        (TORCHRUN | STORE | agent, 1, True),
        (TORCHRUN | STORE | restarts, 1, False),
    ):
        environment.clear()
        environment.update(variables)
        assert must_report_failure(status) == is_shared, variables
    environment.update(TORCHRUN | STORE | agent)
    launch.mark_rendezvous_complete()
    assert not must_report_failure(1)
    environment.update(restarts)
    assert must_report_failure(2)


@pytest.mark.parametrize(
    ("name", "value", "maximum"),
    [
        ("MASTER_PORT", "65536", "65,535"),
        ("MASTER_PORT", "9" * 5000, "65,535"),
        ("WORLD_SIZE", "9" * 30, "1,000,000"),
        ("LOCAL_WORLD_SIZE", "1000001", "1,000,000"),
    ],
)
def test_numbers_that_pytorch_cannot_use(environment: dict[str, str], name: str, value: str, maximum: str):
    environment.update({**TORCHRUN, **STORE, name: value})
    with pytest.raises(UserError, match=f"^environment: {name}: expected an integer up to {maximum}, got '"):
        set_ranks()
