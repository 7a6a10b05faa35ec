"""Truncated and corrupted weights files: weights, or one line.

Published files and safetensors have no checksum: where a bit flips inside of a weight, that is
the weight, as long as it is finite. A run's checkpoints have one (tests/training).
"""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from helpers.mutations import EXAMPLES, bounded
from safetensors.torch import save

from vil.checkpoints.open import open_weights
from vil.errors import UserError

NET = {
    "module.layer1.0.proj.weight": torch.randn(4, 3, 2, 2),
    "norm.weight": torch.ones(3),
    "n": torch.arange(5),
}


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def run(**changes):
    config = {"model": {"name": "vil_tiny"}, "data": {"source": "digits"}}
    return {"model": NET, "ema": None, "best": {}, "class_names": ["a"], "config": config, **changes}


KINDS = {
    "zip": saved({"net": NET, "arch": "x", "epoch": 3, "best_acc": 71.2}),
    "pickle": saved({"net": NET}, _use_new_zipfile_serialization=False),
    "run": saved(run()),
    "safetensors": save(NET, {"format": "pt", "model": '{"name": "vil_tiny"}', "class_names": '["a"]'}),
}


def outcome(path, content):
    """Return the weights, or the error line."""
    path.write_bytes(content)
    with bounded():
        try:
            weights = open_weights(path).state_dict
        except UserError as error:
            weights, line = None, str(error)
    if weights is None:
        assert line.startswith(f"{path}: ")
        assert line.isprintable()
        return line
    assert all(value.isfinite().all() for value in weights.values())
    return weights


@pytest.mark.parametrize("kind", KINDS)
def test_cut_at_any_length(tmp_path, kind):
    whole, random = KINDS[kind], np.random.default_rng(1)
    assert isinstance(outcome(tmp_path / "x", whole), dict)
    for length in random.integers(len(whole), size=EXAMPLES or 200):
        left = outcome(tmp_path / "x", whole[:length])
        assert isinstance(left, str), f"{length} of {len(whole)} bytes were taken for weights"


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bits(tmp_path, kind):
    random = np.random.default_rng(2)
    for _ in range(EXAMPLES or 200):
        content = bytearray(KINDS[kind])
        for place in random.integers(len(content), size=random.integers(1, 4)):
            content[place] ^= 1 << random.integers(8)
        outcome(tmp_path / "x", content)


def inflated(name, content):
    """A published checkpoint of which one part is something else, compressed."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(KINDS["zip"])) as old,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for part in old.namelist():
            new.writestr(part, content if part.endswith(name) else old.read(part))
    return file.getvalue()


@pytest.mark.parametrize("name", ["data.pkl", "version", "data/0"])
def test_a_small_file_does_not_become_a_large_one(tmp_path, name):
    assert "compressed, or larger" in outcome(tmp_path / "x", inflated(name, bytes(50_000_000)))


def test_a_part_that_is_listed_many_times(tmp_path):
    """A directory of ten entries that all mean the same bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", bytes(10_000))
        archive.filelist = [*archive.filelist] * 10
    assert "compressed, or larger" in outcome(tmp_path / "x", file.getvalue())


def repeated():
    """Return nested lists: a few hundred bytes that expand to 2^40 values."""
    value = ["a"]
    for _ in range(40):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    "changes",
    [{"class_names": repeated()}, {"class_names": ["a", repeated()]}, {"class_names": "abc"},
     {"config": {"model": {"name": repeated()}, "data": {}}}, {"config": {"model": repeated(), "data": {}}},
     {"config": {"model": {"timm_options": {"a": repeated()}}, "data": {}}},
     {"config": {"model": {"timm_options": {"a": {"class_path": "antigravity.geohash"}}}, "data": {}}},
     {"config": {"model": {"stages": ["antigravity.geohash"]}, "data": {}}},
     {"config": {"model": {"window": 16**5000}, "data": {}}}],
)  # fmt: skip
def test_plain_values_that_could_do_harm(tmp_path, changes):
    assert isinstance(outcome(tmp_path / "x", saved(run(**changes))), str)


def test_claims_of_gigabytes(tmp_path):
    whole = KINDS["pickle"]
    shape = b"K\x03\x85"  # of norm.weight, (3,), in the pickle's own words
    assert whole.count(shape) == 1
    for number in (10**4, 10**9, 2**31 - 1):
        claimed = b"J" + number.to_bytes(4, "little") + b"\x85"
        assert isinstance(outcome(tmp_path / "x", whole.replace(shape, claimed)), str)
    content = b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + (10**13).to_bytes(6, "little") + b"\x85R."
    assert isinstance(outcome(tmp_path / "x", content), str)


def test_nothing_is_imported(tmp_path, monkeypatch):
    """A module that a file names is not even searched."""
    (tmp_path / "strangers_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for changes in (
        {"config": {"model": {"timm_options": {"a": {"class_path": "strangers_module.X"}}}, "data": {}}},
        {"config": {"model": {"stages": ["strangers_module.X"]}, "data": {}}},
    ):
        assert isinstance(outcome(tmp_path / "x", saved(run(**changes))), str)
    for content in (b"cstrangers_module\nX\n.", b"\x80\x04\x8c\x10strangers_module\x8c\x01X\x93."):
        with pytest.raises(SystemExit):
            pickle.loads(content)
        assert isinstance(outcome(tmp_path / "x", b"\x80\x02" + content), str)
