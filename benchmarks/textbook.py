"""The networks as they are commonly written, on torchvision's: what the project competes with.

ECA as published: pool, conv1d over the channels, sigmoid, multiply, each a call on the whole
tensor; and squeeze-and-excitation in the same place.
"""

from functools import partial

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

LAYERS = {18: [2, 2, 2, 2], 50: [3, 4, 6, 3]}
KSIZES = {18: (3, 5, 7, 7), 50: (3, 5, 5, 7)}  # the released kernel sizes, one a stage


class TextbookECA(nn.Module):
    def __init__(self, k: int):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.conv = nn.Conv1d(1, 1, k, padding=(k - 1) // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.pool(x).squeeze(-1).transpose(-1, -2))
        y = torch.sigmoid(y.transpose(-1, -2).unsqueeze(-1))
        return x * y.expand_as(x)


class TextbookSE(nn.Module):
    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channels // reduction, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        return x * self.fc(self.pool(x).view(n, c)).view(n, c, 1, 1).expand_as(x)


class _AttentionAfter(nn.Sequential):
    """The last BatchNorm and what follows it, in BatchNorm's place in torchvision's block."""


def _insert(network: ResNet, attention) -> ResNet:
    stages = (network.layer1, network.layer2, network.layer3, network.layer4)
    for i, stage in enumerate(stages):
        for block in stage:
            name = "bn3" if isinstance(block, Bottleneck) else "bn2"
            bn = getattr(block, name)
            setattr(block, name, _AttentionAfter(bn, attention(i, bn.num_features)))
    return network


def plain_resnet(depth: int = 50, num_classes: int = 1000) -> ResNet:
    return ResNet(Bottleneck if depth == 50 else BasicBlock, LAYERS[depth], num_classes)


def eca_resnet(depth: int = 50, num_classes: int = 1000) -> ResNet:
    plain = plain_resnet(depth, num_classes)
    return _insert(plain, lambda stage, c: TextbookECA(KSIZES[depth][stage]))


def se_resnet(depth: int = 50) -> ResNet:
    return _insert(plain_resnet(depth), lambda stage, c: TextbookSE(c))


def plain_mobilenetv2(num_classes: int = 1000) -> nn.Module:
    return torchvision.models.mobilenet_v2(num_classes=num_classes)


def eca_mobilenetv2(num_classes: int = 1000) -> nn.Module:
    network = plain_mobilenetv2(num_classes)
    for block in network.features:
        if isinstance(block, InvertedResidual):
            channels = block.conv[-1].num_features
            block.conv.append(TextbookECA(1 if channels < 96 else 3))
    return network


# Our names; the same layers in the same order, so that weights can be carried over.
OF_OURS = {
    "eca_resnet18": partial(eca_resnet, 18),
    "eca_resnet50": partial(eca_resnet, 50),
    "eca_mobilenetv2": eca_mobilenetv2,
}


def timm_eca_resnet(depth: int = 50) -> nn.Module | None:
    """timm's ResNet of the same layout with timm's ECA, or None where timm is not installed."""
    try:
        import timm
    except ImportError:
        return None
    return timm.create_model(f"resnet{depth}", block_args={"attn_layer": "eca"})
