"""One epoch and one evaluation, on networks small enough to follow by hand."""

import contextlib
import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from utils.classification.engine import StepRule, evaluate, train_epoch
from utils.classification.metrics import ClassificationMeter, cross_entropy
from utils.classification.mixing import make_mix
from utils.data.loading import Batch
from utils.system.errors import EXIT_NON_FINITE, UserError
from utils.training.finite_guard import NonFiniteGuard

CPU = torch.device("cpu")
PLAIN = contextlib.nullcontext


def batches(count=4, size=6, classes=3):
    torch.manual_seed(9)
    return [Batch(torch.randn(size, 5), torch.randint(classes, (size,)), ()) for _ in range(count)]


def network(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.Linear(8, 3))


def sgd(net, **kwargs):
    return torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-3, **kwargs)


NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def train(
    net,
    given,
    first_step=0,
    lr_at=lambda step: 0.1,
    guard=None,
    optimizer=None,
    seed=7,
    scaler=NO_SCALER,
    **rule,
):
    meter = ClassificationMeter(CPU)
    passed = list(
        train_epoch(
            net,
            given,
            optimizer or sgd(net),
            scaler,
            meter,
            guard or NonFiniteGuard(CPU),
            StepRule(lr_at, seed, PLAIN, **rule),
            first_step,
        )
    )
    return meter, passed


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


def plain_network():
    """Without BatchNorm, which sees the parts of a batch instead of the whole."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_a_batch_in_parts_gives_the_step_of_the_whole(parts):
    whole, accumulated = plain_network(), plain_network()
    meters = [train(whole, batches())[0], train(accumulated, batches(), accumulate=parts)[0]]
    for a, b in zip(whole.parameters(), accumulated.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    one, other = (meter.means(meter.total()) for meter in meters)
    assert one == pytest.approx(other, rel=1e-6)
    assert meters[0].sums[3] == meters[1].sums[3] == 24


def test_parts_of_a_mixed_batch_are_mixed_as_the_whole():
    """An image's partner may lie in another part."""
    whole, accumulated = plain_network(), plain_network()
    mix = make_mix(0.5, 0, 3)
    given = [Batch(b.images[:, :, None, None], b.targets, ()) for b in batches()]
    train(nn.Sequential(nn.Flatten(), whole), given, mix=mix)
    train(nn.Sequential(nn.Flatten(), accumulated), given, mix=mix, accumulate=3)
    for a, b in zip(whole.parameters(), accumulated.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    unmixed = plain_network()
    train(unmixed, batches())
    assert not torch.allclose(unmixed[0].weight, whole[0].weight)


def test_ranks_add_up_their_gradients_once_a_step():
    """DistributedDataParallel reduces in the last part's backward alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped, net = nn.parallel.DistributedDataParallel(plain_network()), plain_network()
        reduced = []

        def note(_, bucket):
            reduced.append(bucket.buffer().clone())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        wrapped.register_comm_hook(None, note)
        train(wrapped, batches(), accumulate=3)
        assert len(reduced) == 4
    finally:
        dist.destroy_process_group()
    train(net, batches())
    for a, b in zip(net.parameters(), wrapped.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fp16", [False, True])
def test_the_gradient_is_clipped_by_its_norm_over_all_parameters(fp16):
    net, other = plain_network(), plain_network()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=fp16)
    train(net, batches(1), optimizer=optimizer, scaler=scaler, clip_grad=0.01)
    batch = batches(1)[0]
    nn.functional.cross_entropy(other(batch.images), batch.targets).backward()
    gradient = torch.cat([p.grad.flatten() for p in other.parameters()])
    assert gradient.norm() > 0.01
    moved = torch.cat(
        [(a - b).flatten() for a, b in zip(other.parameters(), net.parameters(), strict=True)]
    )
    torch.testing.assert_close(moved, 0.1 * gradient * 0.01 / gradient.norm(), rtol=1e-3, atol=1e-7)

    free = plain_network()
    train(free, batches(1), optimizer=torch.optim.SGD(free.parameters(), lr=1.0), clip_grad=1e6)
    for a, b in zip(free.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b - 0.1 * b.grad)


class Steep(torch.autograd.Function):
    """Forward 1, gradient infinite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.inf


def test_clipping_lets_no_infinite_gradient_through():
    net = plain_network()
    before = [p.detach().clone() for p in net.parameters()]
    steep = nn.Sequential(net)
    steep.forward = lambda x: Steep.apply(net(x))
    with pytest.raises(UserError, match="the loss or gradient of step 1 is not a finite number"):
        train(steep, batches(1), clip_grad=1.0)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))


def test_of_mixed_images_the_class_with_the_larger_share_counts():
    def halves(images, targets):
        soft = nn.functional.one_hot(targets, 3) * 0.75
        return images, soft + nn.functional.one_hot(targets.roll(1), 3) * 0.25

    net, given = plain_network(), batches(1)
    with torch.no_grad():
        logits = net(given[0].images)
    meter, _ = train(net, given, mix=halves, loss_fn=partial(cross_entropy, label_smoothing=0.1))
    soft = 0.9 * halves(None, given[0].targets)[1] + 0.1 / 3
    figures = meter.means(meter.total())
    assert figures["loss"] == pytest.approx(
        -(soft * logits.log_softmax(1)).sum(1).mean().item(), rel=1e-6
    )
    right = (logits.argmax(1) == given[0].targets).sum().item()
    assert figures["top1"] == pytest.approx(100 * right / 6)
