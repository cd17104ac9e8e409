"""Two processes on the CPU do what one does, and one of them writes."""

import json
from pathlib import Path

import torch

import models
from utils.data.image_folder import scan
from utils.data.loader import ImageDataset
from utils.data.sampler import SeededBatches
from utils.data.transforms import IMAGENET_MEAN, IMAGENET_STD, train_transform
from utils.runs import checkpoint

# One step at 96 pixels: BatchNorm over the few values that small batches and images leave it blows
# rounding up a hundredfold at every further step.
OPTIONS = "-a resnet18 --img-size 96 -b 24 -j 0 --epochs 1 --lr 0.001 --seed 1 --min-scale 0.7"
FLAGS = OPTIONS.split()


def test_two_ranks_train_and_evaluate_as_one(run, call, tree, tmp_path):
    done = run("main.py", *FLAGS, "--output", "two", tree, ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder: two") == 1
    assert "2 processes (DistributedDataParallel)" in done.stdout
    saved = checkpoint.load(tmp_path / "two" / "last.pth")
    assert not any(key.startswith("module.") for key in saved["state_dict"])
    assert saved["state_dict"]["bn1.num_batches_tracked"] == 1
    assert_step_of_two_halves(saved["state_dict"], tree, batch=24, lr=0.001, seed=1)

    # 15 images over two ranks: 8 and 7, each once, and the figures of one process.
    assert call("-e", "--resume", "two/best.pth", "--output", "one")[0] == 0
    one = json.loads((tmp_path / "one" / "evaluation.json").read_text())
    row = saved["history"][0]
    assert one["images"] == 15
    assert (one["top1"], one["top5"]) == (row["val_top1"], row["val_top5"])
    assert abs(one["loss"] - row["val_loss"]) < 1e-6 * one["loss"]


def assert_step_of_two_halves(
    found: dict[str, torch.Tensor], tree: Path, batch: int, lr: float, seed: int
) -> None:
    """Training against a loop written out here: each half batch by itself, gradients averaged.

    What a step changed is compared, not the weights: they hardly move, and would hide a wrong step.
    Rounding alone comes to 0.4 % in the first layers (float32 on AVX-512); a gradient that is not
    shared, to more than half.
    """
    before, reference = two_halves(tree, batch, lr, seed)
    for key, start in before.items():
        expected = (reference[key] - start).double()
        off = (found[key] - reference[key]).double()
        assert off.norm() <= 0.02 * expected.norm() + 1e-7, key


def two_halves(
    tree: Path, batch: int, lr: float, seed: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """One epoch of data-parallel SGD over two replicas, in one process, without fusing and in
    double precision: the state before and after."""
    images = scan(str(tree / "train"))
    dataset = ImageDataset(images, train_transform(96, 0.7, 0.5), seed)
    torch.manual_seed(seed)
    network = models.create_model("resnet18", num_classes=3).double()
    models.set_fused(network, False)
    first = {key: value.clone() for key, value in network.state_dict().items()}
    optimizer = torch.optim.SGD(network.parameters(), lr, momentum=0.9, weight_decay=1e-4)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    halves = [SeededBatches(len(images), batch, seed, rank, 2) for rank in (0, 1)]
    for keys in zip(*halves, strict=True):
        optimizer.zero_grad()
        for rank in (1, 0):
            items = [dataset[key] for key in keys[rank]]
            x = (torch.stack([item[0] for item in items]).double() / 255 - mean) / std
            y = torch.tensor([item[1] for item in items])
            before = [buffer.clone() for buffer in network.buffers()]
            (torch.nn.functional.cross_entropy(network(x), y) / 2).backward()
            if rank == 1:  # BatchNorm's statistics are those of rank 0
                for buffer, old in zip(network.buffers(), before, strict=True):
                    buffer.copy_(old)
        optimizer.step()
    return first, network.state_dict()
