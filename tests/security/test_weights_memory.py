"""Weights files: excessive sizes are refused before allocation, and only regular files are opened."""

import io
import json
import os
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.measured import measured
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from vil.checkpoints.open import open_weights
from vil.checkpoints.pickle_file import read_pickle
from vil.errors import UserError

MB = 10**6


def number(value: int) -> bytes:
    """Return an integer in a pickle."""
    content = value.to_bytes(8, "little", signed=True)
    return b"\x8a\x08" + content


def call(name: str, *arguments: bytes) -> bytes:
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(1) + b"tQ"


def tensor(size: int, storage: bytes = STORAGE, offset: int = 0, stride: int = 1) -> bytes:
    shape = b"(" + number(size) + b"t"
    strides = b"(" + number(stride) + b"t"
    hooks = call("collections.OrderedDict")
    return call("torch._utils._rebuild_tensor_v2", storage, number(offset), shape, strides, b"\x89", hooks)


def large_storage(name: str = "FloatStorage") -> bytes:
    return STORAGE.replace(number(1), number(10**9)).replace(b"FloatStorage", name.encode())


FOUR = 4 * 10**9
PICKLES = {
    "bytearray": call("builtins.bytearray", number(6 * 10**9)),
    "bytearray of Python 2": call("__builtin__.bytearray", number(6 * 10**9)),
    "FloatTensor": call("torch.FloatTensor", number(FOUR)),
    "Tensor": call("torch.Tensor", number(FOUR)),
    "UntypedStorage": call("torch.storage.UntypedStorage", number(FOUR)),
    "enlarged storage": tensor(10**9),
    "far offset": tensor(1, offset=10**9),
    "long stride": tensor(2, stride=10**9),
    "large storage": tensor(1, large_storage()),
    "set_ of a tensor": tensor(1) + b"(" + STORAGE + b"K\x00" + b"(" + number(10**9) + b"t(K\x01ttb",
    "parameter": b"ctorch.nn.parameter\nParameter\n(" + number(FOUR) + b"t\x81",
    "quantised": call(
        "torch._utils._rebuild_qtensor", STORAGE, b"K\x00", b"(" + number(FOUR) + b"t", b"(K\x01t",
        b"(ctorch\nper_tensor_affine\nG" + struct.pack(">d", 1.0) + b"K\x00t", b"\x89",
        call("collections.OrderedDict"),
    ),
    "memo": b"N" + b"r" + struct.pack("<I", 2**31 - 1),
    "codec": call("_codecs.encode", text("x" * 99), text("idna")),
    "deep key": b"}" + b")" + b"\x85" * 300_000 + b"Ns",
}  # fmt: skip


def zipped(content: bytes, parts: dict[str, bytes] | None = None) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, part in {
            "data.pkl": content,
            "version": b"3\n",
            "data/0": bytes(4),
            **(parts or {}),
        }.items():
            archive.writestr(f"archive/{name}", part)
    return file.getvalue()


def legacy(content: bytes) -> bytes:
    file = io.BytesIO()
    torch.save({}, file, _use_new_zipfile_serialization=False)
    return file.getvalue().replace(b"\x80\x02}q\x00.\x80\x02]", b"\x80\x02" + content + b".\x80\x02]", 1)


FORMS = {"zip": lambda content: zipped(b"\x80\x02" + content + b"."), "legacy": legacy,
         "plain pickle": lambda content: b"\x80\x02" + content + b"."}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_that_requests_gigabytes(tmp_path: Path, form: str, name: str):
    path = tmp_path / "x.pt"
    path.write_bytes(FORMS[form](PICKLES[name]))
    outcome, grown = measured(read_pickle, path)
    if name == "memo" and form != "plain pickle":
        assert outcome == "returned None"  # and no table of 2^31 places
    else:
        assert outcome.startswith(f"UserError: {path}: ")
    assert "allocate" not in outcome  # refused, and not merely out of memory
    assert grown < (100 if name == "deep key" else 50) * MB
    assert "\n" not in outcome


