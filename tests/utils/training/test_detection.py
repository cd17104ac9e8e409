"""A detector's step and its detections, on networks made of a few numbers."""

import pytest
import torch
from torch import nn

from utils.config.detection import DetectionRecipe
from utils.config.flags import RunSettings
from utils.runs.checkpoint import CheckpointFolder
from utils.runs.writer import RunFiles
from utils.system.distributed import Votes
from utils.system.errors import EXIT_NON_FINITE, UserError
from utils.system.signals import StopRequest
from utils.training.detection import LossMeter, detect, train_one_epoch
from utils.training.detection_data import DetectionBatch
from utils.training.detector import CHECKED
from utils.training.optim import StepRule
from utils.training.progress import Progress
from utils.training.state import NonFiniteGuard, TrainingState

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
        return {"loss_a": value, "loss_b": 2 * value}


def batch_of(value):
    return DetectionBatch([torch.full((3, 4, 4), value)], [{}], [1])


def run(network, values, scaler=NO_SCALER, saving=None, stop=None, progress=None, **recipe):
    """Trains from the third step of the second epoch on, which is the run's step 7."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    meter, guard = LossMeter(CPU, ("loss_a", "loss_b")), NonFiniteGuard(CPU, CHECKED)
    state = TrainingState(network, optimizer, scaler, meter, guard, epoch=1, step=2)
    done = train_one_epoch(
        state,
        network,
        map(batch_of, values),
        StepRule(DetectionRecipe(**{"lr": 1.0, "warmup_steps": 0, **recipe}), 5, 0, no_autocast),
        progress or Progress("epoch", 10**6, 1, 10**6),
        saving or RunFiles(None, {}),
        Votes(None),
        StopRequest() if stop is None else stop,
    )
    return state, done


def test_a_step_sums_the_losses_and_takes_the_steps_rate():
    network = Losses()
    rising = {"lr": 10.0, "warmup_steps": 10, "warmup_factor": 0.0}  # the rate is the step's number
    state, done = run(network, [1.0, 2.0], clip=1e9, **rising)
    assert done
    assert (state.epoch, state.step) == (1, 4)
    assert network.weight.item() == pytest.approx(-(3 * 1.0 * 7 + 3 * 2.0 * 8))
    means = state.meter.means()  # the second step's losses are of weight -21
    assert means == pytest.approx({"loss_a": -21.0, "loss_b": -42.0, "loss": -63.0})


def test_the_gradient_is_clipped():
    network = Losses()
    run(network, [100.0], clip=0.5)
    assert network.weight.item() == pytest.approx(-0.5, rel=1e-4)


@pytest.mark.parametrize(("clip", "moved"), [(0.5, 0.5), (1000.0, 300.0)])
def test_a_scaled_gradient_is_clipped_by_its_own_norm(clip, moved):
    """With float16's scaler the gradient is 1,024 times as large until it is unscaled."""
    network = Losses()
    run(network, [100.0], clip=clip, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    assert network.weight.item() == pytest.approx(-moved, rel=1e-4)


def test_a_loss_that_is_not_finite_never_reaches_the_weights():
    network = Losses()
    with pytest.raises(UserError, match="step 9") as caught:
        run(network, [1.0, float("nan")], clip=1e9)
    assert caught.value.exit_code == EXIT_NON_FINITE
    assert network.weight.item() == pytest.approx(-3.0)


def test_what_is_drawn_in_a_step_is_a_function_of_its_number():
    class Sampling(Losses):
        def forward(self, images, targets=None):
            drawn.append(torch.rand(1).item())
            return super().forward(images)

    drawn = []
    run(Sampling(), [1.0, 2.0])
    torch.rand(100)
    run(Sampling(), [5.0, 6.0])
    assert drawn[:2] == drawn[2:]
    assert drawn[0] != drawn[1]


def test_a_checkpoint_inside_the_epoch_is_of_the_step_before_it(tmp_path):
    saving = RunFiles(tmp_path, {"arch": "x"}, flags=RunSettings(save_every=3))
    state, done = run(Losses(), [1.0, 2.0], saving=saving)
    saved = torch.load(CheckpointFolder(tmp_path).last, weights_only=True)
    assert done
    assert (saved["progress"]["epoch"], saved["progress"]["step"], state.step) == (1, 3, 4)
    assert saved["state_dict"]["weight"].item() == pytest.approx(-3.0)
    assert state.network.weight.item() == pytest.approx(-9.0)


def test_a_run_that_is_asked_to_stop_finishes_its_step_and_is_saved(tmp_path):
    """With nothing due."""
    stop, network = StopRequest(), Losses()
    stop.signum = 15
    state, done = run(network, [1.0, 2.0], saving=RunFiles(tmp_path, {"arch": "x"}), stop=stop)
    assert (done, state.step) == (False, 3)
    saved = torch.load(CheckpointFolder(tmp_path).last, weights_only=True)
    assert saved["progress"]["step"] == 3
    assert saved["state_dict"]["weight"].item() == network.weight.item() == pytest.approx(-3.0)


def test_the_line_of_progress_names_the_losses(capsys):
    run(Losses(), [1.0, 2.0], progress=Progress("epoch 1/2", 4, 8, 2))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("epoch 1/2  step 2/4  loss -9.000 (a -3.000, b -6.000)  lr 1  ")


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
