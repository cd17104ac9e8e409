"""The moving average against a loop in float64."""

import copy

import pytest
import torch
from torch import nn

import models
from utils.system.errors import UserError
from utils.training.state import WeightAverage, decay_at


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))


def wander(net, step):
    """Weights and BatchNorm statistics as a training step leaves them: all moved."""
    torch.manual_seed(step)
    net.train()
    net(torch.randn(2, 3, 5, 5))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter))


def test_it_equals_a_loop_in_float64():
    net = network()
    wander(net, 0)
    average = WeightAverage(net, 0.7)
    wanted = {k: v.double() for k, v in net.state_dict().items()}
    for step in range(30):
        wander(net, step)
        average.update_parameters(net)
        keep = min(0.7, (1 + step) / (10 + step))  # 0.1, 0.18, …, 0.7 from the twenty-first on
        for key, value in net.state_dict().items():
            wanted[key] = keep * wanted[key] + (1 - keep) * value.double()
    found = average.module.state_dict()
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        if not key.endswith("num_batches_tracked"):
            torch.testing.assert_close(value.double(), wanted[key], rtol=1e-5, atol=1e-5)


def test_batch_norm_is_averaged_and_its_counter_is_the_network_s():
    net = network()
    wander(net, 0)
    average = WeightAverage(net, 0.999)
    for step in range(12):
        wander(net, step)
        average.update_parameters(net)
    own, averaged = net[1], average.module[1]
    assert averaged.num_batches_tracked.dtype == torch.int64
    assert averaged.num_batches_tracked == own.num_batches_tracked == 13
    assert not torch.equal(averaged.running_mean, own.running_mean)


def test_the_decay_warms_up():
    assert decay_at(0, 0.99997) == 0.1
    assert decay_at(90, 0.99997) == pytest.approx(0.91)
    assert decay_at(10**9, 0.99997) == 0.99997
    assert [decay_at(n, 0.5) for n in (7, 8, 9)] == [pytest.approx(8 / 17), 0.5, 0.5]


def test_it_is_apart_from_the_network_and_learns_nothing():
    net = models.create_model("eca_resnet18", num_classes=3)
    before = copy.deepcopy(net.state_dict())
    average = WeightAverage(net, 0.9)
    assert average.module.state_dict().keys() == before.keys()
    assert not any(p.requires_grad for p in average.parameters())
    assert all(p.requires_grad for p in net.parameters())
    wander_by = {k: v + 1 for k, v in before.items()}
    net.load_state_dict(wander_by)
    average.update_parameters(net)
    assert all(torch.equal(v, wander_by[k]) for k, v in net.state_dict().items())
    assert average.module.arch == "eca_resnet18"


@pytest.mark.parametrize(
    "other", [nn.Linear(3, 1), nn.Linear(3, 2).double(), nn.Linear(3, 2, bias=False)]
)
def test_weights_of_another_network_are_refused(other):
    """The first would be spread over the average's two rows without a word."""
    average = WeightAverage(nn.Linear(3, 2), 0.9)
    before = copy.deepcopy(average.module.state_dict())
    with pytest.raises(UserError, match="averaged weights are not those of the network that is"):
        average.update_parameters(other)
    assert all(torch.equal(v, before[k]) for k, v in average.module.state_dict().items())
