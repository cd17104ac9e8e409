"""torch.fx and TorchScript on our layers and networks, and what libraries do with the graphs."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.fx import symbolic_trace
from torch.fx.experimental.optimization import fuse
from torchvision.models.feature_extraction import create_feature_extractor

from models import MobileNetV2, set_fused
from models.attention import ATTENTIONS
from models.detection.detectors import create_detector
from models.eca_module import ECALayer
from models.eca_resnet import BasicBlock, Bottleneck, ResNet


def script(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (FutureWarning, DeprecationWarning))
        return torch.jit.script(module)


GRAPHS = {"fx": symbolic_trace, "script": script}


def networks(attention="eca"):
    ksize = "3557" if attention.startswith("eca") else None
    torch.manual_seed(0)
    return {
        "basic": ResNet(BasicBlock, (1, 1, 1, 1), attention, ksize, 5),
        "bottleneck": ResNet(Bottleneck, (1, 1, 1, 1), attention, ksize, 5),
        "mobile": MobileNetV2(attention, ksize and "13", 5, width_mult=0.25),
    }


def warm(network):
    """With running statistics of its own activations, in eval mode."""
    with torch.no_grad():
        for _ in range(20):
            network.train()(torch.randn(8, 3, 32, 32))
    return network.eval()


@pytest.mark.parametrize(
    ("kind", "attention"),
    [("bottleneck", "eca"), ("mobile", "eca"), *(("basic", attention) for attention in ATTENTIONS)],
)
def test_networks_become_graphs(kind, attention):
    network = networks(attention)[kind]
    images = torch.randn(2, 3, 48, 40)
    for training in (True, False):
        network.train(training)
        torch.manual_seed(1)
        expected = copy.deepcopy(network)(images)
        for build in GRAPHS.values():
            graph = build(copy.deepcopy(network))
            torch.manual_seed(1)
            torch.testing.assert_close(graph(images), expected, rtol=1e-3, atol=1e-5)


def test_a_proxy_takes_the_modules_fused_or_not():
    for kind, network in networks().items():
        found = []
        for fused in (True, False):
            assert set_fused(network, fused)
            graph = symbolic_trace(network)
            found.append([str(node.target) for node in graph.graph.nodes])
        assert found[0] == found[1]
        called = set(found[0])
        leaves = (nn.Conv1d, nn.Conv2d, nn.BatchNorm2d, nn.AdaptiveAvgPool2d)
        wanted = {name for name, module in network.named_modules() if isinstance(module, leaves)}
        assert wanted <= called, kind


SHAPES = [(2, 8), (2, 8, 5), (2, 8, 5, 3), (2, 8, 3, 2, 4), (0, 8, 5, 3)]


@pytest.mark.parametrize("build", GRAPHS.values(), ids=GRAPHS)
def test_the_layer_becomes_a_graph_for_every_rank(build):
    layer = ECALayer(5)
    graph = build(layer)  # one graph for all
    for shape in SHAPES:
        x = torch.randn(shape)
        torch.testing.assert_close(graph(x), layer(x), rtol=0, atol=0)
    x = torch.randn(2, 8, 5, 3).contiguous(memory_format=torch.channels_last)
    assert graph(x).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(graph(x), layer(x))


def test_a_scripted_network_is_saved_and_read(tmp_path):
    network = networks()["basic"].eval()
    script(network).save(tmp_path / "network.pt")
    again = torch.jit.load(tmp_path / "network.pt")
    assert again.state_dict().keys() == network.state_dict().keys()
    images = torch.randn(1, 3, 40, 40)
    torch.testing.assert_close(again(images), network(images), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["basic", "bottleneck", "mobile"])
def test_torchvision_s_feature_extractor(kind):
    network = networks()[kind].eval()
    names = network.feature_info.module_name()
    extractor = create_feature_extractor(network, {name: name for name in names})
    images = torch.randn(1, 3, 64, 64)
    expected = network.forward_intermediates(images, intermediates_only=True)
    for one, other in zip(extractor(images).values(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["basic", "bottleneck", "mobile"])
def test_convolutions_are_fused_and_nothing_is_lost(kind):
    network = warm(networks()[kind])
    images = torch.randn(4, 3, 48, 48)
    with torch.no_grad():
        expected = network(images)
        fused = fuse(network)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
        torch.testing.assert_close(fused(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bottleneck", "mobile"])
def test_graph_mode_quantisation(kind):
    network = warm(networks()[kind])
    images = torch.randn(16, 3, 48, 48)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        engine = torch.backends.quantized.engine
        prepared = prepare_fx(
            copy.deepcopy(network), get_default_qconfig_mapping(engine), (images,)
        )
        prepared(images)
        quantised = convert_fx(prepared)
        expected, found = network(images), quantised(images)
    assert any("quantized" in type(module).__module__ for module in quantised.modules())
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_a_detector_s_backbone_becomes_a_graph():
    """The whole detector does not: sizes and numbers of its tensors depend on the images."""
    images = torch.randn(1, 3, 64, 64)
    # torch.fx knows no subclass of BatchNorm, such as that with fixed statistics.
    for build, norm in ((symbolic_trace, "bn"), (script, "bn"), (script, "eval")):
        detector = create_detector("retinanet", "eca_resnet18", norm=norm, trainable_layers=5)
        backbone = detector.backbone.eval()
        expected, found = backbone(images), build(backbone)(images)
        assert list(found) == list(expected)
        for level, value in expected.items():
            torch.testing.assert_close(found[level], value, rtol=1e-4, atol=1e-5)
