"""Networks whose modules a user changed: every fast path computes what the modules compute."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import models
from models.eca_module import ECALayer
from models.fused import proof
from models.fused.proof import is_eca

pytestmark = pytest.mark.usefixtures("thin")


class Doubled(ECALayer):
    def forward(self, x):
        return 2 * super().forward(x)


class TwoConvolutions(ECALayer):
    """Inherits the forward, and builds another convolution."""

    def __init__(self):
        super().__init__(3)
        self.conv = nn.Sequential(self.conv, nn.Conv1d(1, 1, 1))


class ScaledConv1d(nn.Conv1d):
    def _conv_forward(self, *args):
        return 3 * super()._conv_forward(*args)


class ScaledConv2d(nn.Conv2d):
    def forward(self, x):
        return 3 * super().forward(x)


class ShiftedNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


def with_bias(block):
    block.eca.conv = nn.Conv1d(1, 1, 3, padding=1)
    block.eca.conv.bias.data.fill_(3.0)


def convolution(**settings):
    def change(block):
        block.eca.conv = nn.Conv1d(1, 1, 3, bias=False, **settings)

    return change


def replace(name, make):
    def change(block):
        owner, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(owner), leaf, make(block))

    return change


def pool_by_maximum(block):
    block.eca.avg_pool = nn.AdaptiveMaxPool2d(1)


def patch_instance(block):
    layer = block.eca
    layer.forward = lambda x: x * 0.25


def hook(name):
    def change(block):
        block.get_submodule(name).register_forward_hook(lambda module, given, out: out * 0.5)

    return change


def scaled_conv2d(block):
    old = block.conv2
    new = ScaledConv2d(old.in_channels, old.out_channels, 3, old.stride, 1, bias=False)
    new.load_state_dict(old.state_dict())
    return new


def conv1_with_bias(block):
    return nn.Conv2d(block.conv1.in_channels, block.conv1.out_channels, 3, padding=1)


CHANGES = {
    "bias": with_bias,
    "dilation": convolution(padding=2, dilation=2),
    "circular": convolution(padding=1, padding_mode="circular"),
    "reflect": convolution(padding=1, padding_mode="reflect"),
    "_conv_forward": replace("eca.conv", lambda _: ScaledConv1d(1, 1, 3, padding=1, bias=False)),
    "subclass": replace("eca", lambda _: Doubled(3)),
    "two convolutions": replace("eca", lambda _: TwoConvolutions()),
    "maximum": pool_by_maximum,
    "patched instance": patch_instance,
    "hook on eca.conv": hook("eca.conv"),
    "hook on conv1": hook("conv1"),
    "hook on the block": hook(""),
    "BatchNorm subclass": replace("bn2", lambda b: ShiftedNorm(b.bn2.num_features)),
    "LeakyReLU": replace("relu", lambda _: nn.LeakyReLU(0.3)),
    "Conv2d subclass": replace("conv2", scaled_conv2d),
    "Conv2d with bias": replace("conv1", conv1_with_bias),
}
# A norm that is none of PyTorch's BatchNorms is refused by the rebuild, not called.
REFUSED = {"BatchNorm subclass"}


def changed_network(change):
    torch.manual_seed(0)
    network = models.create_model("eca_resnet18", num_classes=5)
    change(network.layer1[0])
    return network.double()


def step(network, x, fused):
    network = copy.deepcopy(network).train()
    models.set_fused(network, fused)
    out = network(x)
    out.square().sum().backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    return out, gradients


@pytest.mark.parametrize("name", CHANGES)
def test_fused_and_rebuilt_compute_what_the_modules_do(name):
    network = changed_network(CHANGES[name])
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    expected, gradients = step(network, x, fused=False)
    found, others = step(network, x, fused=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for key, gradient in gradients.items():
        torch.testing.assert_close(others[key], gradient, rtol=1e-7, atol=1e-7)
    network.eval()
    models.set_fused(network, False)
    if name in REFUSED:
        with pytest.raises(ValueError, match="cannot be folded"):
            models.optimise_for_inference(network, torch.float64)
        return
    with torch.no_grad():
        expected = network(x).float()
    rebuilt = models.optimise_for_inference(network, torch.float64)
    torch.testing.assert_close(rebuilt(x), expected, rtol=1e-5, atol=1e-5)


def test_a_bias_gets_its_gradient():
    network = changed_network(with_bias)
    _, gradients = step(network, torch.randn(3, 3, 32, 32, dtype=torch.float64), fused=True)
    assert gradients["layer1.0.eca.conv.bias"].abs() > 0


def test_a_patched_class_is_called(monkeypatch):
    network = changed_network(lambda block: None).eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    monkeypatch.setattr(ECALayer, "forward", lambda self, x: x * 0.25)
    with torch.no_grad():
        found = network(x)
        models.set_fused(network, False)
        expected = network(x)
    torch.testing.assert_close(found, expected)
    rebuilt = models.optimise_for_inference(network, torch.float64)
    torch.testing.assert_close(rebuilt(x), expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bias", "circular", "subclass", "Conv2d subclass"])
def test_an_exported_graph_computes_what_the_modules_do(name):
    network = changed_network(CHANGES[name]).float().eval()
    models.set_fused(network, False)
    x = torch.randn(2, 3, 32, 32)
    rebuilt = models.optimise_for_inference(network, torch.float32)
    with torch.no_grad():
        exported = torch.export.export(rebuilt, (x,)).module()
        torch.testing.assert_close(exported(x), network(x), rtol=1e-4, atol=1e-4)


def test_mobilenets_activations_and_members():
    torch.manual_seed(0)
    network = models.create_model("eca_mobilenetv2", num_classes=5).double().eval()
    network.features[2].conv[0][2] = nn.Hardswish()
    network.features[3].conv.append(nn.Hardswish())
    network.features[4].conv[-1].conv.padding_mode = "circular"
    network.features[5].conv[1].register_forward_hook(lambda module, given, out: out * 0.5)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        found = network(x)
        models.set_fused(network, False)
        expected = network(x)
    torch.testing.assert_close(found, expected)
    rebuilt = models.optimise_for_inference(network, torch.float64)
    torch.testing.assert_close(rebuilt(x), expected.float(), rtol=1e-5, atol=1e-5)


class EditedLayer(ECALayer):
    def forward(self, x):
        return x * F.hardsigmoid(self.conv(self.avg_pool(x).reshape(len(x), 1, -1)))[..., None]


def test_an_edited_source_is_noticed():
    kernel = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    for kind, expected in ((ECALayer, True), (EditedLayer, False), (Doubled, False)):
        layer = kind(3).double()
        layer.conv.weight.data = kernel.reshape(1, 1, 3)
        assert proof._computes_the_formula(layer, kernel) is expected
    assert proof.ORIGINAL_ECA
    assert is_eca(ECALayer(5))
