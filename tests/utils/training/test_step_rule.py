"""What a step may add to the plain loop: batches in parts, clipped gradients, mixed images."""

import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
from helpers.small_epochs import CPU, RECIPE, batches, train
from torch import nn

from utils.data.loader import Batch
from utils.system.distributed import Context
from utils.system.errors import UserError
from utils.training.classification import cross_entropy, make_mix, unmixed
from utils.training.optim import StepRule


def plain_network():
    """Without BatchNorm, which sees the parts of a batch instead of the whole."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_a_batch_in_parts_gives_the_step_of_the_whole(parts):
    whole, accumulated = plain_network(), plain_network()
    states = [train(whole, batches())[0], train(accumulated, batches(), accumulate=parts)[0]]
    for a, b in zip(whole.parameters(), accumulated.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    one, other = (state.meter.means() for state in states)
    assert one == pytest.approx(other, rel=1e-6)
    assert states[0].meter.sums[3] == states[1].meter.sums[3] == 24


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


@pytest.mark.parametrize("mixing", [True, False])
def test_each_rank_draws_by_a_seed_of_its_own(mixing):
    """The shares of mixed images, or what dropout sets to 0: the same whenever a rank draws."""
    ends = []
    for rank in (0, 1, 1):
        rule = StepRule.of(RECIPE, 4, 5, "off", Context(CPU, rank, 2))
        net = plain_network()
        given = [Batch(b.images[:, :, None, None], b.targets, ()) for b in batches(2)]
        mix = make_mix(0.5, 0, 3) if mixing else unmixed
        layers = (nn.Flatten(), nn.Dropout(0.0 if mixing else 0.5), net)
        train(nn.Sequential(*layers), given, rule=rule, mix=mix)
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.equal(ends[1], ends[2])
    assert not torch.allclose(ends[0], ends[1])


def test_of_mixed_images_the_class_with_the_larger_share_counts():
    def halves(images, targets):
        soft = nn.functional.one_hot(targets, 3) * 0.75
        return images, soft + nn.functional.one_hot(targets.roll(1), 3) * 0.25

    net, given = plain_network(), batches(1)
    with torch.no_grad():
        logits = net(given[0].images)
    state, _ = train(net, given, mix=halves, loss_fn=partial(cross_entropy, label_smoothing=0.1))
    soft = 0.9 * halves(None, given[0].targets)[1] + 0.1 / 3
    figures = state.meter.means()
    assert figures["loss"] == pytest.approx(
        -(soft * logits.log_softmax(1)).sum(1).mean().item(), rel=1e-6
    )
    right = (logits.argmax(1) == given[0].targets).sum().item()
    assert figures["top1"] == pytest.approx(100 * right / 6)
