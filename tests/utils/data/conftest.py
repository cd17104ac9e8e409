"""Images for the tests of loaders."""

import numpy as np
import pytest
from PIL import Image

from utils.data.image_folder import scan


@pytest.fixture
def noisy_images(tmp_path):
    """14 noisy images of different sizes in two classes."""
    chance = np.random.default_rng(0)
    for i in range(14):
        place = tmp_path / "images" / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        size = (20 + i, 40 - i, 3)
        Image.fromarray(chance.integers(0, 255, size, dtype=np.uint8)).save(place / f"{i:02}.png")
    return scan(str(tmp_path / "images"))
