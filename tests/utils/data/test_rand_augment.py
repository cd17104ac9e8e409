"""timm's RandAugment here, beside timm's own on the same images."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

from utils.data.rand_augment import (
    FILL,
    NAMES,
    OPERATIONS,
    NoisyRandAugment,
    parse_rand_augment,
)
from utils.data.transforms import train_transform

SIGNED = {"Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"}
MIRRORED = {"TranslateXRel": -1, "TranslateYRel": -1}  # the other direction for the same sign


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    """Smooth, in colours, of 60 by 90 pixels."""
    chance = np.random.default_rng(0)
    small = Image.fromarray(chance.integers(0, 256, (6, 9, 3), np.uint8))
    return torch.from_numpy(np.array(small.resize((90, 60), Image.Resampling.BICUBIC))).permute(
        2, 0, 1
    )


def theirs(name: str, level: float, image: torch.Tensor, sign: int) -> torch.Tensor:
    """What timm's operation makes of the image at the level."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auto_augment, "_randomly_negate", lambda value: sign * value)
        hparams = {"img_mean": tuple(FILL), "interpolation": Image.Resampling.BILINEAR}
        operation = auto_augment.AugmentOp(name, 1.0, level, hparams)
        done = operation(Image.fromarray(image.permute(1, 2, 0).numpy()))
    return torch.from_numpy(np.array(done)).permute(2, 0, 1)


def test_the_operations_are_timm_s():
    assert list(NAMES) == auto_augment._RAND_INCREASING_TRANSFORMS


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("level", [0, 0.7, 3, 7.3, 10])
@pytest.mark.parametrize("sign", [1, -1])
def test_each_operation_makes_what_timm_s_makes(picture, name, level, sign):
    found = OPERATIONS[name](picture, sign * level / 10)
    if name.startswith("Posterize") and level == 10:  # no bit is left, which Pillow refuses
        assert not found.any()
        return
    wanted = theirs(name, level, picture, sign * MIRRORED.get(name, 1))
    assert found.shape == picture.shape
    assert found.dtype == torch.uint8
    off = (found.int() - wanted.int()).abs().float()
    if name in SIGNED:  # two ways to resample: alike but for the seam to the outside
        assert off.mean() < 2
        assert (off > 8).float().mean() < 0.03
    else:
        assert off.max() <= 2, off.max()


def test_magnitudes_are_drawn_and_kept_in_bounds(picture, monkeypatch):
    seen: list[tuple[str, float]] = []

    def note(name):
        return lambda image, level: seen.append((name, level)) or image

    noted = {name: note(name) for name in NAMES}
    monkeypatch.setattr("utils.data.rand_augment.OPERATIONS", noted)
    torch.manual_seed(0)
    for _ in range(4000):
        NoisyRandAugment(7, 0.5)(picture)
    assert len(seen) == pytest.approx(4000, rel=0.05)  # two an image, each by even chance
    levels = torch.tensor([level for _, level in seen])
    assert levels.abs().mean().item() == pytest.approx(0.7, abs=0.005)
    assert levels.abs().std().item() == pytest.approx(0.05, abs=0.005)
    assert (levels > 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
    counts = np.bincount([NAMES.index(name) for name, _ in seen], minlength=15)
    assert counts.min() > 200  # of 267
    seen.clear()
    for _ in range(50):
        NoisyRandAugment(10, 5)(picture)
        NoisyRandAugment(0, 5)(picture)
    assert 0 <= min(abs(level) for _, level in seen) <= max(abs(level) for _, level in seen) <= 1


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("rand-m7-mstd0.5-inc1", (7.0, 0.5)),
        ("rand-m6.5-mstd1-inc1", (6.5, 1.0)),
        ("rand-m10-mstd0-inc1", (10.0, 0.0)),
        ("rand-m11-mstd0.5-inc1", None),
        ("rand-m7-mstd0.5", None),  # timm's other set of operations
        ("rand-m-mstd0.5-inc1", None),
        ("rand", None),
    ],
)
def test_names_are_timm_s(text, found):
    assert parse_rand_augment(text) == found


def test_it_is_a_part_of_the_transform_whatever_the_decoder(picture):
    transform = train_transform(32, 0.5, 0.5, "rand-m7-mstd0.5-inc1", 0.5)
    for image in (picture, Image.fromarray(picture.permute(1, 2, 0).numpy())):
        made = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            made.append(transform(image))
        assert made[0].shape == (3, 32, 32)
        assert made[0].dtype == torch.uint8
        assert torch.equal(made[0], made[1])
        assert not torch.equal(made[0], made[2])
