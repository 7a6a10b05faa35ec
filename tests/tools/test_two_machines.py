"""tools/dev/two_machines.py: the machines, and a scenario that needs no training."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tools.dev import two_machines as program
from tools.dev.machines.network import two_machines, wait_until_ended
from tools.dev.machines.scenarios import Outcome, Scenario
from vil.errors import UserError


@pytest.fixture
def _namespaces(tmp_path: Path):
    try:
        with two_machines(tmp_path, {}, {}):
            pass
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("_namespaces")
def test_machines_have_a_name_a_network_and_files(tmp_path: Path):
    (tmp_path / "shared").write_text("one")
    (tmp_path / "other").write_text("two")
    script = (
        "import socket; print(socket.gethostname(), open('shared').read(), socket.gethostbyname('machine-b'))"
    )
    script += "; socket.create_server((socket.gethostname(), 29500)).accept()"
    client = "import socket; socket.create_connection(('machine-b', 29500), 5); print('connected')"
    interfaces = socket.if_nameindex()
    shared = tmp_path / "shared"
    script = script.replace("shared", str(shared))
    with two_machines(tmp_path, {"machine-b": "127.0.1.1 machine-c\n"}, {shared: tmp_path / "other"}) as pair:
        logs = [tmp_path / f"{machine.name}.log" for machine in pair]
        server = pair[1].start([sys.executable, "-uc", script], logs[1], tmp_path, {})
        while "10.77" not in logs[1].read_text():
            assert server.poll() is None, logs[1].read_text()
        assert [process.name() for process in pair[1].processes("-uc")] == [Path(sys.executable).name]
        assert pair[0].processes("-uc") == []
        done = pair[0].start([sys.executable, "-uc", client], logs[0], tmp_path, {})
        assert wait_until_ended([done, server], 30) == [0, 0]
        pair[1].cut_network()
        cut = pair[0].start([sys.executable, "-uc", client], logs[0], tmp_path, {})
        assert wait_until_ended([cut], 0.2) == [None] or cut.returncode == 1
        left = pair[1].start(["sleep", "1000"], logs[1], tmp_path, {})
        while not pair[1].processes("1000"):  # nsenter has not yet started it
            assert left.poll() is None, logs[1].read_text()
    assert logs[1].read_text() == "machine-b two 10.77.0.2\n"
    assert logs[0].read_text().startswith("connected\n")
    assert left.wait(10) != 0
    assert socket.if_nameindex() == interfaces


@pytest.mark.usefixtures("_namespaces")
def test_an_empty_world_size_on_two_machines(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    program.main(["--only", "empty-world-size", "--markdown", str(tmp_path / "table.md")])
    text = (tmp_path / "table.md").read_text()
    assert "an empty WORLD_SIZE=" in text
    assert "error: environment: WORLD_SIZE: expected an integer of at least 1, got ''" in text
    assert "2, 2" in text
    assert "yes" in capsys.readouterr().out


def test_a_scenario_that_does_not_end_as_expected_is_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    outcome = Outcome(Scenario("1", "text", (1, 1), []), [0, None], 3.2, "a | b", ["no line"])
    monkeypatch.setattr(program.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    monkeypatch.setattr(program.ScenarioRunner, "run", lambda self, name: outcome)
    with pytest.raises(SystemExit) as caught:
        program.main(["--only", "equal"])
    assert caught.value.code == 1
    assert (
        "| 1     |     text |            0, running |       3 | no: no line |  a \\| b |"
        in capsys.readouterr().out
    )


def test_a_system_without_namespaces_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def refuse(argv: object, **_: object) -> None:
        raise subprocess.CalledProcessError(1, "ip", stderr=b"RTNETLINK answers: Operation not permitted\n")

    monkeypatch.setattr("tools.dev.machines.network._namespace", lambda: refuse(None))
    monkeypatch.setattr("tools.dev.machines.network.shutil.which", lambda name: name)
    with pytest.raises(UserError) as caught, two_machines(tmp_path, {}, {}):
        pass
    assert str(caught.value) == (
        "two machines need network namespaces (as root, on Linux): RTNETLINK answers: Operation not permitted"
    )
    monkeypatch.setattr("tools.dev.machines.network.shutil.which", lambda name: None)
    with (
        pytest.raises(UserError, match=r"^two machines need the programs ip, unshare, "),
        two_machines(tmp_path, {}, {}),
    ):
        pass
