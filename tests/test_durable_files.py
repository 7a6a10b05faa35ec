import os
from pathlib import Path

import pytest

from vil.durable_files import replacing, write_durably


@pytest.mark.parametrize("content", ["naïve\n", b"\x00\xff"])
def test_what_is_written_is_there_and_nothing_else(tmp_path: Path, content: str | bytes):
    path = tmp_path / "file"
    for written in ("old", content):
        write_durably(path, written)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert os.listdir(tmp_path) == ["file"]


def test_what_is_no_file_is_not_replaced(tmp_path: Path):
    """--json /dev/null, by root, must leave the device where it is."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_durably(pipe, "text")
    assert os.read(reader, 99) == b"text"
    os.close(reader)
    assert pipe.is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]
    with pytest.raises(IsADirectoryError):
        write_durably(tmp_path, "text")


@pytest.mark.parametrize("failing", ["os.fsync", "os.replace", "pathlib.Path.write_bytes"])
def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str):
    path = tmp_path / "file"
    write_durably(path, "old")

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(OSError, match="No space left"):
        write_durably(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_the_file_has_its_name_when_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Content first, then the name, then the folder that holds the name."""
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda file: (done.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file))
    )
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("renamed"), replace(*paths)))
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "file").exists()
    assert done == [str(tmp_path / "file.tmp"), "renamed", str(tmp_path)]
