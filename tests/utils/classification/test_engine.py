"""One epoch and one evaluation, on networks small enough to follow by hand."""

import math

import pytest
import torch
from helpers.small_epochs import CPU, NO_SCALER, PLAIN, batches, network, sgd, train
from torch import nn

from utils.classification.engine import StepRule, evaluate, train_epoch
from utils.classification.metrics import ClassificationMeter, cross_entropy
from utils.system.errors import EXIT_NON_FINITE, UserError
from utils.training.finite_guard import NonFiniteGuard


def test_an_epoch_equals_the_loop_written_out():
    given, net, other = batches(), network(), network()
    rates = [0.1, 0.2, 0.05, 0.3]
    meter, passed = train(net, given, first_step=10, lr_at=lambda step: rates[step - 10])
    assert passed == given

    optimizer, losses = sgd(other), []
    other.train()
    for batch, rate in zip(given, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        loss = nn.functional.cross_entropy(other(batch.images), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert meter.means(meter.total())["loss"] == pytest.approx(sum(losses) / 4, rel=1e-6)


def test_it_rests_after_each_step():
    net = network()
    before = [p.detach().clone() for p in net.parameters()]
    steps = train_epoch(
        net,
        batches(),
        sgd(net),
        NO_SCALER,
        ClassificationMeter(CPU),
        NonFiniteGuard(CPU),
        StepRule(lambda step: 0.1, 0, PLAIN),
        first_step=0,
    )
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    next(steps)
    after = [p.detach().clone() for p in net.parameters()]
    assert not torch.equal(before[0], after[0])
    assert all(torch.equal(a, b) for a, b in zip(after, net.parameters(), strict=True))


def test_dropout_is_a_function_of_the_step():
    """Two steps at once, or one after the other with anything drawn in between: the same."""
    given = batches(2)
    through, parts = network(0.5), network(0.5)
    optimizer = sgd(parts)
    train(through, given)
    train(parts, given[:1], optimizer=optimizer)
    torch.manual_seed(1234)
    torch.rand(100)
    train(parts, given[1:], first_step=1, optimizer=optimizer)
    assert torch.equal(through[0].weight, parts[0].weight)
    other_step, other_seed = network(0.5), network(0.5)
    train(other_step, given, first_step=5)
    train(other_seed, given, seed=8)
    assert not torch.equal(through[0].weight, other_step[0].weight)
    assert not torch.equal(through[0].weight, other_seed[0].weight)


class Ruined(nn.Module):
    """Gives NaN in its n-th forward pass."""

    def __init__(self, at):
        super().__init__()
        self.inner, self.at, self.count = network(), at, 0

    def forward(self, x):
        self.count += 1
        return self.inner(x) * (math.nan if self.count == self.at else 1.0)


def test_a_loss_that_is_not_finite_never_reaches_the_weights():
    net, clean = Ruined(at=3), network()
    train(clean, batches()[:2])
    optimizer = sgd(net)
    with pytest.raises(UserError, match="the loss of step 13 is not a finite number") as caught:
        train(net, batches(), first_step=10, optimizer=optimizer)
    assert caught.value.exit_code == EXIT_NON_FINITE
    for a, b in zip(net.inner.parameters(), clean.parameters(), strict=True):
        assert torch.equal(a, b)


def test_where_asking_would_wait_the_optimizer_skips_by_itself():
    """The road of a GPU, with the CPU's fused optimizer: the update is left out on the device."""
    net, clean = Ruined(at=3), network()
    train(clean, batches()[:2], optimizer=sgd(clean, fused=True))
    guard = NonFiniteGuard(CPU)
    guard.wait = False
    train(net, batches()[:3], first_step=10, guard=guard, optimizer=sgd(net, fused=True))
    for a, b in zip(net.inner.parameters(), clean.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(UserError, match="step 13"):
        guard.check()


def test_the_first_bad_step_is_the_one_named():
    guard = NonFiniteGuard(CPU)
    guard.wait = False
    optimizer = sgd(network(), fused=True)
    for step, value in enumerate([1.0, math.inf, 2.0, math.nan]):
        guard.before_update(torch.tensor(value), step, optimizer, "gradient norm")
        assert float(optimizer.found_inf) == (0.0 if math.isfinite(value) else 1.0)
    with pytest.raises(UserError, match="the gradient norm of step 2"):
        guard.check()


def test_evaluation_counts_every_image_and_changes_nothing():
    net, given = network(0.5), [*batches(3), *batches(1, size=2)]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    figures = evaluate(net, given, CPU, PLAIN)
    net.eval()
    images = torch.cat([b.images for b in given])
    targets = torch.cat([b.targets for b in given])
    with torch.no_grad():
        logits = net(images)
    assert figures["images"] == 20
    assert figures["loss"] == pytest.approx(cross_entropy(logits, targets).item(), rel=1e-6)
    assert figures["top1"] == pytest.approx(5 * (logits.argmax(1) == targets).sum().item())
    assert figures["top5"] == 100
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_evaluation_leaves_when_asked_to_stop():
    seen = []

    def stop():
        seen.append(1)
        return len(seen) > 2

    assert evaluate(network(), batches(), CPU, PLAIN, stop) is None
    assert len(seen) == 3


def test_loss_and_forward_run_in_the_given_context():
    dtypes = []

    class Notes(nn.Module):
        def forward(self, x):
            out = x @ torch.ones(5, 3)
            dtypes.append(out.dtype)
            return out

    def autocast():
        return torch.autocast("cpu", dtype=torch.bfloat16)

    evaluate(Notes(), batches(1), CPU, autocast)
    assert dtypes == [torch.bfloat16]
