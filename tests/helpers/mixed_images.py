"""Pictures like photographs, for tests of decoders."""

import numpy as np
from PIL import Image

CHANCE = np.random.default_rng(0)


def photo(width: int = 80, height: int = 60, chance: np.random.Generator = CHANCE) -> Image.Image:
    """Smooth, as photographs are: decoders differ most at edges."""
    return Image.fromarray(chance.integers(0, 255, (6, 8, 3), np.uint8)).resize((width, height))


SMOOTH = photo(chance=np.random.default_rng(0))  # the same in every test
