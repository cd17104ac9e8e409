"""What exact resume costs: the seeded order and the checkpoints, as shares of a training step.

    python benchmarks/resume_overhead.py [--json FILE] [--folder DIR] [--smoke]

The step is one of eca_resnet50 at batch 16 (forward, loss, backward, SGD). Each part is timed by
itself, many times, because the whole of them is less than the step's own scatter; medians count.
Orders are those of ImageNet's 1,281,167 training images. Checkpoints are written where training
would write them (--folder, by default the temporary folder), flushed to the disk.
"""

import side_by_side as side  # first: it puts the repository on the path

# isort: split
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import BatchSampler, RandomSampler

import models
from main import RECIPE
from utils.config.flags import RunSettings
from utils.data.sampler import SeededBatches, mix_seed
from utils.runs import checkpoint
from utils.runs.checkpoint import CheckpointFolder
from utils.runs.writer import RunFiles
from utils.system.distributed import Votes
from utils.system.errors import UserError
from utils.system.faults import run_script
from utils.system.signals import StopRequest
from utils.training.classification import ClassificationMeter, cross_entropy
from utils.training.state import NonFiniteGuard, TrainingState

IMAGES = 1_281_167
CPU = torch.device("cpu")


def median(function: Callable[[], object], rounds: int, repeat: int = 1) -> float:
    """Seconds of one call: the median of `rounds`, each the mean of `repeat`."""
    function()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(repeat):
            function()
        times.append((time.perf_counter() - began) / repeat)
    return statistics.median(times)


def new_state(arch: str) -> TrainingState:
    network = models.create_model(arch).train()
    return TrainingState(
        network,
        torch.optim.SGD(network.parameters(), 1e-4, momentum=0.9, weight_decay=1e-4, fused=True),
        torch.amp.GradScaler("cpu", enabled=False),
        ClassificationMeter(CPU, 1000),
        NonFiniteGuard(CPU),
    )


def training_step(state: TrainingState, batch: int, img_size: int) -> Callable[[], None]:
    """A step without any of the parts that are measured."""
    images, targets = torch.randn(batch, 3, img_size, img_size), torch.randint(1000, (batch,))

    def step() -> None:
        loss = cross_entropy(state.network(images), targets)
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        state.optimizer.step()

    return step


def seed_samples(batch: int) -> None:
    """As `ImageDataset` does around the transforms of each image."""
    for index in range(batch):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix_seed(1, 2, index))


def parts_of_a_step(images: int, batch: int, rounds: int) -> dict[str, float]:
    """Seconds of each part for one batch; saving is not due."""
    order, loss = SeededBatches(images, batch, seed=1), torch.tensor(1.0)
    never = RunSettings(save_every=10**9, save_minutes=10**9)
    guard, files = NonFiniteGuard(CPU), RunFiles(None, {}, flags=never)
    votes, stop = Votes(None), StopRequest()
    recipe = RECIPE.override(schedule="cosine", warmup_epochs=5)
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "seeds of augmentation": (lambda: seed_samples(batch), 20),
        "seed of the step": (lambda: torch.manual_seed(mix_seed(1, 12345)), 100),
        "learning rate": (lambda: recipe.lr_at(12345, 80072), 1000),
        "guard against non-finite losses": (lambda: guard.before_update(loss, 1, None), 100),
        "questions: stop? save?": (lambda: votes.cast(bool(stop), files.due(12345)), 100),
    }
    parts = {"order of the images, seeded": median(lambda: sum(1 for _ in order), rounds)}
    parts["order of the images, seeded"] /= order.steps
    return parts | {name: median(call, rounds, repeat) for name, (call, repeat) in calls.items()}


def usual_order(images: int, batch: int, rounds: int) -> float:
    """The same of torch's own samplers, which cannot be taken up again in an epoch."""
    order = BatchSampler(RandomSampler(range(images)), batch, drop_last=True)
    return median(lambda: sum(1 for _ in order), rounds) / len(order)


def checkpoints(state: TrainingState, folder: Path, rounds: int) -> tuple[float, int]:
    """Seconds to snapshot and write one, the former one kept, and its size in bytes."""
    files = CheckpointFolder(folder)
    seconds = median(lambda: files.save_last(state.snapshot()), rounds)
    if not checkpoint.is_whole(files.last):
        raise UserError(f"{files.last}: is not whole")
    return seconds, files.last.stat().st_size


def main() -> None:
    parser = side.make_parser(__doc__, batch=(16, 16), rounds=7)
    parser.add_argument("--folder", type=Path, help="where checkpoints are written")
    parser.set_defaults(device="cpu")
    args = side.settle(parser.parse_args())
    arch, images = ("mobilenetv2", 1000) if args.smoke else ("eca_resnet50", IMAGES)
    torch.manual_seed(0)
    state = new_state(arch)
    step = median(training_step(state, args.batch, args.img_size), args.rounds)
    parts = parts_of_a_step(images, args.batch, args.rounds)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        saving, size = checkpoints(state, Path(folder), args.rounds)
    report = side.settings(args) | {
        "benchmark": "resume_overhead",
        "arch": arch,
        "step_s": step,
        "parts_s": parts,
        "parts_share": sum(parts.values()) / step,
        "usual_order_s": usual_order(images, args.batch, args.rounds),
        "checkpoint_s": saving,
        "checkpoint_mb": size / 1e6,
        "checkpoint_share_per_epoch": saving / (step * (images // args.batch)),
        "checkpoint_share_every_10_minutes": saving / 600,
        "steps_between_checkpoints_for_1_percent": round(saving / (0.01 * step)),
    }
    print(json.dumps(report, indent=2))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
