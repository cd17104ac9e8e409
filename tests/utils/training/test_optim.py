"""Which parameters weight decay is for, by their names; and momentum before the first step."""

import copy
import math

import pytest
import torch
from torch import nn

import models
from utils.config.detection import DetectionRecipe, DetectorSettings
from utils.runs.resume import Start
from utils.system.distributed import Context
from utils.training import detector
from utils.training.optim import load_optimizer_state
from utils.training.optim import make_optimizer as make

CPU = torch.device("cpu")
NCHW, NHWC = torch.contiguous_format, torch.channels_last


def make_sgd(network, lr, momentum, weight_decay, norm_decay=True):
    return make("sgd", network, lr, momentum, weight_decay, norm_decay)


def split(network):
    """The parameters that decay, and those that do not."""
    groups = make_sgd(network, 0.1, 0.9, 1e-4, norm_decay=False).param_groups
    assert [group["weight_decay"] for group in groups] == [1e-4, 0.0]
    return [group["params"] for group in groups]


def names(network, parameters):
    of = {id(p): name for name, p in network.named_parameters()}
    return {of[id(p)] for p in parameters}


@pytest.mark.parametrize("arch", ["eca_resnet18", "se_resnet18", "eca_mobilenetv2"])
def test_norms_biases_and_eca_kernels_are_spared(arch):
    network = models.create_model(arch, num_classes=3)
    wanted = {f"{network.head}.bias"}
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            wanted |= {f"{name}.weight", f"{name}.bias"}
        if isinstance(module, models.ECALayer):
            wanted.add(f"{name}.conv.weight")
    decayed, spared = (names(network, group) for group in split(network))
    assert spared == wanted
    assert decayed == {name for name, _ in network.named_parameters()} - spared


def after_a_step_without_gradient(norm_decay):
    torch.manual_seed(0)
    network = models.create_model("eca_resnet18", num_classes=3)
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    optimizer = make_sgd(network, 0.1, 0.9, 0.01, norm_decay)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return before, dict(network.named_parameters())


def test_decay_is_all_that_a_step_without_gradient_does():
    before, after = after_a_step_without_gradient(norm_decay=True)
    for name, old in before.items():
        torch.testing.assert_close(after[name], old * (1 - 0.1 * 0.01))
    before, after = after_a_step_without_gradient(norm_decay=False)
    for name, old in before.items():
        kept = old.ndim not in (2, 4)
        torch.testing.assert_close(after[name], old if kept else old * (1 - 0.1 * 0.01))


def test_the_paper_s_optimizer_has_one_group_in_the_network_s_order():
    """Saved momentum is found again by that order."""
    network = models.create_model("eca_resnet18", num_classes=3)
    (group,) = make_sgd(network, 0.1, 0.9, 1e-4).param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in network.parameters()]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 1e-4)
    assert group["fused"] is True


@pytest.fixture
def uninitialised_is_nan():
    """What PyTorch fills new memory with when it is to be deterministic."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_optimizer(network, recipe):
    """Of a detector's run."""
    start = Start(None, None, None)
    return detector.begin_state(network, recipe, DetectorSettings(), start, Context(CPU)).optimizer


SGDS = {
    "classification": lambda network: make_sgd(network, 0.02, 0.9, 1e-4),
    "detection": lambda network: make_optimizer(network, DetectionRecipe(lr=0.02)),
}


@pytest.mark.parametrize("kind", SGDS)
def test_a_first_step_that_overflows_leaves_no_trace(kind, uninitialised_is_nan):
    """--amp fp16: the scaler skips it, as it often does until its scale has fallen."""
    after = []
    for factors in ([math.inf, 1.0, 2.0], [1.0, 2.0]):
        torch.manual_seed(0)
        network = nn.Linear(5, 3)
        optimizer = SGDS[kind](network)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for factor in factors:
            optimizer.zero_grad()
            scaler.scale(factor * network(torch.ones(4, 5)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        after.append([p.detach() for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*after, strict=True))


def test_the_first_step_is_the_same_as_without_a_momentum_to_begin_with():
    after = []
    for begin in (
        SGDS["classification"],
        lambda n: torch.optim.SGD(n.parameters(), 0.02, 0.9, weight_decay=1e-4),
    ):
        torch.manual_seed(0)
        network = nn.Linear(5, 3)
        optimizer = begin(network)
        for _ in range(3):
            optimizer.zero_grad()
            network(torch.ones(4, 5)).square().mean().backward()
            optimizer.step()
        after.append([p.detach() for p in network.parameters()])
    torch.testing.assert_close(*after, rtol=1e-6, atol=1e-7)


def conv_in(memory_format):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3))
    return network.to(memory_format=memory_format)


def step(network, optimizer, number):
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(number))
    optimizer.zero_grad()
    network(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("formats", [(NCHW, NHWC), (NHWC, NCHW)])
def test_state_is_taken_up_in_another_memory_format(name, formats):
    """As from a GPU's run on a CPU, or with --channels-last anew; the kernels do not look."""
    recipe = DetectionRecipe(lr=0.05, optimizer=name)
    through = conv_in(NCHW)
    optimizer = make_optimizer(through, recipe)
    for number in range(4):
        step(through, optimizer, number)
    saved = None
    for begin, memory_format in zip((0, 2), formats, strict=True):
        network = conv_in(memory_format)
        optimizer = make_optimizer(network, recipe)
        if saved is not None:
            network.load_state_dict(saved[0])
            load_optimizer_state(optimizer, saved[1])
        for number in (begin, begin + 1):
            step(network, optimizer, number)
        saved = copy.deepcopy((network.state_dict(), optimizer.state_dict()))
    for found, expected in zip(network.parameters(), through.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_run_without_momentum_goes_on_with_it(uninitialised_is_nan):
    """And its first step may overflow."""
    network = nn.Linear(5, 3)
    before = make_sgd(network, 0.1, 0.0, 0.0).state_dict()
    assert before["state"] == {}
    optimizer = make_sgd(network, 0.1, 0.9, 0.0)
    load_optimizer_state(
        optimizer, {**before, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    buffers = [optimizer.state[p]["momentum_buffer"] for p in network.parameters()]
    assert all(torch.equal(b, torch.zeros_like(b)) for b in buffers)
