"""ECA in other networks under torch.fx and TorchScript: what worked before, works after."""

import copy
import warnings

import pytest
import torch
import torchvision
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.fx.experimental.optimization import fuse
from torchvision.models.feature_extraction import create_feature_extractor

from models.insertion import InsertedECA, add_eca
from tests.models.test_insertion import ALL

timm = pytest.importorskip("timm")
NETWORKS = pytest.importorskip("helpers.foreign_networks").NETWORKS


def script(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(module)


def tuned(network):
    """The network in eval mode, with ECA whose kernels are not zero."""
    for insertion in add_eca(network, quiet=True):
        nn.init.normal_(network.get_submodule(insertion.name).conv.weight)
    return network.eval()


GRAPHS = {"fx": torch.fx.symbolic_trace, "script": script}
# timm pads these by the size of the image, which torch.fx does not know.
NO_GRAPH = {("fx", "timm tf_efficientnetv2_s"), ("fx", "timm tf_efficientnetv2_b0")}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("form", GRAPHS)
def test_a_graph_before_is_a_graph_after(name, form):
    torch.manual_seed(0)
    network, build = NETWORKS[name][0]().eval(), GRAPHS[form]
    if (form, name) in NO_GRAPH:
        with pytest.raises(torch.fx.proxy.TraceError):
            build(network)
        return
    build(network)
    tuned(network)
    images = torch.randn(2, 3, 40, 48)
    with torch.no_grad():
        graph, expected = build(network), network(images)
        torch.testing.assert_close(graph(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["torchvision resnet18", "torchvision regnet_x_400mf"])
def test_fusing_convolutions_loses_no_attention(name):
    torch.manual_seed(0)
    plain = NETWORKS[name][0]().eval()
    network = tuned(copy.deepcopy(plain))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        fused, expected = fuse(network), network(images)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
        torch.testing.assert_close(fused(images), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(plain(images), expected, rtol=1e-2)


def test_feature_extractor_and_quantisation():
    torch.manual_seed(0)
    network = tuned(torchvision.models.resnet18(num_classes=5))
    images = torch.randn(8, 3, 64, 64)
    seen = []
    network.layer2.register_forward_hook(lambda m, i, out: seen.append(out))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = network(images)
        found = create_feature_extractor(network, ["layer2", "layer4.1.bn2.eca.sigmoid"])(images)
        torch.testing.assert_close(found["layer2"], seen[0], rtol=1e-4, atol=1e-5)
        assert found["layer4.1.bn2.eca.sigmoid"].shape == (8, 1, 512)
        engine = torch.backends.quantized.engine
        prepared = prepare_fx(network, get_default_qconfig_mapping(engine), (images,))
        prepared(images)
        quantised = convert_fx(prepared)(images)
    assert (quantised - expected).norm() < 0.1 * expected.norm()


def test_timm_s_wrappers():
    torch.manual_seed(0)
    network = tuned(timm.create_model("resnet10t", num_classes=5))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = network.forward_intermediates(images, intermediates_only=True)
        graph = timm.models.FeatureGraphNet(copy.deepcopy(network), out_indices=(1, 4))
        for one, other in zip(graph(images), expected[1::3], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        synced = timm.layers.convert_sync_batchnorm(copy.deepcopy(network))
        torch.testing.assert_close(synced(images), network(images))


@pytest.mark.parametrize("shape", [(2, 7, 4, 4), (2, 8, 4), (2, 4, 4, 8)])
def test_a_graph_refuses_what_the_layer_refuses(shape):
    layer = InsertedECA(8, 3)
    x = torch.randn(shape)
    with pytest.raises(ValueError, match="was expected and"):
        layer(x)
    with pytest.raises(AssertionError, match="was expected and"):
        torch.fx.symbolic_trace(layer)(x)
    with pytest.raises(torch.jit.Error, match="another shape"):
        script(layer)(x)
