"""The weights that attention layers apply, and their statistics over images and classes."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from models import create_model
from models.attention import ATTENTIONS
from models.eca_module import ECALayer
from models.inspection import AttentionLayer, attention_layers, feature_maps, gate, recorded_gates
from utils.inspection.channel_weights import GateStatistics, LayerWeights, table


@pytest.mark.parametrize("name", [name for name in ATTENTIONS if name != "none"])
def test_gate_is_what_the_layer_multiplies_by(name):
    torch.manual_seed(0)
    layer = ATTENTIONS[name].build(32, 3)
    x = torch.randn(3, 32, 5, 4)
    s = gate(layer, x)
    assert s.shape == (3, 32)
    torch.testing.assert_close(layer(x), x * s[:, :, None, None])


@pytest.mark.parametrize(
    "name", ["eca_resnet18", "se_resnet34", "eca_resnet50", "eca_mobilenetv2", "se_mobilenetv2"]
)
def test_layers_are_found_where_they_stand(name):
    network = create_model(name, num_classes=4).eval()
    found = attention_layers(network)
    keys = {key.rpartition(".")[0] for key in network.state_dict()}
    slot = name.partition("_")[0]
    for layer in found:
        assert network.get_submodule(layer.name) is layer.layer
        assert any(key.startswith(layer.name) for key in keys)
        if "resnet" in name:
            assert layer.name == f"layer{layer.stage}.{layer.block - 1}.{slot}"
    blocks = {"18": 8, "34": 16, "50": 16, "v2": 17}[name[-2:]]
    assert len(found) == blocks
    if "mobile" in name:
        places = [(layer.stage, layer.block) for layer in found]
        depths = (1, 2, 3, 4, 3, 3, 1)
        assert places == [(s, b + 1) for s, depth in enumerate(depths, 1) for b in range(depth)]

    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = network(images)
        with recorded_gates(network) as gates:
            torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)
    assert list(gates) == [layer.name for layer in found]
    assert all(g.shape[0] == 2 and g.min() > 0 and g.max() < 1 for g in gates.values())
    assert not any(layer.layer._forward_hooks for layer in found)


def test_a_plain_network_has_none():
    for name in ("resnet18", "mobilenetv2"):
        assert attention_layers(create_model(name, num_classes=2)) == []
    network = create_model("eca_resnet18", num_classes=2)
    for block in (*network.layer1, *network.layer3):
        block.eca = nn.Identity()  # as one that weighs positions, not channels
    assert {entry.stage for entry in attention_layers(network)} == {2, 4}
    for function in (attention_layers, feature_maps):
        with pytest.raises(ValueError, match=r"a network of models\.MODELS is wanted"):
            function(nn.Linear(2, 2))


def test_statistics_over_batches_are_those_over_all():
    torch.manual_seed(0)
    s = torch.rand(23, 6)
    labels = torch.cat((torch.tensor([0, 1, 1, 2, 2]), torch.randint(0, 3, (18,))))
    statistics = GateStatistics(3)
    for begin in range(0, 23, 5):
        part = slice(begin, begin + 5)
        statistics.update({"a": s[part], "b": 1 - s[part]}, labels[part])
    eca = ECALayer(3)
    eca.conv.weight.data = torch.tensor([[[1.0, 2.0, 3.0]]])
    layer = statistics.layer(AttentionLayer("a", 1, 2, eca))
    groups = [s[labels == i].double().numpy() for i in range(3)]
    np.testing.assert_allclose(layer.mean, [g.mean(0) for g in groups], atol=1e-12)
    np.testing.assert_allclose(layer.std, [g.std(0, ddof=1) for g in groups], atol=1e-7)
    assert layer.counts.tolist() == [len(g) for g in groups]
    assert layer.kernel.tolist() == [1, 2, 3]
    other = statistics.layer(AttentionLayer("b", 1, 1, nn.Identity()))
    np.testing.assert_allclose(other.mean, 1 - layer.mean, atol=1e-7)


def test_spreads_tell_classes_from_chance():
    chance = np.random.default_rng(0)

    def spreads(class_std, image_std, count=40, classes=30, channels=200):
        centre = 0.5 + class_std * chance.standard_normal((classes, channels))
        images = centre + image_std * chance.standard_normal((count, classes, channels))
        mean, std = images.mean(0), images.std(0, ddof=1)
        layer = LayerWeights("x", 1, 1, mean, std, np.full(classes, count), None)
        return layer.between, layer.within, layer.noise

    between, within, noise = spreads(0, 0.1)
    assert within == pytest.approx(0.1, rel=0.02)
    assert between == pytest.approx(noise, rel=0.05)  # nothing but chance
    assert noise == pytest.approx(0.1 / 40**0.5, rel=0.02)
    between, within, noise = spreads(0.1, 0.05)
    assert between == pytest.approx(0.1, rel=0.05)
    assert within == pytest.approx(0.05, rel=0.02)
    assert spreads(0, 0, classes=1)[0] == 0


def test_a_single_image_says_nothing_of_a_spread():
    torch.manual_seed(0)
    s = torch.rand(5, 4)
    statistics = GateStatistics(3)
    statistics.update({"a": s}, torch.tensor([0, 0, 1, 2, 2]))
    layer = statistics.layer(AttentionLayer("a", 1, 1, nn.Identity()))
    assert np.isnan(layer.std).all(1).tolist() == [False, True, False]
    variances = [s[part].double().var(0) for part in (slice(0, 2), slice(3, 5))]
    pooled = sum(variances) / 2
    assert layer.within == pytest.approx(pooled.sqrt().mean().item(), rel=1e-6)
    noise = (variances[0] / 2 + pooled / 1 + variances[1] / 2) / 3
    assert layer.noise == pytest.approx(noise.sqrt().mean().item(), rel=1e-6)

    statistics = GateStatistics(2)
    statistics.update({"a": s[:2]}, torch.tensor([0, 1]))
    layer = statistics.layer(AttentionLayer("a", 1, 1, nn.Identity()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan([layer.within, layer.noise]).all()
        cells = table([layer]).splitlines()[1].split()
    between = s[:2].double().std(0).mean().item()
    assert cells == ["a", "4", f"{s[:2].mean():.4f}", f"{between:.4f}", "-", "-", "-"]