def test_valid_files_are_read(tmp_path: Path):
    model = torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
    whole = torch.arange(10.0)
    half_precision = torch.ones(3, dtype=torch.float8_e4m3fn)
    content = {
        "net": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
        "views": [whole[2:5], whole[::3], whole.view(2, 5).t(), whole[:0], torch.tensor(3),
                  whole.expand(4, 10)],
        "parameter": torch.nn.Parameter(torch.ones(2)), "float8": half_precision, "bytes": b"\xff\x00",
        "bytearray": bytearray(b"ab"), "set": {1, 2}, "size": torch.Size([1, 2]), "dtype": torch.float16,
        "device": torch.device("cpu"), "complex": 1j, "large": 2**60, "none": None,
        "meta": torch.ones(3, device="meta"),
        "sparse": torch.eye(3).to_sparse(), "uint16": torch.ones(2, dtype=torch.uint16), ("a", 1): 1.5,
    }  # fmt: skip
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        if options:
            content.pop("float8"), content.pop("uint16")
        torch.save(content, tmp_path / "x.pt", **options)
        found = read_pickle(tmp_path / "x.pt")
        expected = torch.load(tmp_path / "x.pt", map_location="cpu", weights_only=True)
        assert str(found) == str(expected)
        assert all(torch.equal(a, b) for a, b in zip(found["views"], content["views"]))


@pytest.mark.parametrize("parts", [
    {"DATA.pkl": b"\x80\x02N."}, {"data/0\0": b""}, {"data.pkl ": b""},
])  # fmt: skip
def test_parts_that_two_readers_may_confuse(tmp_path: Path, parts: dict[str, bytes]):
    path = tmp_path / "x.pt"
    path.write_bytes(zipped(b"\x80\x02N.", parts))
    if "data.pkl " in parts:
        assert read_pickle(path) is None
        return
    with pytest.raises(UserError, match="two of its parts have the same name"):
        read_pickle(path)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_pickles_of_known_pieces(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    """Any order of what a pickle of tensors is made of, with numbers of any size: small, or one line."""
    pieces = [
        STORAGE, large_storage(), tensor(1), b"(", b"t", b"R", b"b", b"s", b"u", b"}", b"]", b"a", b"e", b")",
        b"\x81", b"K\x01", number(10**9), number(-1), number(2**62), b"N", b"q\x01", b"h\x01", b"\x85", b"Q",
        b"ctorch\nFloatStorage\n", b"ctorch\nSize\n", b"ccollections\nOrderedDict\n", text("0"),
        b"ctorch._utils\n_rebuild_tensor_v2\n", b"cbuiltins\nbytearray\n", b"cbuiltins\nset\n",
    ]  # fmt: skip
    chosen = data.draw(st.lists(st.sampled_from(pieces), max_size=12))
    path = tmp_path_factory.mktemp("x") / "x.pt"
    path.write_bytes(FORMS["zip"](b"".join(chosen)))
    assert "allocate" not in outcome(path)


def outcome(path: Path) -> str:
    try:
        return str(read_pickle(path))
    except UserError as error:
        return str(error)


def test_headers_of_safetensors(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    header = json.dumps({"__metadata__": {"x": "y" * (9 << 20)}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match="a header of 9,"):
        open_weights(path)
    path.write_bytes(
        save({"w": torch.ones(1)}, {"class_names": json.dumps([f"name {n}" for n in range(30_000)])})
    )
    assert len(open_weights(path).class_names) == 30_000


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "device", "socket"])
def test_only_regular_files(tmp_path: Path, name: str, kind: str):
    import socket

    path = tmp_path / name
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(path))
    outcome, grown = measured(open_weights, path, seconds=30)
    assert outcome == f"UnreadableFileError: {path}: cannot be read: is not a regular file"
    assert grown < 50 * MB


@pytest.mark.parametrize("name", ["best.pt", "best.pt.sha256"])
def test_a_run_whose_checkpoint_is_a_fifo(tmp_path: Path, name: str):
    (tmp_path / "checkpoints").mkdir()
    for file in ("best.pt", "best.pt.sha256"):
        (tmp_path / "checkpoints" / file).write_text("0" * 64 + "  best.pt\n")
    (tmp_path / "checkpoints" / name).unlink()
    os.mkfifo(tmp_path / "checkpoints" / name)
    outcome, _ = measured(open_weights, tmp_path, seconds=30)
    assert outcome.startswith("UnreadableFileError") or "holds no checkpoints/best.pt" in outcome
