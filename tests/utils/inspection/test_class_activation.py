"""Maps of where the evidence lies: the right numbers, drawn over the right pixels."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from models import create_model
from models.inspection import feature_maps, grad_cam
from utils.data.transforms import Preprocessing
from utils.inspection.pictures import COLOURS, draw_map, seen_square


@pytest.mark.parametrize("name", ["eca_resnet18", "eca_mobilenetv2", "resnet18"])
def test_map_of_the_last_stage_is_the_class_weights_map(name):
    """With a global mean and one linear layer behind it, Grad-CAM is CAM."""
    torch.manual_seed(0)
    network = create_model(name, num_classes=4).eval().requires_grad_(False)
    images = torch.randn(3, 3, 96, 128)
    stages = feature_maps(network)
    for classes in (None, torch.tensor([1, 2, 0])):
        logits, maps = grad_cam(network, list(stages.values())[-1], images, classes)
        assert maps.shape == (3, 3, 4)
        torch.testing.assert_close(logits, network(images))
        chosen = logits.argmax(1) if classes is None else classes
        head = network.get_submodule(network.head).weight[chosen]
        features = network.forward_features(images)
        cam = torch.einsum("nc,nchw->nhw", head, features).clamp(min=0)
        expected = cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-12)
        torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-5)
    sides = [grad_cam(network, stage, images)[1].shape[1] for stage in stages.values()]
    assert sides == [96 // 2**i for i in range(6 - len(sides), 6)]


def test_map_of_an_earlier_stage_weighs_channels_by_their_mean_gradient():
    """There the gradient differs from pixel to pixel."""
    torch.manual_seed(0)
    network = create_model("eca_resnet18", num_classes=4).eval().double()
    images, seen = torch.randn(2, 3, 64, 96, dtype=torch.float64), []
    handle = network.layer3.register_forward_hook(lambda *parts: seen.append(parts[2]))
    logits = network(images)
    handle.remove()
    (gradient,) = torch.autograd.grad(logits.amax(1).sum(), seen)
    expected = torch.zeros(2, 4, 6, dtype=torch.float64)
    for channel in range(256):
        weight = gradient[:, channel].flatten(1).mean(1)
        expected += weight[:, None, None] * seen[0][:, channel].detach()
    expected = expected.clamp(min=0) / expected.amax((1, 2), keepdim=True)
    _, maps = grad_cam(network, network.layer3, images)
    torch.testing.assert_close(maps.double(), expected, rtol=1e-4, atol=1e-5)


def test_map_finds_where_the_evidence_is():
    class Corner(nn.Module):
        """Class 1 is brightness."""

        def __init__(self):
            super().__init__()
            self.stage = nn.Conv2d(3, 2, 1)
            nn.init.constant_(self.stage.weight, 1)

        def forward(self, x):
            y = self.stage(x).mean((2, 3))
            return torch.stack((torch.zeros(len(y)), y[:, 0]), 1)

    images = torch.zeros(1, 3, 8, 8)
    images[:, :, :2, 5:] = 1
    network = Corner()
    nn.init.zeros_(network.stage.bias)
    _, maps = grad_cam(network, network.stage, images)
    assert torch.equal(maps[0], images[0, 0])
    _, maps = grad_cam(network, network.stage, images, torch.tensor([0]))
    assert torch.equal(maps[0], torch.zeros(8, 8))  # nothing speaks for class 0: no NaN


@pytest.mark.parametrize(("width", "height"), [(300, 200), (200, 300), (250, 250)])
def test_the_square_shown_is_the_one_seen(width, height):
    x = torch.arange(width).expand(height, -1) * 200 / width
    y = torch.arange(height)[:, None].expand(-1, width) * 200 / height
    image = torch.stack((x, y, x)).to(torch.uint8)
    seen = Preprocessing(64, 0.8)(image).float()
    left, top, side = seen_square(width, height, 64, 0.8)
    for axis, begin, whole in ((0, left, width), (1, top, height)):
        line = seen[axis].amin(axis), seen[axis].amax(axis)
        assert seen[axis].min() == pytest.approx(begin * 200 / whole, abs=5), line
        assert seen[axis].max() == pytest.approx((begin + side) * 200 / whole, abs=5), line


@pytest.mark.parametrize("size", [(160, 80), (80, 160)])
def test_map_is_drawn_where_it_is_hot(size, figures):
    """One hot position of 4 x 4, which no turn or reflection of the square leaves in its place."""
    heat = np.zeros((4, 4))
    heat[0, 2] = 1
    square = seen_square(*size, 64, 0.8)  # of 64 of the short side's 80 pixels
    ranking = [("ant", 0.75), ("bee", 0.25)]
    draw_map(Image.new("RGB", size, (128,) * 3), heat, square, "a.png", ranking, "layer4")
    (figure,) = figures
    plain, overlay, _, bars = figure.axes
    shown, coloured = (axis.images[0].get_array() for axis in (plain, overlay))
    scale = 448 / 160
    assert shown.shape == coloured.shape == (scale * size[1], scale * size[0], 3)
    left, top = (scale * (side - 64) / 2 for side in size)
    seen = np.zeros(shown.shape[:2], bool)
    seen[round(top) : round(top + 64 * scale), round(left) : round(left + 64 * scale)] = True
    grey, cell = 128 / 255, 16 * scale
    hottest = 0.75 * np.array(COLOURS(1.0)[:3]) + 0.25 * grey
    distance = np.abs(coloured - hottest).sum(2)
    row, column = np.unravel_index(np.where(seen, distance, 9).argmin(), seen.shape)
    assert round(top) <= row < top + cell
    assert left + 2 * cell < column < left + 3 * cell
    assert distance[row, column] < 0.05
    assert (np.abs(coloured[seen] - grey).max(1) < 1e-6).mean() > 0.5  # cold: as it is, in grey
    np.testing.assert_allclose(coloured[~seen], 0.3 * grey)  # not seen: dark
    assert [bar.get_width() for bar in bars.patches] == [75, 25]
    assert [text.get_text() for text in bars.get_yticklabels()] == ["ant", "bee"]
