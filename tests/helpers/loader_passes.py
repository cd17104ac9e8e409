"""One pass of a loader over a folder of images, by a recipe for small ones."""

import torch

from utils.config.classification import Recipe
from utils.data.loader import Loader
from utils.data.sampler import SeededBatches
from utils.training.classification_data import training_batches

CPU = torch.device("cpu")
RECIPE = Recipe(
    arch="x",
    epochs=1,
    batch_size=4,
    lr=0.1,
    momentum=0.9,
    weight_decay=0,
    schedule="step",
    img_size=16,
    crop_pct=0.8,
)


def train_pass(folder, seed=0, epoch=0, step=0, workers=0, skip=False, decoder="simplejpeg"):
    order = SeededBatches(len(folder), RECIPE.batch_size, seed)
    order.seek(epoch, step)
    loader = Loader(CPU, workers, 60, decoder)
    return list(training_batches(folder, order, RECIPE, seed, loader, skip)())


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x.images, y.images) and torch.equal(x.targets, y.targets)
        for x, y in zip(a, b, strict=True)
    )
