"""A detector's step and its detections, on networks made of a few numbers."""

import pytest
import torch
from torch import nn

from utils.detection.batches import DetectionBatch
from utils.detection.engine import LossMeter, detect, train_epoch
from utils.system.errors import EXIT_NON_FINITE, UserError
from utils.training.finite_guard import NonFiniteGuard

CPU = torch.device("cpu")
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def no_autocast():
    return torch.autocast("cpu", enabled=False)


class Losses(nn.Module):
    """Two losses of one weight: their sum's gradient is the mean of the images."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images, targets=None):
        value = torch.stack([image.mean() for image in images]).mean() * self.weight.sum()
        return {"a": value, "b": 2 * value}


def batch_of(value):
    return DetectionBatch([torch.full((3, 4, 4), value)], [{}], [1])


def run(network, values, clip=1e9, lr=1.0):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    meter, guard = LossMeter(CPU, ("a", "b")), NonFiniteGuard(CPU)
    epoch = train_epoch(
        network,
        map(batch_of, values),
        optimizer,
        meter,
        guard,
        first_step=7,
        lr_at=lambda step: lr * (step - 6),
        clip=clip,
        seed=0,
        autocast=no_autocast,
        scaler=NO_SCALER,
    )
    return list(epoch), meter


def test_a_step_sums_the_losses_and_takes_the_steps_rate():
    network = Losses()
    batches, meter = run(network, [1.0, 2.0])
    assert len(batches) == 2
    assert network.weight.item() == pytest.approx(-(3 * 1.0 * 1 + 3 * 2.0 * 2))
    means = meter.means(meter.total())  # the second step's losses are of weight -3
    assert means == pytest.approx({"a": -3.0, "b": -6.0, "loss": -9.0})


def test_the_gradient_is_clipped():
    network = Losses()
    run(network, [100.0], clip=0.5)
    assert network.weight.item() == pytest.approx(-0.5, rel=1e-4)


def test_a_loss_that_is_not_finite_never_reaches_the_weights():
    network = Losses()
    with pytest.raises(UserError, match="step 9") as caught:
        run(network, [1.0, float("nan")])
    assert caught.value.exit_code == EXIT_NON_FINITE
    assert network.weight.item() == pytest.approx(-3.0)


class FindsOne(nn.Module):
    def forward(self, images, targets=None):
        assert not self.training
        assert not torch.is_grad_enabled()
        return [
            {
                "boxes": torch.tensor([[1.0, 1.0, 3.0, 4.0]]),
                "labels": torch.tensor([2]),
                "scores": torch.tensor([0.5]),
            }
        ] * len(images)


def test_detections_in_cocos_format_or_none_when_stopped():
    batches = [batch_of(0.0), batch_of(1.0)]
    found = detect(FindsOne().train(), batches, [5, 9], 1, no_autocast)
    assert found == [{"image_id": 1, "category_id": 9, "bbox": [1, 1, 2, 3], "score": 0.5}] * 2
    assert detect(FindsOne(), batches, [5, 9], 1, no_autocast, stop=lambda: True) is None
