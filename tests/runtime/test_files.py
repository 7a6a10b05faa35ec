import errno
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from vil.errors import UserError
from vil.runtime import files
from vil.runtime.files import open_regular, replacing, write_durably, write_output


@pytest.mark.parametrize("content", ["naïve\n", b"\x00\xff"])
def test_written_content_is_read_back_without_leftovers(tmp_path: Path, content: str | bytes):
    path = tmp_path / "file"
    for written in ("old", content):
        write_durably(path, written)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert os.listdir(tmp_path) == ["file"]


def test_devices_and_pipes_are_not_replaced(tmp_path: Path):
    """--json /dev/null, by root, must not replace the device."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_output(pipe, "text")
    assert os.read(reader, 99) == b"text"
    os.close(reader)
    assert pipe.is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]
    with pytest.raises(UserError) as caught:
        write_output(tmp_path, "text")
    assert str(caught.value) == f"{tmp_path}: cannot be written: Is a directory"


@pytest.mark.parametrize("failing", ["os.fsync", "os.replace", "os.fdopen"])
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


def test_the_file_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Content first, then the name, then the folder that holds the name."""
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda file: (done.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file))
    )
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("renamed"), replace(*paths)))
    with replacing(tmp_path / "file") as temporary:
        temporary.write(b"new")
        assert not (tmp_path / "file").exists()
    assert done[1:] == ["renamed", str(tmp_path)]
    assert re.fullmatch(rf"{tmp_path}/file\.[0-9a-f]{{16}}\.tmp", done[0])


def test_permissions_are_those_of_any_file_and_stay(tmp_path: Path):
    mask = os.umask(0o027)
    try:
        write_durably(tmp_path / "file", "new")
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
        (tmp_path / "file").chmod(0o604)
        write_durably(tmp_path / "file", "newer")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o604


def test_names_may_be_as_long_as_the_system_allows(tmp_path: Path):
    for name in ("x" * 255, "é" * 127):
        write_durably(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"


def test_a_name_chosen_by_this_project_is_replaced_even_if_a_link(tmp_path: Path):
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo"):
        write_durably(tmp_path / name, "new")
        assert (tmp_path / name).read_text() == "new"
        assert not (tmp_path / name).is_symlink()
    assert (tmp_path / "outside").read_text() == "mine"


@pytest.mark.parametrize("target", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_is_written_to_also_where_it_is_a_file(tmp_path: Path, target: str):
    code = f"from vil.runtime.files import *; print('first'); write_output(Path({target!r}), 'text\\n')"
    with (tmp_path / "out").open("wb") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True, timeout=60)
    assert (tmp_path / "out").read_text() == "first\ntext\n"
    assert Path("/dev/stdout").is_symlink()


def test_a_moved_result_does_not_replace_a_device(tmp_path: Path):
    (tmp_path / "result").write_text("text")
    reader, writer = os.pipe()
    files.move_output(tmp_path / "result", Path(f"/dev/fd/{writer}"))
    assert os.read(reader, 99) == b"text"
    files.move_output(tmp_path / "result", tmp_path / "moved")
    assert (tmp_path / "moved").read_text() == "text"


def special_files(folder: Path) -> list[Path]:
    os.mkfifo(folder / "fifo")
    (folder / "folder").mkdir()
    (folder / "to_zero").symlink_to("/dev/zero")
    return [folder / "fifo", folder / "folder", folder / "to_zero", Path("/dev/zero")]


def test_only_regular_files_are_opened(tmp_path: Path):
    for path in special_files(tmp_path):
        with pytest.raises(OSError, match=r"not a regular file|Is a directory") as caught:
            open_regular(path)
        assert caught.value.filename == str(path)
        with pytest.raises(OSError, match=r"not a regular file|Is a directory|symbolic link"):
            files.open_for_appending(path)
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to("file")
    assert open_regular(tmp_path / "link").read() == b"text"
    with pytest.raises(OSError, match="symbolic link") as caught:
        files.open_for_appending(tmp_path / "link")
    assert caught.value.errno == errno.ELOOP


def test_size_limits_of_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file"
    path.write_text("12345")
    assert files.read_bytes(path, 5) == b"12345"
    with pytest.raises(OSError, match="is larger than 4 bytes"):
        files.read_bytes(path, 4)
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: takes no room on the disk
    for read in (files.read_text, lambda path: list(files.read_lines(path))):
        with pytest.raises(OSError, match="is larger than"):
            read(path)
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 10)
    path.write_text("1\n" + 11 * "x")
    lines = files.read_lines(path)
    assert next(lines) == "1\n"
    with pytest.raises(OSError, match="a line of more than 10 bytes"):
        next(lines)


