"""Mixup and cutmix against what they are by definition."""

import numpy as np
import pytest
import torch

from utils.training.classification import leading_class, make_mix, unmixed

CLASSES = 4


def batch(size=6, pixels=12):
    torch.manual_seed(3)
    return torch.randn(size, 3, pixels, pixels), torch.arange(size) % CLASSES


def shares_by_hand(targets, share):
    """Each image's own class and that of the one before it."""
    wanted = np.zeros((len(targets), CLASSES))
    for i, target in enumerate(targets.tolist()):
        wanted[i, target] += share
        wanted[i, targets[i - 1]] += 1 - share
    return wanted


def test_mixup_blends_images_and_targets_by_the_same_share():
    images, targets = batch()
    shares = set()
    for seed in range(20):
        torch.manual_seed(seed)
        mixed, soft = make_mix(0.2, 0, CLASSES)(images, targets)
        share = soft[0, targets[0]].item()  # the last image's class is another one
        shares.add(share)
        x = images.double().numpy()
        wanted = share * x + (1 - share) * np.roll(x, 1, axis=0)
        np.testing.assert_allclose(mixed, wanted, atol=1e-6)
        np.testing.assert_allclose(soft, shares_by_hand(targets, share), atol=1e-6)
    assert len(shares) == 20


def test_cutmix_pastes_one_rectangle_and_shares_by_its_area():
    images, targets = batch()
    areas = set()
    for seed in range(20):
        torch.manual_seed(seed)
        mixed, soft = make_mix(0, 1.0, CLASSES)(images, targets)
        pasted = (mixed != images).all(dim=1)
        assert torch.equal(mixed, torch.where(pasted[:, None], images.roll(1, 0), images))
        assert all(torch.equal(one, pasted[0]) for one in pasted)
        rows, columns = pasted[0].any(dim=1), pasted[0].any(dim=0)
        assert torch.equal(pasted[0], rows[:, None] & columns[None])  # a rectangle …
        for side in (rows, columns):  # … in one piece
            assert (side.int().diff().abs().sum() + side[0].int() + side[-1].int()) in (0, 2)
        area = pasted[0].float().mean().item()
        areas.add(area)
        np.testing.assert_allclose(soft, shares_by_hand(targets, 1 - area), atol=1e-6)
    assert len(areas) > 10


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_shares_are_drawn_from_the_beta_distribution(alpha):
    images, targets = torch.zeros(2, 3, 1, 1), torch.tensor([0, 1])
    torch.manual_seed(0)
    mix = make_mix(alpha, 0, 2)
    shares = torch.stack([mix(images, targets)[1][0, 0] for _ in range(3000)])
    assert shares.mean().item() == pytest.approx(0.5, abs=0.03)
    assert shares.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_both_share_the_batches_evenly():
    images, targets = batch()
    torch.manual_seed(0)
    mix = make_mix(0.2, 1.0, CLASSES)
    # Cutmix leaves each value as it was in one of the two images.
    cut = 0
    for _ in range(400):
        mixed, _ = mix(images, targets)
        cut += bool(((mixed == images) | (mixed == images.roll(1, 0))).all())
    assert 150 < cut < 250


def test_it_is_a_function_of_the_seed_and_leaves_the_batch_alone():
    images, targets = batch()
    before = images.clone()
    mix = make_mix(0.2, 1.0, CLASSES)
    found = []
    for noise in (0, 7):
        torch.rand(noise)
        torch.manual_seed(5)
        found.append(mix(images, targets))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert torch.equal(images, before)


def test_off_is_the_batch_itself():
    images, targets = batch()
    assert make_mix(0, 0, CLASSES) is unmixed
    assert unmixed(images, targets)[0] is images
    assert unmixed(images, targets)[1] is targets


def test_the_leading_class_is_that_of_the_larger_share():
    assert leading_class(torch.tensor([2, 0])).tolist() == [2, 0]
    assert leading_class(torch.tensor([[0.3, 0.0, 0.7], [0.9, 0.1, 0.0]])).tolist() == [2, 0]
