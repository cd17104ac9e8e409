"""Crops, flips and sizes are torchvision's bit for bit; timm's RandAugment."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from torchvision import transforms as v1
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from utils.data.transforms import IMAGENET_MEAN, Preprocessing, is_timm_augment, train_transform

SIDES = [(500, 375), (375, 500), (64, 64), (28, 28), (5, 60), (33, 20), (224, 256), (1, 1)]
SIZES = [(224, 0.95), (64, 1), (31, 0.85), (40, 1.25), (7, 0.3)]  # 235.8; 1.25: a black frame


def random_image(height: int, width: int, channels_last: bool) -> torch.Tensor:
    chance = torch.Generator().manual_seed(height)
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=chance)
    image = pixels.permute(2, 0, 1)  # as a decoder gives it
    return image if channels_last else image.contiguous()


@pytest.mark.parametrize("capability", [None, "DEFAULT"])  # torchvision then resizes in float32
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("height", "width"), SIDES)
@pytest.mark.parametrize(("img_size", "crop_pct"), SIZES)
def test_pixels_are_torchvisions(
    height, width, img_size, crop_pct, channels_last, capability, monkeypatch
):
    if capability is not None:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    image = random_image(height, width, channels_last)
    theirs = v2.Compose([v2.Resize(round(img_size / crop_pct)), v2.CenterCrop(img_size)])
    ours = Preprocessing(img_size, crop_pct)
    assert torch.equal(ours(image), theirs(image))
    image = Image.fromarray(image.permute(1, 2, 0).numpy())
    assert np.array_equal(ours(image), theirs(image))


@pytest.mark.parametrize("min_scale", [0.08, 0.5, 1.0])
def test_crops_and_flips_are_torchvision_s(min_scale):
    """By the same draws, so that a seed means the same pixels."""
    ours = train_transform(48, min_scale, 0.5)
    image = random_image(60, 90, True)
    for seed in range(10):
        torch.manual_seed(seed)
        box = v1.RandomResizedCrop.get_params(image, [min_scale, 1.0], [3 / 4, 4 / 3])
        expected = F.resized_crop(image, *box, [48, 48], antialias=True)
        expected = expected.flip(-1) if torch.rand(1) < 0.5 else expected
        torch.manual_seed(seed)
        assert torch.equal(ours(image), expected)


NOISY, BILINEAR = "rand-m7-mstd0.5-inc1", v2.InterpolationMode.BILINEAR


def test_rand_augment_is_timm_s():
    """What A1 to A3 name, with timm's own defaults but for the colour of what is outside."""
    ours = train_transform(64, 1.0, 0.0, NOISY)
    colour = tuple(round(255 * mean) for mean in IMAGENET_MEAN)
    theirs = auto_augment.rand_augment_transform(NOISY, {"img_mean": colour})
    image = random_image(64, 64, True)
    for seed in range(60):
        torch.manual_seed(seed)
        made = ours(image)
        torch.manual_seed(seed)
        train_transform(64, 1.0, 0.0)(image)  # draws before it
        chance = int(torch.randint(2**32, ()).item())
        random.seed(chance)
        np.random.seed(chance)  # noqa: NPY002
        expected = theirs(Image.fromarray(image.permute(1, 2, 0).numpy()))
        assert np.array_equal(made.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_rand_augment_is_a_function_of_torch_s_seed_alone():
    transform = train_transform(32, 0.5, 0.5, NOISY, 0.5)
    image = random_image(60, 90, True)
    for given in (image, Image.fromarray(image.permute(1, 2, 0).numpy())):
        made = []
        for seed in (1, 1, *range(2, 40)):
            torch.manual_seed(seed)
            former = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
            made.append(transform(given))
            assert former == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
            random.random(), np.random.rand()  # noqa: NPY002 - which changes nothing
        assert made[0].shape == (3, 32, 32)
        assert made[0].dtype == torch.uint8
        assert torch.equal(made[0], made[1])
        assert len({view.numpy().tobytes() for view in made}) == len(made) - 1


def test_the_largest_magnitude_is_taken_by_every_operation():
    """At 10 timm leaves a posterized image no bit, which Pillow refuses."""
    transform = train_transform(16, 1.0, 0.0, "rand-m10-mstd5-inc1")
    torch.manual_seed(0)
    for _ in range(300):
        assert transform(random_image(16, 16, True)).shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("text", "known"),
    [
        (NOISY, True),
        ("rand-m6.5-mstd1-inc1", True),
        ("rand-m10-mstd0-inc1", True),
        ("rand-m11-mstd0.5-inc1", False),
        ("rand-m7-mstd0.5", False),  # timm's other set of operations
        ("rand-m-mstd0.5-inc1", False),
        ("rand", False),
    ],
)
def test_which_names_of_timm_s_are_known(text, known):
    assert is_timm_augment(text) is known


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("as_pil", [True, False])
def test_another_interpolation_is_torchvision_s(interpolation, as_pil, monkeypatch):
    """For evaluation, and for the crops of training."""
    mode = v2.InterpolationMode(interpolation)
    resize = v2.Compose([v2.Resize(46, interpolation=mode), v2.CenterCrop(40)])
    crop = v2.RandomResizedCrop(40, (0.3, 1.0), interpolation=mode, antialias=True)
    for side in (60, 30):
        image = random_image(side, 90, True)
        if as_pil:
            image = Image.fromarray(image.permute(1, 2, 0).numpy())
        for capability in ("AVX2", "DEFAULT"):
            monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
            ours = Preprocessing(40, 40 / 46, interpolation)(image)
            assert np.array_equal(ours, resize(image))
        assert not np.array_equal(
            ours, Preprocessing(40, 40 / 46, *({"bilinear", "bicubic"} - {interpolation}))(image)
        )
        torch.manual_seed(1)
        expected = crop(image)
        torch.manual_seed(1)
        ours = train_transform(40, 0.3, 0.0, interpolation=interpolation)(image)
        assert np.array_equal(ours, expected)


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ({"vflip": 0.5}, [v2.RandomVerticalFlip(0.5)]),
        ({"colour": 0.4}, [v2.ColorJitter(0.4, 0.4, 0.4)]),
        ({"vflip": 0.5, "colour": 2.0}, [v2.RandomVerticalFlip(0.5), v2.ColorJitter(2, 2, 2)]),
        ({"random_erasing": 0.3}, [v2.RandomErasing(0.3, value=[124, 116, 104])]),
        ({"auto_augment": "trivial"}, [v2.TrivialAugmentWide(interpolation=BILINEAR)]),
        ({"auto_augment": "rand"}, [v2.RandAugment(interpolation=BILINEAR)]),
    ],
)
def test_further_steps_are_torchvision_s_behind_crop_and_mirror(flags, steps):
    image, plain = random_image(60, 90, True), train_transform(32, 0.3, 0.5)
    theirs = v2.Compose([plain, *steps])
    differ = 0
    for seed in range(12):
        made = []
        for transform in (train_transform(32, 0.3, 0.5, **flags), theirs, plain):
            torch.manual_seed(seed)
            made.append(transform(image))
        assert torch.equal(made[0], made[1])
        differ += not torch.equal(made[0], made[2])
    assert 2 < differ <= 12