def test_only_leftovers_of_a_kill_are_removed(tmp_path: Path):
    kept = ["a.tmp", "a.0123456789abcdef.tmp", "config.yaml.0123.tmp", "config.yaml"]
    for name in (*kept, "config.yaml.0123456789abcdef.tmp"):
        (tmp_path / name).touch()
    files.remove_leftovers(tmp_path, r"config\.yaml")
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


def test_folders_below_the_users_folder_must_not_be_links(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "output").symlink_to("elsewhere")
    assert files.make_folders(tmp_path / "output", "a", "b").is_dir()
    (tmp_path / "output" / "c").symlink_to(tmp_path)
    with pytest.raises(OSError, match="symbolic link"):
        files.make_folders(tmp_path / "output", "c", "d")
    assert not (tmp_path / "d").exists()


def test_an_input_is_refused_as_output(tmp_path: Path):
    (tmp_path / "checkpoints").mkdir()
    for name in ("in", "config.yaml", "checkpoints/best.pt", "predictions.csv"):
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to("in")
    for name in ("in", "link", "config.yaml", "checkpoints/best.pt"):
        with pytest.raises(UserError, match=r"--output: .* is an input of this command"):
            files.refuse_input_as_output(tmp_path / name, [tmp_path / "in", tmp_path, "missing"], "--output")
    for name in ("predictions.csv", "new", "checkpoints", "."):
        files.refuse_input_as_output(tmp_path / name, [tmp_path / "in", tmp_path], "--output")


def test_results_beside_a_downloaded_checkpoint_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder called checkpoints is not always that of a run."""
    run, downloads = tmp_path / "run", tmp_path / "downloads"
    for folder in (run, downloads):
        (folder / "checkpoints").mkdir(parents=True)
        for name in ("best.pt", "vil.pth", "vil.json"):
            (folder / "checkpoints" / name).touch()
        (folder / "summary.json").touch()
    (run / "config.yaml").touch()
    outputs = ("checkpoints/vil.json", "summary.json")
    for folder, checkpoint in ((downloads, "vil.pth"), (downloads, "best.pt"), (run, "vil.pth")):
        for output in outputs:
            files.refuse_input_as_output(folder / output, [folder / "checkpoints" / checkpoint], "--json")
    best = run / "checkpoints" / "best.pt"
    files.refuse_input_as_output(run / "checkpoints/vil.json", [best], "--json")  # as of an average
    (run / "checkpoints" / "step_00000002.pt.sha256").touch()
    monkeypatch.chdir(run / "checkpoints")
    for output in ("checkpoints/step_00000002.pt.sha256", "summary.json"):
        for checkpoint in (run / "checkpoints" / "best.pt", "best.pt"):
            with pytest.raises(UserError, match="is an input of this command"):
                files.refuse_input_as_output(run / output, [checkpoint], "--json")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "1" * 400, "-" + "1" * 19 + "0"])
def test_json_that_cannot_be_used(text: str):
    with pytest.raises(ValueError):
        files.parse_json(text)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("naïve", "naïve".encode()),
        ("ant\udcff", b"ant\xff"),
        ("a\ud800", rb"a\ud800"),
        ("é\udcff\ud800", None),
    ],
)
def test_names_that_are_not_utf8_are_written(tmp_path: Path, text: str, content: bytes | None):
    """Names of class folders keep their bytes; other surrogates, as JSON may hold them, are escaped."""
    for number, write in enumerate((write_durably, write_output)):
        write(tmp_path / str(number), text)
        found = (tmp_path / str(number)).read_bytes()
        assert found == (content or text.encode(errors="backslashreplace"))
