"""What a detection run leaves: state, columns, curves."""

import torch
from helpers.tiny_runs import run_of
from torch import nn

from utils.data.coco_eval import FIGURES, Summary
from utils.training.detection import (
    LossMeter,
    best_details,
    best_lines,
    best_words,
    epoch_line,
    is_better,
    panels,
    score,
    validation_columns,
)
from utils.training.state import NonFiniteGuard, TrainingState

CPU = torch.device("cpu")


def summaries(ap, masks=True):
    figures = dict.fromkeys(FIGURES, ap) | {"APl": -1.0}
    kinds = ("bbox", "segm") if masks else ("bbox",)
    return {kind: Summary(figures, {"cat": ap}) for kind in kinds}


def new_state():
    network = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainingState(
        network, optimizer, scaler, LossMeter(CPU, ("a", "b")), NonFiniteGuard(CPU), 0
    )


def finish(state, ap, masks=True):
    state.meter.update({"a": torch.tensor(1.0), "b": torch.tensor(2.0)})
    evaluated = summaries(ap, masks)
    row = state.row(0.1, validation_columns(evaluated))
    improved = is_better(row, state.best)
    state.finish_epoch(row, improved, best_details(evaluated))
    return improved


def test_columns_are_percent_and_minus_one_stays():
    columns = validation_columns(summaries(0.25))
    assert len(columns) == 24
    assert (columns["box_AP"], columns["mask_AP50"], columns["box_APl"]) == (25, 25, -1)


def test_the_best_epoch_has_the_highest_ap():
    state = new_state()
    assert finish(state, 0.0)  # nothing found yet is still the best so far
    assert finish(state, 0.2)
    assert not finish(state, 0.1)
    assert state.best["epoch"] == 1
    assert state.epoch == 3
    assert state.history[0]["train_loss"] == 3.0
    epoch, _, box, mask, _, cat = best_lines(state.best)
    assert epoch == "epoch 2, the best:"
    assert box.split()[:2] == ["box", "20.0"]
    assert mask.split()[6] == "-"
    assert cat.split() == ["cat", "20.0", "20.0"]


def test_where_nothing_is_judged_the_last_epoch_is_the_best():
    state = new_state()
    assert all(finish(state, -1.0) for _ in range(3))
    assert state.best["epoch"] == 2
    assert best_words(state.best) == "best box AP - AP50 -  mask AP - AP50 - (epoch 3)"
    assert "val box AP - AP50 -  mask AP - AP50 -  " in epoch_line(state.best, 3, 1, True)
    assert finish(state, 0.0)
    assert not finish(state, -1.0)


def test_an_epoch_without_an_evaluation_is_never_the_best():
    state = new_state()
    state.meter.update({"a": torch.tensor(1.0), "b": torch.tensor(2.0)})
    row = state.row(0.1, validation_columns({}))
    assert not is_better(row, {})
    state.finish_epoch(row, False)
    assert epoch_line(row, 3, 1, False) == "epoch 1/3  train loss 3.0000  1.0 images/s"
    assert finish(state, -1.0)
    assert not is_better({**row, "epoch": 2}, state.best)
    assert [panel.title for panel in panels(state.history[:1])] == [
        "Training losses",
        "Learning rate",
    ]


def test_boxes_decide_where_no_mask_is_judged():
    row = {"epoch": 0, "box_AP": 20.0, "mask_AP": -1.0}
    assert score(row) == 20
    assert score({**row, "mask_AP": 0.0}) == 0


def test_a_state_goes_on_where_it_was_saved():
    state = new_state()
    finish(state, 0.3)
    state.meter.update({"a": torch.tensor(5.0), "b": torch.tensor(1.0)})
    state.step = 1
    saved = state.snapshot()
    again = new_state()
    again.restore(run_of(saved))
    assert (again.epoch, again.step, again.best) == (1, 1, state.best)
    assert torch.equal(again.meter.sums, state.meter.sums)
    assert finish(again, 0.4)
    assert [row["epoch"] for row in again.history] == [0, 1]
