"""Images many times longer than wide: the same pixels as torchvision's, in bounded memory."""

import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from utils.data.transforms import eval_transform

SIDES = [(1, 200), (3, 400), (400, 7), (13, 300), (500, 20), (20, 3000), (3000, 3), (600, 9700)]


@pytest.mark.parametrize(("height", "width"), SIDES)
@pytest.mark.parametrize(("img_size", "crop_pct"), [(224, 0.875), (32, 1), (31, 0.85), (40, 1.25)])
def test_pixels_are_those_of_the_whole_resized(height, width, img_size, crop_pct):
    chance = torch.Generator().manual_seed(height)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=chance)
    whole = v2.Compose([v2.Resize(round(img_size / crop_pct)), v2.CenterCrop(img_size)])
    ours = eval_transform(img_size, crop_pct)
    found, wanted = ours(image), whole(image)
    assert found.shape == (3, img_size, img_size)
    apart = (found.int() - wanted.int()).abs().max()
    # Without AVX2, or NEON, torchvision's v2 resizes in float32.
    assert apart == 0 if "AVX" in torch.backends.cpu.get_cpu_capability() else apart <= 1

    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    found, wanted = (np.asarray(f(picture)).astype(int) for f in (ours, whole))
    enlarged = min(height, width) <= round(img_size / crop_pct)
    assert np.abs(found - wanted).max() <= (0 if enlarged else 1)


@pytest.mark.parametrize(("decoder", "sides"), [("torchvision", (60_000, 1)), ("pil", (1, 60_000))])
def test_memory_is_bounded(tmp_path, sides, decoder):
    """The whole, resized, would take 11 GB for 60,000 x 1."""
    Image.new("RGB", sides, (10, 200, 30)).save(tmp_path / "long.png")
    program = f"""
import resource
from utils.data.decoding import read_image, to_tensor
from utils.data.transforms import eval_transform
import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
image = eval_transform(224, 0.875)(read_image({str(tmp_path / "long.png")!r}, {decoder!r}))
if not isinstance(image, torch.Tensor):
    image = to_tensor(image)
assert image.shape == (3, 224, 224)
assert (image.flatten(1).amin(1).tolist() == image.flatten(1).amax(1).tolist() == [10, 200, 30])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))  # noqa: E731
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        preexec_fn=limit,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64 << 10  # KiB
