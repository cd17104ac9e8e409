"""A run's state, written down and taken up again."""

import math

import pytest
import torch
from helpers.small_epochs import begin_state
from helpers.tiny_runs import run_of
from torch import nn

from main import RECIPE
from utils.runs import checkpoint
from utils.system import distributed
from utils.system.distributed import Context
from utils.system.errors import EXIT_NON_FINITE, UserError
from utils.training.classification import (
    ClassificationMeter,
    epochs_since_best,
    is_better,
    validation_columns,
)
from utils.training.state import NonFiniteGuard, TrainingState, WeightAverage

CPU = torch.device("cpu")


def fresh(momentum=0.9, weight_decay=1e-4, rank=0, fp16=False, ema=0.0):
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.1, momentum=momentum, weight_decay=weight_decay
    )
    scaler = torch.amp.GradScaler("cpu", enabled=fp16)
    return TrainingState(
        network,
        optimizer,
        scaler,
        ClassificationMeter(CPU, 2),
        NonFiniteGuard(CPU),
        rank,
        average=WeightAverage(network, ema) if ema else None,
    )


def train(state, steps, first=0):
    for step in range(first, first + steps):
        torch.manual_seed(step)
        logits = state.network(torch.randn(4, 3))
        loss = logits.square().mean()
        state.optimizer.zero_grad()
        loss.backward()
        state.optimizer.step()
        state.meter.update(loss, logits, torch.tensor([0, 1, 0, 1]))
        state.finish_step([])


def val(loss=1.0, top1=50.0):
    return {"loss": loss, "top1": top1, "top5": 100.0, "images": 4}


def finish(state, *args, **kwargs):
    row = state.row(0.1, validation_columns(val(*args, **kwargs)))
    improved = is_better(row, state.best, "top1")
    state.finish_epoch(row, improved)
    return improved


def taken_up(path, state, **kwargs):
    """`state` through a file into a new object, as a new process would take it up."""
    checkpoint.save(path, state.snapshot())
    saved = checkpoint.load(path)
    other = fresh(**kwargs)
    other.network.load_state_dict(saved["state_dict"])
    other.restore(run_of(saved))
    return other


def bits(state):
    """Everything in a snapshot, comparable with ==, tensors by their bytes."""

    def plain(value):
        if isinstance(value, torch.Tensor):
            return (value.dtype, tuple(value.shape), value.contiguous().numpy().tobytes())
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list) else value

    return plain(state.snapshot())


def test_the_learning_rate_of_the_last_step_comes_back(tmp_path):
    """A run that is taken up after an epoch's last step saves it again without a step between."""
    state = fresh()
    train(state, 2)
    assert finish(state)  # so there is a best row, too
    train(state, 2)
    state.optimizer.param_groups[0]["lr"] = 0.0123
    assert bits(taken_up(tmp_path / "last.pth", state)) == bits(state)


def test_interrupted_in_an_epoch_equals_uninterrupted(tmp_path):
    through, first = fresh(fp16=True), fresh(fp16=True)
    train(through, 5)
    train(first, 2)
    second = taken_up(tmp_path / "a", first, fp16=True)
    train(second, 3, first=2)
    for state in (through, second):
        state.broken.append(7)
        assert finish(state)
    assert bits(second) == bits(through)
    assert second.epoch == 1
    assert second.best == through.history[0]


def test_momentum_is_taken_up_in_this_run_s_memory_format():
    """Fused kernels walk memory: with the saved strides it would be that of other weights."""

    def begin(memory_format):
        torch.manual_seed(0)
        network = nn.Conv2d(3, 4, 3).to(memory_format=memory_format)
        recipe = RECIPE.override(weight_decay=0.0)
        return begin_state(network, recipe)

    def step(state):
        state.optimizer.zero_grad()
        state.network(torch.arange(300.0).view(1, 3, 10, 10) / 300).square().mean().backward()
        state.optimizer.step()
        state.finish_step([])

    first, through = begin(torch.channels_last), begin(torch.contiguous_format)
    for state in (first, first, through, through):
        step(state)
    second = begin(torch.contiguous_format)
    saved = first.snapshot()
    second.network.load_state_dict(saved["state_dict"])
    second.restore(run_of(saved))
    for state in (second, through):
        step(state)
    torch.testing.assert_close(second.network.weight, through.network.weight)


def test_flags_given_anew_win_over_the_saved_optimizer(tmp_path):
    state = fresh(momentum=0.9, weight_decay=1e-4)
    train(state, 1)
    group = taken_up(tmp_path / "a", state, momentum=0.5, weight_decay=0.0).optimizer.param_groups[
        0
    ]
    assert (group["momentum"], group["weight_decay"]) == (0.5, 0.0)


def test_starting_again_at_an_earlier_epoch_leaves_no_row_twice():
    state = fresh()
    for top1 in (10.0, 40.0, 20.0):
        train(state, 1)
        finish(state, top1=top1)
    state.begin(1)
    assert [row["epoch"] for row in state.history] == [0]
    train(state, 1)
    finish(state, top1=30.0)
    assert [row["epoch"] for row in state.history] == [0, 1]
    assert state.best["val_top1"] == 30.0  # 40.0 was of what is now run again


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_never_the_best(loss):
    state = fresh()
    train(state, 1)
    assert not finish(state, loss=loss, top1=99.0)
    assert state.best == {}
    assert finish(state, top1=0.0)  # nothing right, but best so far
    assert not finish(state, top1=0.0)  # a tie keeps the earlier epoch


