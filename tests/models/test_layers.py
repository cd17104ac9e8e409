"""Layers counted from the input: factors of the learning rate beside timm's, and freezing."""

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

import models
from models.inspection import layer_scales
from utils.training.optim import make_optimizer


def timm_s_scales(network: nn.Module, decay: float) -> dict[str, float]:
    names = {id(p): name for name, p in network.named_parameters()}
    groups = param_groups_layer_decay(network, 0.05, layer_decay=decay)
    return {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_the_factors_of_a_resnet_are_timm_s(arch):
    wanted = timm_s_scales(timm.create_model(arch, num_classes=5), 0.7)
    assert layer_scales(models.create_model(arch, num_classes=5), 0.7) == pytest.approx(wanted)
    with_eca = layer_scales(models.create_model(f"eca_{arch}", num_classes=5), 0.7)
    assert with_eca["layer3.1.eca.conv.weight"] == with_eca["layer3.1.conv1.weight"]
    assert with_eca == pytest.approx({**wanted, **{k: with_eca[k] for k in with_eca if "eca" in k}})


def test_the_factors_of_a_mobilenet_are_timm_s():
    """Names differ: parameters of equal shapes stand in the same order."""
    theirs = timm.create_model("mobilenetv2_100", num_classes=5)
    ours = models.create_model("mobilenetv2", num_classes=5)
    shapes = [[p.shape for p in network.parameters()] for network in (theirs, ours)]
    assert shapes[0] == shapes[1]
    wanted, found = timm_s_scales(theirs, 0.8), layer_scales(ours, 0.8)
    assert [found[name] for name, _ in ours.named_parameters()] == pytest.approx(
        [wanted[name] for name, _ in theirs.named_parameters()]
    )


@pytest.mark.parametrize("kind", ["sgd", "adamw", "lamb"])
@pytest.mark.parametrize("norm_decay", [False, True])
def test_groups_hold_each_parameter_that_trains_once(kind, norm_decay):
    network = models.create_model("eca_resnet18", num_classes=5)
    models.freeze(network, "stages:1")
    scales = layer_scales(network, 0.5)
    optimizer = make_optimizer(kind, network, 0.1, 0.9, 0.01, norm_decay, scales)
    names = {id(p): name for name, p in network.named_parameters()}
    seen = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.append(name)
            assert group["lr_scale"] == scales[name]
            spared = not norm_decay and parameter.ndim not in (2, 4)
            assert group["weight_decay"] == (0.0 if spared else 0.01)
    assert sorted(seen) == sorted(n for n, p in network.named_parameters() if p.requires_grad)
    assert len(optimizer.param_groups) == 7 * (1 if norm_decay else 2)  # six blocks and the head


@pytest.mark.parametrize(
    ("arch", "what", "frozen"),
    [
        ("eca_resnet18", "backbone", ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")),
        ("eca_resnet50", "stages:2", ("conv1", "bn1", "layer1", "layer2")),
        ("resnet18", "stages:0", ("conv1", "bn1")),
        ("eca_mobilenetv2", "backbone", ("features",)),
        ("mobilenetv2", "stages:2", ("features.0", "features.1", "features.2", "features.3")),
        ("mobilenetv2", "stages:7", tuple(f"features.{i}" for i in range(18))),
    ],
)
def test_what_is_frozen_neither_trains_nor_counts(arch, what, frozen):
    network = models.create_model(arch, num_classes=5)
    models.freeze(network, what)
    assert network.frozen == frozen
    assert not any(network.get_submodule(name).training for name in frozen)  # at once
    for _ in range(2):
        network.eval()
        network.train()
    parts = tuple(f"{name}." for name in frozen)
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad != name.startswith(parts), name
    for name, module in network.named_modules():
        if name:
            assert module.training != f"{name}.".startswith(parts) or name == "features", name
    before = {k: v.clone() for k, v in network.state_dict().items()}
    network(torch.randn(4, 3, 64, 64)).square().sum().backward()
    after = network.state_dict()
    for name, value in before.items():
        if "running" in name or "tracked" in name:
            assert torch.equal(value, after[name]) == name.startswith(parts), name
    assert all((p.grad is None) == n.startswith(parts) for n, p in network.named_parameters())


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("head", "cannot freeze 'head': use 'backbone', or 'stages:2'"),
        ("stages:x", "cannot freeze 'stages:x'"),
        ("stages:5", "resnet18 has 4 stages: 'stages:5' are more; use 'backbone'"),
    ],
)
def test_what_cannot_be_frozen_is_one_line(what, said):
    with pytest.raises(ValueError, match=said):
        models.freeze(models.create_model("resnet18", num_classes=5), what)
