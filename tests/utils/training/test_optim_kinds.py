"""SGD, AdamW and LAMB: their groups, resumption, and losses that are not finite."""

import contextlib
import math

import pytest
import torch
from helpers.kill_driver import same
from helpers.small_epochs import begin_state, train
from helpers.tiny_runs import run_of
from torch import nn

from main import RECIPE
from utils.config.classification import OPTIMIZERS
from utils.data.loader import Batch
from utils.runs import checkpoint
from utils.system.errors import EXIT_NON_FINITE, UserError
from utils.training.optim import make_optimizer
from utils.training.state import NonFiniteGuard, TrainingState


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_spares_what_it_is_told_to(kind):
    network = small_network()
    found = make_optimizer(kind, network, 0.01, 0.8, 0.05, norm_decay=False)
    assert type(found).__name__.lower() == kind
    decayed, spared = found.param_groups
    assert [p.shape for p in decayed["params"]] == [(3, 4)]
    assert len(spared["params"]) == 3
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    assert all(group["lr"] == 0.01 for group in found.param_groups)
    whole = make_optimizer(kind, network, 0.01, 0.8, 0.05)
    assert [len(group["params"]) for group in whole.param_groups] == [4]
    assert whole.param_groups[0]["weight_decay"] == 0.05


def test_lamb_steps_by_the_weight_s_norm():
    """You et al. 2020, algorithm 2: a step of a decayed weight w is lr · |w| long."""
    network = small_network()
    before = network[0].weight.detach().clone()
    optimizer = make_optimizer("lamb", network, 0.02, 0.9, 1e-9)
    network(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    moved = (network[0].weight - before).norm() / before.norm()
    assert moved.item() == pytest.approx(0.02, rel=1e-5)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("fp16", [False, True])
def test_every_optimizer_is_taken_up_bit_for_bit(kind, fp16, tmp_path):
    """Through a file, with the loss scaled and one step left out for its overflow."""

    def begin() -> TrainingState:
        recipe = RECIPE.override(lr=0.01, weight_decay=1e-2, norm_decay=False, optimizer=kind)
        return begin_state(small_network(), recipe, "fp16" if fp16 else "off")

    def go_on(state: TrainingState, first: int, last: int) -> None:
        for step in range(first, last):
            torch.manual_seed(step)
            factor = math.inf if fp16 and step in (0, 2) else 1.0
            state.optimizer.zero_grad()
            loss = factor * state.network(torch.randn(8, 4)).square().mean()
            state.scaler.scale(loss).backward()
            state.scaler.step(state.optimizer)
            state.scaler.update()
            state.finish_step([])

    through, first = begin(), begin()
    go_on(through, 0, 6)
    go_on(first, 0, 3)
    checkpoint.save(tmp_path / "a.pth", first.snapshot())
    saved, second = checkpoint.load(tmp_path / "a.pth"), begin()
    second.network.load_state_dict(saved["state_dict"])
    second.restore(run_of(saved))
    assert same(second.snapshot()["optimizer"], first.snapshot()["optimizer"])
    go_on(second, 3, 6)
    assert same(second.snapshot(), through.snapshot())


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("clip_grad", [0.0, 1.0])
def test_a_loss_that_is_not_finite_reaches_no_weight(kind, clip_grad):
    recipe = RECIPE.override(lr=0.01, weight_decay=1e-2, optimizer=kind, clip_grad=clip_grad)
    good = Batch(torch.randn(6, 4), torch.arange(6) % 3, ())
    bad = Batch(torch.full((6, 4), math.nan), torch.arange(6) % 3, ())
    states = [begin_state(small_network(), recipe) for _ in range(2)]
    for state in states:
        train(state.network, [good], state=state, clip_grad=clip_grad)
    with pytest.raises(UserError, match="of step 2 is not a finite number") as caught:
        train(states[0].network, [bad, good], state=states[0], clip_grad=clip_grad)
    assert caught.value.exit_code == EXIT_NON_FINITE
    for parameter, clean in zip(*(state.network.parameters() for state in states), strict=True):
        assert torch.equal(parameter, clean)
        assert parameter.isfinite().all()


@pytest.mark.parametrize(("kind", "waits"), [("sgd", False), ("adamw", False), ("lamb", True)])
def test_on_a_gpu_an_optimizer_without_a_fused_kernel_waits(kind, waits):
    """The others get the flag, by which their kernels skip the step on the device."""
    optimizer = make_optimizer(kind, small_network(), 0.01, 0.9, 0.0)
    guard = NonFiniteGuard(torch.device("cpu"))
    guard.wait = False  # as on a GPU
    with pytest.raises(UserError) if waits else contextlib.nullcontext():
        guard.before_update(torch.tensor(math.nan), 0, optimizer)
    assert getattr(optimizer, "found_inf", 0) == (not waits)
