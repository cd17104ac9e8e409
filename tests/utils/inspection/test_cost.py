"""The counting conventions against hand-written formulas and against the published figures."""

import copy
import sys

import pytest
import torch
from torch import nn

from models import create_model
from utils.inspection.cost import (
    count_cost,
    format_flops,
    format_params,
    mid_2019_ops,
    multiply_adds,
    thop_today,
)
from utils.inspection.cost_tables import classifier_report
from utils.system.errors import UserError

# Network, ksize: thop of mid-2019 as it printed, thop 0.1.1. Published digits follow from these.
COUNTED = {
    ("eca_resnet18", "3333"): (1_826_860_544, 1_824_794_112),
    ("eca_resnet34", "3333"): (3_682_828_032, 3_680_134_400),
    ("eca_resnet50", "3333"): (4_147_691_520, 4_139_322_368),
    ("eca_resnet101", "3333"): (7_887_278_080, 7_875_496_960),
    ("eca_resnet152", "3333"): (11_633_278_976, 11_617_283_072),
    ("eca_mobilenetv2", "13"): (335_449_024, 328_064_224),
}


def on_meta(name: str, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **kwargs)


@pytest.mark.parametrize(("name", "ksize"), COUNTED)
def test_known_counts_to_the_digit(name, ksize):
    cost = count_cost(on_meta(name, ksize=ksize), (1, 3, 224, 224))
    assert (cost.mid_2019_printed, cost.thop_today) == COUNTED[name, ksize]
    for convention in ("mid_2019", "thop_today", "multiply_adds"):
        layers = sum(getattr(layer, convention) for layer in cost.layers)
        assert layers == getattr(cost, convention), convention


def test_single_precision_is_within_half_a_step():
    cost = count_cost(on_meta("eca_resnet50", ksize="3333"), (1, 3, 224, 224))
    assert cost.mid_2019 == 4_147_691_544
    assert abs(cost.mid_2019_printed - cost.mid_2019) <= 128  # floats of this size are 256 apart


@pytest.mark.parametrize(
    ("module", "shape", "ops"),
    [
        (nn.Conv2d(4, 6, 3, bias=False), (1, 4, 5, 5), 4 * 6 * 9 * 9),
        (nn.Conv2d(4, 6, 3, groups=2), (1, 4, 5, 5), 4 * 54 * (9 + 1) // 2),
        (nn.Conv1d(1, 1, 5, padding=2, bias=False), (2, 1, 16), 2 * 16 * 5),
        (nn.BatchNorm2d(4), (2, 4, 3, 5), 4 * 120),
        (nn.ReLU(), (2, 4, 3, 5), 120),
        (nn.ReLU6(), (2, 4), 8),
        (nn.AdaptiveAvgPool2d(1), (2, 4, 7, 6), (42 + 1) * 8),
        (nn.AdaptiveAvgPool2d((2, 3)), (1, 4, 8, 6), (8 + 1) * 24),
        (nn.Linear(10, 3), (2, 10), 6 * 19),
        (nn.MaxPool2d(2), (1, 4, 8, 8), 0),
        (nn.Sigmoid(), (1, 4), 0),
        (nn.Dropout(), (1, 4), 0),
    ],
)
def test_mid_2019_rule(module, shape, ops):
    x = torch.zeros(shape)
    assert mid_2019_ops(module, x, module.eval()(x)) == ops


class Shared(nn.Module):
    """One ReLU on 64 elements, then on 16."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(1, 1, 2, stride=2, bias=False)

    def forward(self, x):
        return self.relu(self.conv(self.relu(x)))


def test_of_a_shared_module_the_last_call_counts():
    cost = count_cost(Shared(), (1, 1, 8, 8))
    relu, conv = cost.layers
    assert (relu.name, relu.calls, relu.mid_2019, relu.output) == ("relu", 2, 16, (1, 1, 4, 4))
    assert cost.mid_2019 == 16 + conv.mid_2019 == 16 + 16 * 4


def test_multiply_adds_see_functional_calls_too():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(6, 2, 3, 3))

        def forward(self, x):
            y = nn.functional.conv2d(x, self.weight, groups=2, padding=1)
            return torch.relu(y.mean((2, 3))) @ torch.zeros(6, 5)

    macs = multiply_adds(Functional(), torch.zeros(1, 4, 8, 8))
    assert macs[""] == 6 * 64 * 2 * 9 + 6 * 5


@pytest.mark.parametrize("name", ["eca_resnet18", "se_mobilenetv2"])
def test_meta_counts_as_memory_does(name):
    torch.manual_seed(0)
    here = count_cost(create_model(name, num_classes=7), (2, 3, 32, 48))
    assert count_cost(on_meta(name, num_classes=7), (2, 3, 32, 48)) == here


def test_the_network_is_left_as_it_was():
    torch.manual_seed(0)
    network = create_model("eca_resnet18", num_classes=4).train()
    before = copy.deepcopy(network.state_dict())
    count_cost(network, (1, 3, 32, 32))
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    modules = list(network.modules())
    assert all(module.training and not module._forward_hooks for module in modules)
    assert not any(hasattr(module, "total_ops") for module in modules)


def test_the_share_of_the_eca_layers():
    bare = count_cost(on_meta("resnet50"), (1, 3, 224, 224))
    report = classifier_report(on_meta("eca_resnet50", ksize="3557"), (224, 224), bare)
    share = report["attention"]
    blocks = ((256, 56, 3, 3), (512, 28, 5, 4), (1024, 14, 5, 6), (2048, 7, 7, 3))
    convolutions = sum(c * k * n for c, _, k, n in blocks)
    pools = sum(c * (side * side + 1) * n for c, side, _, n in blocks)
    assert (share["name"], share["parameters"]) == ("eca", 80)
    assert share["multiply_adds"] == convolutions
    assert share["mid_2019"] == share["thop_today"] == convolutions + pools


def test_without_thop_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "thop", None)
    with pytest.raises(UserError, match="pip install thop setuptools"):
        thop_today(nn.Linear(2, 2), torch.zeros(1, 2))


def test_units():
    assert format_params(25_557_112) == "24.37M"
    assert format_params(25_557_112, base=1000) == "25.56M"
    assert format_flops(4_147_691_520) == "3.86G"
    assert format_flops(335_449_024) == "319.9M"
    assert format_flops(2**30) == "1.00G"
    assert format_flops(207_181_949_620, base=1000) == "207.18G"
