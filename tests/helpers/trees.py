"""Where the repository is, and small trees of images."""

from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def write_tree(root: Path, train: int = 8, val: int = 5, classes: str = "abc") -> Path:
    """root/{train,val}/CLASS/N.png: one colour a class, with noise, so that a net can learn it."""
    chance = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = chance.integers(0, 120, (40, 40, 3))
                pixels[..., label % 3] += 120
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root
