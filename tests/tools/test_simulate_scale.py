"""The simulation of large runs: its checks fail for a wrong order, and its tables have a row per case."""

import sys

import numpy as np
import pytest
from helpers import forked

from data.samplers import MicroBatches
from tools.dev import simulate_scale
from vil.errors import UserError


def rows(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]


def test_order_and_index(capsys):
    simulate_scale.main(["--images", "3001", "--ranks", "1", "2", "8", "--batch-size", "64"])
    order, index = (rows(table) for table in capsys.readouterr().out.split("\n\n"))
    assert [row[:2] for row in order[2:]] == [["3,001", "1"], ["3,001", "2"], ["3,001", "8"]]
    assert {tuple(row[-2:]) for row in order[2:]} == {("yes", "yes")}
    assert index[2][0] == "3,001"


def test_the_simulated_folder_has_an_index(tmp_path):
    simulate_scale.SyntheticFolder(100).open(str(tmp_path))
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def error_with(monkeypatch, draw):
    monkeypatch.setattr(MicroBatches, "draw", draw)
    with pytest.raises(UserError) as error:
        list(simulate_scale.order_rows([640], [1, 2], 64))
    return str(error.value)


def test_an_image_that_occurs_twice_is_an_error(monkeypatch):
    message = error_with(monkeypatch, lambda self, epoch, positions: (positions // 2, positions * 0))
    assert message == "order: 640 images, 1 ranks: not every image once"


def test_batches_that_depend_on_the_number_of_ranks_are_an_error(monkeypatch):
    def draw(self, epoch, positions):
        return (positions + 64 * self.world_size) % self.num_images, positions * 0

    expected = "order: 640 images: batches of 2 ranks and of one differ"
    assert error_with(monkeypatch, draw) == expected


def test_a_resumed_epoch_that_differs_is_an_error(monkeypatch):
    def draw(self, epoch, positions):
        return (positions + self.start) % self.num_images, positions * 0

    assert error_with(monkeypatch, draw) == "order: 640 images: resumed at step 1, the batch differs"


def test_the_synthetic_folder_has_the_images(tmp_path):
    source = simulate_scale.SyntheticFolder(50_001).open(str(tmp_path))
    assert len(source) == 50_001
    assert source.describe(50_000) == "/synthetic/train/n00021840/n00021840_2.JPEG"
    assert set(np.bincount(source.targets).tolist()) == {2, 3}
    assert len(source.class_names) == 21_841
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_start_up(capsys, monkeypatch):
    monkeypatch.setattr(sys, "executable", forked.python())
    monkeypatch.setenv("PYTHON_EXEC", forked.python())
    simulate_scale.main(["--images", "--processes", "2"])
    _, _, (processes, *_) = rows(capsys.readouterr().out)
    assert processes == "2"
