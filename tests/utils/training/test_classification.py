"""One epoch and one evaluation, on networks small enough to follow by hand."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.small_epochs import CPU, PLAIN, STEPS, batches, network, sgd, train
from torch import nn

from utils.config.flags import RunSettings
from utils.runs.checkpoint import CheckpointFolder
from utils.runs.writer import RunFiles
from utils.system.errors import UserError
from utils.system.signals import StopRequest
from utils.training.classification import ClassificationMeter, cross_entropy, evaluate
from utils.training.progress import Progress
from utils.training.state import NonFiniteGuard


def test_an_epoch_equals_the_loop_written_out():
    """From the third step of the second epoch on, in a warm-up of forty to a rate of 0.4."""
    given, net, other = batches(), network(), network()
    state, done = train(net, given, first_step=10, lr=0.4, warmup_epochs=40 / STEPS)
    assert done
    assert (state.epoch, state.step) == (1, 6)

    optimizer, losses = sgd(other), []
    other.train()
    for step, batch in enumerate(given, 10):
        optimizer.param_groups[0]["lr"] = 0.4 * (step + 1) / 40
        loss = nn.functional.cross_entropy(other(batch.images), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    means = state.meter.means()
    assert means["loss"] == pytest.approx(sum(losses) / 4, rel=1e-6)


def test_a_group_s_rate_is_scaled():
    """Layer decay stands in the groups as `lr_scale`; a step of plain SGD shows each rate."""
    given, net, other = batches(1), network(), network()
    first, *others = net.parameters()
    groups = [{"params": [first], "lr_scale": 0.25}, {"params": others}]
    train(net, given, optimizer=torch.optim.SGD(groups, lr=1.0), lr=0.2)
    other.train()
    nn.functional.cross_entropy(other(given[0].images), given[0].targets).backward()
    for a, b, rate in zip(net.parameters(), other.parameters(), [0.05] + [0.2] * 5, strict=True):
        torch.testing.assert_close(a, b - rate * b.grad)


def in_folder(folder, **saving):
    return RunFiles(folder, {"arch": "x"}, flags=RunSettings(**saving))


def same_weights(saved, state):
    return all(
        torch.equal(saved["state_dict"][k], v) for k, v in state.network.state_dict().items()
    )


def test_a_checkpoint_inside_the_epoch_is_of_the_step_before_it(tmp_path):
    """Due after every third step; the one of the last step due stays, with the sums so far."""
    before, _ = train(network(0.5), batches(7)[:6])
    after, done = train(network(0.5), batches(7), run=in_folder(tmp_path, save_every=3))
    assert done
    saved, previous = (
        torch.load(path, weights_only=True)
        for path in (CheckpointFolder(tmp_path).last, CheckpointFolder(tmp_path).previous)
    )
    assert (saved["progress"]["epoch"], saved["progress"]["step"]) == (0, 6)
    assert previous["progress"]["step"] == 3
    assert same_weights(saved, before)
    assert not same_weights(saved, after)
    assert torch.equal(saved["progress"]["sums"][0], before.meter.sums)


def test_a_run_that_is_asked_to_stop_finishes_its_step_and_is_saved(tmp_path):
    """With nothing due; the step under way is the second one."""
    stop, given = StopRequest(), batches()

    def arriving():
        for number, batch in enumerate(given):
            if number == 1:
                stop.signum = 15
            yield batch

    state, done = train(network(), arriving(), run=in_folder(tmp_path), stop=stop)
    assert not done
    assert state.step == 2
    two, _ = train(network(), given[:2])
    saved = torch.load(CheckpointFolder(tmp_path).last, weights_only=True)
    assert saved["progress"]["step"] == 2
    assert same_weights(saved, two)


def test_images_that_were_replaced_are_noted():
    first, second = batches(2)
    given = [replace(first, broken=[7]), replace(second, broken=[3, 7])]
    state, _ = train(network(), given)
    assert state.broken == [7, 3, 7]


def test_the_line_of_progress_has_the_means_so_far_and_the_rate(capsys):
    given = batches()
    state, _ = train(network(), given[:2])
    means = state.meter.means()
    train(network(), given, progress=Progress("epoch 3/8", 4, 6, 2))
    first, second = capsys.readouterr().out.splitlines()
    figures = f"loss {means['loss']:.4f}  top-1 {means['top1']:.2f} %"
    assert first.startswith(f"epoch 3/8  step 2/4  {figures}  lr 0.1  ")
    assert second.startswith("epoch 3/8  step 4/4  loss ")


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
    guard = NonFiniteGuard(CPU, "gradient norm")
    guard.wait = False
    optimizer = sgd(network(), fused=True)
    for step, value in enumerate([1.0, math.inf, 2.0, math.nan]):
        guard.before_update(torch.tensor(value), step, optimizer)
        assert float(optimizer.found_inf) == (0.0 if math.isfinite(value) else 1.0)
    with pytest.raises(UserError, match="the gradient norm of step 2"):
        guard.check()


def test_evaluation_counts_every_image_and_changes_nothing():
    net, given = network(0.5), [*batches(3), *batches(1, size=2)]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    figures = evaluate(net, given, ClassificationMeter(CPU, 3), PLAIN)
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

    assert evaluate(network(), batches(), ClassificationMeter(CPU, 3), PLAIN, stop) is None
    assert len(seen) == 3


def test_loss_and_forward_run_in_the_given_context():
    dtypes, net = [], nn.Linear(5, 3)
    net.register_forward_hook(lambda *passed: dtypes.append(passed[-1].dtype))
    autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    evaluate(net, batches(1), ClassificationMeter(CPU, 3), autocast)
    train(net, batches(1), autocast=autocast)
    assert dtypes == [torch.bfloat16] * 2
