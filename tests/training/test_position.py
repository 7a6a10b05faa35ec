from dataclasses import replace

from vil.runtime.epoch_steps import EpochSteps
from vil.training.position import RunPosition


def test_an_epoch_is_trained_then_finished():
    position = RunPosition(epoch_steps=EpochSteps.constant(2), last_step=5)
    states = []
    while not position.is_finished:
        states.append((position.step, position.epoch, position.epoch_number, position.is_epoch_trained))
        if position.is_epoch_trained:
            position = position.after_epoch({"top1": 50.0, "epoch": 1})
        else:
            position = position.after_step()
    assert states == [
        (0, 0, 0, False),
        (1, 0, 1, False),
        (2, 1, 1, True),
        (2, 1, 1, False),
        (3, 1, 2, False),
        (4, 2, 2, True),
        (4, 2, 2, False),
        (5, 2, 3, True),
    ]
    assert position.is_evaluated
    assert not position.needs_final_evaluation


def test_a_run_cut_short_before_any_evaluation_needs_one():
    position = RunPosition(epoch_steps=EpochSteps.constant(2), last_step=2, step=2, finished_step=2)
    assert position.needs_final_evaluation
    assert not position.is_evaluated  # its record is removed from the log, and written again
    assert position.after_epoch({"top1": 50.0, "epoch": 1}).is_evaluated


def test_an_interrupted_evaluation_is_repeated():
    position = RunPosition(epoch_steps=EpochSteps.constant(2), last_step=4, step=2, best=None)
    assert position.is_epoch_trained
    assert not position.is_evaluated


def test_the_best_evaluation_is_kept():
    position = RunPosition(
        epoch_steps=EpochSteps.constant(2), last_step=4, step=2, best={"top1": 50.0, "epoch": 1}
    )
    assert position.after_epoch().best == {"top1": 50.0, "epoch": 1}
    assert position.after_epoch({"top1": 60.0, "epoch": 1}).best["top1"] == 60.0


def test_a_run_stops_after_evaluations_without_improvement():
    best = {"top1": 50.0, "epoch": 4}
    options = {"epoch_steps": EpochSteps.constant(3), "last_step": 300, "best": best, "eval_every": 2}
    for patience, last_epoch in ((1, 6), (3, 10)):
        position = RunPosition(step=12, finished_step=12, patience=patience, **options)
        for epoch in range(5, last_epoch + 1):
            assert not position.is_stopped_early
            position = replace(position, step=3 * epoch).after_epoch()
        assert position.is_stopped_early
        assert position.is_finished
    unlimited = RunPosition(step=290, finished_step=290, evaluations_since_best=90, **options)
    assert not unlimited.is_finished


def test_an_evaluation_within_an_interval_does_not_count():
    best = {"top1": 50.0, "epoch": 2}
    position = RunPosition(
        EpochSteps.constant(3), 7, step=7, finished_step=6, best=best, evaluations_since_best=1, eval_every=2
    )
    assert position.after_epoch(best).evaluations_since_best == 1
    assert position.after_epoch({"top1": 60.0, "epoch": 3}).evaluations_since_best == 0


def test_epochs_of_different_lengths():
    steps = EpochSteps(((0, 4), (1, 2)))
    position, finished = RunPosition(steps, last_step=8, eval_every=2), []
    while not position.is_finished:
        if position.is_epoch_trained:
            is_due = position.epoch_step == 0 and position.epoch % 2 == 0
            finished.append((position.step, position.epoch_number, is_due))
            position = position.after_epoch({"top1": 50.0, "epoch": 1})
        else:
            position = position.after_step()
    assert finished == [(4, 1, False), (6, 2, True), (8, 3, False)]
    assert position.evaluations_since_best == 1
