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
from utils.config.classification import lr_at
from utils.data.sampler import SeededBatches, mix_seed
from utils.runs import checkpoint
from utils.runs.checkpoint import CheckpointFolder
from utils.runs.writer import RunFiles, Saving
from utils.system.distributed import Votes
from utils.system.errors import UserError
from utils.system.faults import run_script
from utils.system.signals import StopRequest
from utils.training.classification import ClassificationMeter, cross_entropy
from utils.training.state import NonFiniteGuard, TrainingState

IMAGES = 1_281_167
CPU = torch.device("cpu")


def main() -> None:
    parser = side.make_parser(__doc__, batch=(16, 16), rounds=7)
    parser.add_argument("--arch", default="eca_resnet50")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written")
    parser.set_defaults(device="cpu")
    args = side.settle(parser.parse_args())
    if args.smoke:
        args.arch = "mobilenetv2"
    images = 1000 if args.smoke else IMAGES
    torch.manual_seed(0)
    state = new_state(args.arch)
    step = median(training_step(state, args.batch, args.img_size), args.rounds, 1)
    parts = {
        "order of the images, seeded": seeded_order(images, args.batch, args.rounds),
        "seeds of augmentation": median(lambda: seed_samples(args.batch), args.rounds, 20),
        "seed of the step": median(lambda: torch.manual_seed(mix_seed(1, 12345)), args.rounds, 100),
        "learning rate": median(learning_rate, args.rounds, 1000),
        "guard against non-finite losses": guard(args.rounds),
        "questions: stop? save?": questions(args.rounds),
    }
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        saving, size = checkpoints(state, Path(folder), args.rounds)
    report = {
        "benchmark": "resume_overhead",
        "arch": args.arch,
        "batch": args.batch,
        "img_size": args.img_size,
        "device": side.device_name(CPU),
        "torch": str(torch.__version__),
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
    show(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def median(function: Callable[[], object], rounds: int, repeat: int) -> float:
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
        ClassificationMeter(CPU),
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


def seeded_order(images: int, batch: int, rounds: int) -> float:
    """Of a batch, with the epoch's shuffle spread over its batches."""
    order = SeededBatches(images, batch, seed=1)
    return median(lambda: sum(1 for _ in order), rounds, 1) / order.steps


def usual_order(images: int, batch: int, rounds: int) -> float:
    """The same of torch's own samplers, which cannot be taken up again in an epoch."""
    order = BatchSampler(RandomSampler(range(images)), batch, drop_last=True)
    return median(lambda: sum(1 for _ in order), rounds, 1) / len(order)


def seed_samples(batch: int) -> None:
    """As `ImageDataset` does around the transforms of each image."""
    for index in range(batch):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix_seed(1, 2, index))


def learning_rate() -> float:
    return lr_at(12345, 80072, lr=0.1, epochs=100, schedule="cosine", warmup_epochs=5)


def guard(rounds: int) -> float:
    guard, loss = NonFiniteGuard(CPU), torch.tensor(1.0)
    return median(lambda: guard.before_update(loss, 1, None, "loss"), rounds, 100)


def questions(rounds: int) -> float:
    """What the loop asks after each step; saving is not due."""
    files, votes, stop = (
        RunFiles(None, {}, saving=Saving(10**9, 10**9)),
        Votes(None),
        StopRequest(),
    )
    return median(lambda: votes.cast(bool(stop), files.due(12345)), rounds, 100)


def checkpoints(state: TrainingState, folder: Path, rounds: int) -> tuple[float, int]:
    """Seconds to snapshot and write one, the former one kept, and its size in bytes."""
    files = CheckpointFolder(folder)
    seconds = median(lambda: files.save_last(state.snapshot()), rounds, 1)
    if not checkpoint.is_whole(files.last):
        raise UserError(f"{files.last}: is not whole")
    return seconds, files.last.stat().st_size


def show(report: dict[str, object]) -> None:
    step = report["step_s"]
    print(f"{report['device']}, torch {report['torch']}")
    print(f"step of {report['arch']} at batch {report['batch']}: {step:.3f} s")
    for name, seconds in report["parts_s"].items():
        print(f"  {name:<34} {1e6 * seconds:10.1f} µs  {100 * seconds / step:8.4f} %")
    print(f"  {'all of them':<34} {'':13} {100 * report['parts_share']:8.4f} %")
    print(f"  (torch's own order of the images   {1e6 * report['usual_order_s']:10.1f} µs)")
    print(
        f"checkpoint: {report['checkpoint_s']:.2f} s for {report['checkpoint_mb']:.0f} MB; "
        f"{100 * report['checkpoint_share_per_epoch']:.4f} % once an epoch, "
        f"{100 * report['checkpoint_share_every_10_minutes']:.2f} % every 10 minutes; "
        f"1 % is one in {report['steps_between_checkpoints_for_1_percent']} steps"
    )


if __name__ == "__main__":
    run_script(main)
