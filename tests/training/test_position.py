from vil.training.position import RunPosition


def test_an_epoch_is_trained_then_finished():
    position = RunPosition(steps_per_epoch=2, last_step=5)
    states = []
    while not position.is_finished:
        states.append((position.step, position.epoch, position.epoch_number, position.is_epoch_trained))
        if position.is_epoch_trained:
            position = position.after_epoch({"top1": 50.0})
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
    position = RunPosition(steps_per_epoch=2, last_step=2, step=2, finished_step=2)
    assert position.needs_final_evaluation
    assert not position.is_evaluated  # its record is removed from the log, and written again
    assert position.after_epoch({"top1": 50.0}).is_evaluated


def test_an_interrupted_evaluation_is_repeated():
    position = RunPosition(steps_per_epoch=2, last_step=4, step=2, best=None)
    assert position.is_epoch_trained
    assert not position.is_evaluated


def test_the_best_evaluation_is_kept():
    position = RunPosition(steps_per_epoch=2, last_step=4, step=2, best={"top1": 50.0})
    assert position.after_epoch().best == {"top1": 50.0}
    assert position.after_epoch({"top1": 60.0}).best == {"top1": 60.0}


def test_a_run_stops_after_evaluations_without_improvement():
    best = {"top1": 50.0, "epoch": 4}
    options = {"steps_per_epoch": 3, "last_step": 300, "best": best, "eval_every": 2}
    for patience, epoch in ((1, 6), (3, 10)):
        for finished, is_stopped in ((epoch, True), (epoch - 1, False)):
            step = 3 * finished
            position = RunPosition(step=step, finished_step=step, patience=patience, **options)
            assert position.is_stopped_early == position.is_finished == is_stopped
    unlimited = RunPosition(step=290, finished_step=290, **options)
    assert not unlimited.is_finished