def test_a_ruined_state_is_never_written():
    state = fresh()
    state.guard.wait = False  # as on a GPU, where the flag is looked at later
    state.optimizer.defaults["fused"] = True
    state.guard.before_update(torch.tensor(math.nan), 3, state.optimizer)
    with pytest.raises(UserError) as caught:
        state.snapshot()
    assert caught.value.exit_code == EXIT_NON_FINITE


@pytest.mark.parametrize("which", ["weight", "bias", "average"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_found_in_any_tensor(which, value):
    state = fresh(ema=0.9)
    state.snapshot()
    network = state.average.module if which == "average" else state.network
    tensor = network.bias if which == "bias" else network.weight
    with torch.no_grad():
        tensor.fill_(1e38)  # large is finite
        state.snapshot()
        tensor.view(-1)[1] = value
    with pytest.raises(UserError, match="after step 0 of epoch 1 the network's weights") as caught:
        state.snapshot()
    assert caught.value.exit_code == EXIT_NON_FINITE


@pytest.mark.parametrize(
    ("ranks", "own"), [(2, [[1, 2, 3, 4], [5, 6, 7, 8]]), (3, [[6, 8, 10, 12], [0] * 4, [0] * 4])]
)
def test_each_rank_goes_on_with_its_own_sums(monkeypatch, ranks, own):
    """Two ranks wrote; as many take up their own rows, another number adds up to the same."""
    state = fresh()
    saved = state.snapshot()
    saved["progress"]["sums"] = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    saved["progress"]["broken"] = [3, 3, 9]
    monkeypatch.setattr(distributed, "ranks", lambda: ranks)
    states = [fresh(rank=rank) for rank in range(ranks)]
    for state in states:
        state.restore(run_of(saved))
    assert [s.meter.sums.tolist() for s in states] == own
    assert [s.broken for s in states] == [[3, 3, 9]] + [[]] * (ranks - 1)


def test_averaged_weights_are_what_a_checkpoint_s_user_gets(tmp_path):
    through, first = fresh(ema=0.9), fresh(ema=0.9)
    train(through, 15)
    train(first, 11)
    saved = first.snapshot()
    assert not torch.equal(saved["state_dict"]["weight"], first.network.weight)
    assert torch.equal(saved["state_dict"]["weight"], first.average.module.weight)
    assert torch.equal(saved["raw_state_dict"]["weight"], first.network.weight)
    assert first.evaluated is first.average.module
    second = taken_up(tmp_path / "a", first, ema=0.9)
    train(second, 4, first=11)
    assert bits(second) == bits(through)


def test_an_average_can_begin_and_end_on_the_way(tmp_path):
    without = fresh()
    train(without, 3)
    begun = taken_up(tmp_path / "a", without, ema=0.9)
    assert torch.equal(begun.average.module.weight, without.network.weight)
    assert begun.average.n_averaged == 0
    train(begun, 3, first=3)
    ended = taken_up(tmp_path / "b", begun)
    assert torch.equal(ended.network.weight, begun.network.weight)
    assert ended.evaluated is ended.network
    assert "raw_state_dict" not in ended.snapshot()


def test_a_state_begins_as_the_recipe_and_the_flags_say():
    recipe = RECIPE.override(ema=0.9, momentum=0.8)
    state = begin_state(nn.Linear(3, 2), recipe, "fp16", Context(CPU, 1, 2))
    assert (state.rank, state.average.decay, state.scaler.is_enabled()) == (1, 0.9, True)
    assert state.optimizer.param_groups[0]["momentum"] == 0.8


def test_epochs_since_the_best_are_counted_from_the_first_of_equal_ones():
    state = fresh()
    assert epochs_since_best(state.history, "top1") == 0
    for loss, top1, since in (
        (math.nan, 90.0, 1),  # no score, so no best
        (1.0, 50.0, 0),
        (1.0, 50.0, 1),
        (math.inf, 99.0, 2),
        (1.0, 60.0, 0),
        (1.0, 55.0, 1),
    ):
        finish(state, loss, top1)
        assert epochs_since_best(state.history, "top1") == since
    state.begin(3)
    assert epochs_since_best(state.history, "top1") == 1


def test_another_figure_can_decide_and_an_epoch_without_evaluation_never_does():
    best = {"val_loss": 1.0, "val_top1": 50.0, "val_recall": 40.0}
    later = {"val_loss": 0.5, "val_top1": 49.0, "val_recall": 40.0}
    assert [is_better(later, best, by) for by in ("top1", "loss", "recall")] == [False, True, False]
    assert is_better({**later, "val_recall": 40.1}, best, "recall")
    assert not is_better({"train_loss": 0.0}, {}, "loss")
    assert not is_better({**later, "val_loss": math.nan}, {}, "recall")
    history = [{}, best, {}, later, {}]
    since = [epochs_since_best(history, by) for by in ("top1", "loss", "recall")]
    assert since == [2, 0, 2]  # up to the last evaluation
    assert epochs_since_best([{}, {}], "top1") == 0
