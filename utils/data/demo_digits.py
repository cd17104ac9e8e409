"""demo:digits: scikit-learn's handwritten digits as an ImageFolder tree, without a download."""

from pathlib import Path

import numpy as np
from PIL import Image

from utils.system.errors import UserError

SPLIT_SEED = 0
VAL_SHARE = 0.2
PIXELS = 32  # the 8 x 8 scans, enlarged once, so that every run reads the same files

# Digits are small, never mirrored and fill their frame: what differs from photographs. It holds for
# every --recipe: TrivialAugment would turn a 6 into a 9 and shift it out of its 32 pixels, and a
# demo of 8 epochs must see each image in each of them. Mixing, smoothing and averaging remain.
DIGITS_RECIPE = {
    "epochs": 8,
    "batch_size": 32,
    "lr": 0.05,
    "weight_decay": 1e-4,
    "schedule": "cosine",
    "warmup_epochs": 1.0,
    "img_size": 32,
    "crop_pct": 1.0,
    "min_scale": 0.7,
    "hflip": 0.0,
    "auto_augment": "none",
    "repeats": 1,
    "train_size": 0,
}


def write_digits(folder: Path) -> None:
    """Writes the 1,797 digits to folder/{train,val}/{0..9}/NNNN.png.

    One in five of each class goes to val, the same ones every time.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "the digits come with scikit-learn, which is not installed: "
            "pip install -r requirements-dev.txt"
        ) from None
    digits = load_digits()
    chance = np.random.default_rng(SPLIT_SEED)
    for label in range(10):
        members = chance.permutation(np.flatnonzero(digits.target == label))
        first_train = round(len(members) * VAL_SHARE)
        for part, indices in (("val", members[:first_train]), ("train", members[first_train:])):
            place = folder / part / str(label)
            place.mkdir(parents=True)
            for index in indices:
                pixels = (digits.images[index] * (255 / 16)).astype(np.uint8)
                image = Image.fromarray(pixels).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)
                image.save(place / f"{index:04d}.png")
