"""The attentions that ECA is compared with, against their equations."""

import math

import pytest
import torch

from models.attention import ATTENTIONS, find_attention

C, K = 32, 5


def logits(attention, layer, y):
    """f(y) of one image, channel by channel, in Python floats."""
    weights = {name: p.tolist() for name, p in layer.named_parameters()}
    if attention == "se_var1":
        return y
    if attention == "se_var2":
        return [w * v for w, v in zip(weights["weight"], y, strict=True)]
    if attention == "se_var3":
        return product(weights["fc.weight"], y)
    if attention == "se":
        hidden = [max(0.0, h) for h in product(weights["fc.0.weight"], y)]
        return product(weights["fc.2.weight"], hidden)
    rows = [row[0] for row in weights["conv.weight"]]  # eca_ns, eq. 7, and eca, eq. 9
    rows = rows * C if len(rows) == 1 else rows
    padded = [0.0] * (K // 2) + y + [0.0] * (K // 2)
    return [sum(w * padded[c + j] for j, w in enumerate(row)) for c, row in enumerate(rows)]


def product(matrix, vector):
    return [sum(w * v for w, v in zip(row, vector, strict=True)) for row in matrix]


@pytest.mark.parametrize("attention", [name for name, entry in ATTENTIONS.items() if entry])
def test_equals_the_equation(attention):
    torch.manual_seed(0)
    layer = ATTENTIONS[attention].build(C, K).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(2, C, 4, 3, dtype=torch.float64)
    expected = x.clone()
    for image in expected:
        y = [sum(channel.flatten().tolist()) / 12 for channel in image]
        for channel, z in zip(image, logits(attention, layer, y), strict=True):
            channel /= 1 + math.exp(-z)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("attention", [name for name, entry in ATTENTIONS.items() if entry])
def test_gradients_precision_and_format(attention):
    torch.manual_seed(0)
    layer = ATTENTIONS[attention].build(C, K)
    x = torch.randn(4, C, 4, 3).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    out = layer(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    out.square().sum().backward()
    for p in (x, *layer.parameters()):
        assert p.grad.abs().max() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.detach().bfloat16()).dtype == torch.bfloat16


def test_eca_ns_with_equal_rows_is_eca():
    torch.manual_seed(0)
    shared = ATTENTIONS["eca"].build(C, K)
    own = ATTENTIONS["eca_ns"].build(C, K)
    own.load_state_dict({"conv.weight": shared.conv.weight.expand(C, 1, K)})
    x = torch.randn(2, C, 4, 3)
    torch.testing.assert_close(own(x), shared(x))


def test_table():
    assert find_attention("none") is None
    assert [name for name, entry in ATTENTIONS.items() if entry and entry.takes_ksize] == [
        "eca",
        "eca_ns",
    ]
    with pytest.raises(ValueError, match="unknown attention 'eac': use one of eca"):
        find_attention("eac")
