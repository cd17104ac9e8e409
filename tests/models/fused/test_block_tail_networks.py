"""Networks with fused tails against the same with modules: values, keys, and what they keep."""

import copy

import pytest
import torch
from helpers.tail_cases import saved_bytes

import models

pytestmark = pytest.mark.usefixtures("seeded", "operations")


def train_step(network, x):
    """Logits, gradients and buffers after one step's forward and backward."""
    network = copy.deepcopy(network).train()
    torch.manual_seed(3)  # dropout
    logits = network(x)
    logits.square().mean().backward()
    found = {name: p.grad for name, p in network.named_parameters()}
    return {**found, **dict(network.named_buffers()), "logits": logits.detach()}


@pytest.mark.parametrize("name", ["eca_resnet18", "eca_resnet50", "se_resnet18", "eca_mobilenetv2"])
def test_networks_compute_the_same_with_and_without(thin, name):
    network = models.create_model(name, num_classes=5).double()
    x = torch.randn(2, 3, 64, 48, dtype=torch.float64).to(memory_format=torch.channels_last)
    fused = train_step(network, x)
    assert models.set_fused(network, False) > 0
    plain = train_step(network, x)
    assert fused.keys() == plain.keys()
    for key, value in plain.items():
        torch.testing.assert_close(fused[key], value, rtol=1e-7, atol=1e-9, msg=key)


def test_the_switch_reaches_every_block_and_leaves_the_keys_alone():
    network = models.create_model("eca_resnet18", num_classes=2)
    keys = list(network.state_dict())
    assert models.set_fused(network, False) == 9  # 8 blocks and the stem
    assert not any(block.fused for block in (network, *network.layer1))
    assert models.set_fused(network, True) == 9
    assert all(block.fused for block in network.layer4)
    assert list(network.state_dict()) == keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_keeps_what_resnet50_keeps(dtype):
    """At a batch of 16 and 224×224, on tensors without storage."""
    import torchvision

    x = torch.empty(16, 3, 224, 224, device="meta", dtype=dtype)
    with torch.device("meta"):
        plain = torchvision.models.resnet50()
        eca = models.create_model("eca_resnet50")
    kept = {}
    for label, network in (("plain", plain), ("fused", eca)):
        kept[label] = saved_bytes(lambda: network.to(dtype).train()(x))  # noqa: B023
    models.set_fused(eca, False)
    kept["modules"] = saved_bytes(lambda: eca(x))
    assert kept["fused"] <= 1.005 * kept["plain"]
    assert kept["modules"] > 1.2 * kept["plain"]
