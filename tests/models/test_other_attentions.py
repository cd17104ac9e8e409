"""Attentions of timm and of a user's own file: built, kept and refused."""

import copy
import sys

import pytest
import torch

import models
from models import weights
from models.attention import find_attention, typed_attention
from models.inspection import every_attention

timm = pytest.importorskip("timm")
LIGHT = (
    *("cbam", "lcbam", "gc", "gca", "se", "ese", "eca", "ceca"),
    *("coord", "scoord", "ela", "strip"),
)
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
SOURCE = """
from torch import nn

class Gate(nn.Module):
    def __init__(self, channels, k_size=3):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, k_size, padding=k_size // 2, bias=False)

    def forward(self, x):
        gate = self.conv(x.mean((2, 3))[:, None])[:, 0].sigmoid()
        return x * gate[:, :, None, None]

class Halves(nn.Module):
    def __init__(self, channels):
        super().__init__()

    def forward(self, x):
        return x[:, ::2]
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


def fields_of(network):
    return {"format": 1, **weights.describe_network(network), "state_dict": network.state_dict()}


@pytest.mark.parametrize("name", LIGHT)
def test_timms_attention_stands_in_the_slot_of_ours(name):
    for arch in ("resnet18", "mobilenetv2"):
        network = models.create_model(arch, attention=f"timm:{name}", num_classes=3).eval()
        layers = every_attention(network)
        expected = type(timm.layers.create_attn(name, 64))
        blocks = {"resnet18": 8, "mobilenetv2": 17}[arch]
        assert [type(entry.layer) for entry in layers] == [expected] * blocks
        again = weights.network_from_checkpoint(fields_of(network)).eval()
        assert again.attention == f"timm:{name}"
        with torch.inference_mode():
            assert torch.equal(again(X), network(X))


def test_block_computes_attention_before_the_addition():
    network = models.create_model("resnet18", attention="timm:cbam", num_classes=3).eval()
    block, x = network.layer2[1], torch.randn(2, 128, 8, 8)
    with torch.inference_mode():
        z = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x)))))
        expected = torch.relu(block.attention(z) + x)
        torch.testing.assert_close(block(x), expected)
        assert not torch.allclose(block(x), torch.relu(z + x), atol=1e-3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:bat", "timm:bat cannot be built with channels alone"),
        ("timm:nothing", "Invalid attn module"),
        ("mine.py:Gate", "is run only where it is typed"),
        ("cbam", "unknown attention 'cbam': use one of .*timm:NAME or FILE.py:CLASS"),
    ],
)
def test_unknown_attentions_are_refused(name, message):
    with pytest.raises(ValueError, match=message) as error:
        find_attention(name)
    assert "\n" not in str(error.value)


def test_weights_without_attention_leave_timms_new():
    plain = models.create_model("resnet18", num_classes=3)
    network = models.create_model("resnet18", attention="timm:se", num_classes=3)
    (_, note) = weights.load_weights(network, plain.state_dict(), add_attention=True)
    assert note == "The weights have no attention: 32 attention parameters are new."
    trained = copy.deepcopy(network)
    assert len(weights.load_weights(trained, network.state_dict(), add_attention=True)) == 1


def test_own_layer_is_rebuilt_only_where_it_is_given(file):
    kind = typed_attention(f"{file}:Gate")
    for arch, k in (("eca_resnet18", (3, 5, 7, 7)), ("torchvision:resnet18", (3, 3, *[5] * 6))):
        network = models.create_model(arch, attention=kind, num_classes=3).eval()
        assert network.ksize == k
        assert network.attention == "mine.py:Gate"
        fields = fields_of(network)
        modules = set(sys.modules)
        with pytest.raises(ValueError, match=r"never runs: give `attention=mine\.py:Gate"):
            weights.network_from_checkpoint(fields)
        with pytest.raises(ValueError, match=r"its attention is mine\.py:Gate: leave"):
            weights.network_from_checkpoint(fields, "eca")
        assert set(sys.modules) == modules
        again = weights.network_from_checkpoint(fields, kind).eval()
        assert torch.equal(again(X), network(X))
        assert again.attention_note == ""
        file.write_text(SOURCE + "# another\n")
        changed = weights.network_from_checkpoint(fields, typed_attention(f"{file}:Gate"))
        assert changed.attention_note.startswith("! mine.py:Gate has changed since")
        file.write_text(SOURCE)


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("mine.py:Halves", SOURCE, r"makes \(2, 32, 7, 9\) of \(2, 64, 7, 9\)"),
        ("mine.py:Nothing", SOURCE, "has no class Nothing"),
        ("mine.py:Gate", "1 / 0", "mine.py fails: ZeroDivisionError"),
        ("other.py:Gate", SOURCE, "no file .*other.py; give FILE.py:CLASS"),
    ],
)
def test_own_layers_that_do_not_fit_are_refused(file, name, source, message):
    file.write_text(source)
    with pytest.raises(ValueError, match=message) as error:
        find_attention(typed_attention(f"{file.parent}/{name}"))
    assert "\n" not in str(error.value)


def test_any_attention_goes_into_another_network(file):
    kind = typed_attention(f"{file}:Gate")
    for arch, attention in (("resnet18", "timm:gc"), ("test_efficientnet", kind)):
        network = timm.create_model(arch, num_classes=3).eval()
        keys = set(network.state_dict())
        done = models.add_attention(network, attention, quiet=True)
        assert keys < set(network.state_dict())
        assert len(done) == {"resnet18": 8, "test_efficientnet": 4}[arch]
        assert network(X).shape == (2, 3)
        assert models.add_attention(network, attention, quiet=True) == []
    with pytest.raises(ValueError, match="none that starts as identity"):
        models.add_attention(network, "timm:gc", identity=True)
