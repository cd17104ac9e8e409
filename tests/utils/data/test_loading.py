"""From files to batches: a pure function of (seed, epoch, index), with faults named."""

import os
import signal
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as v1

from utils.data import loading
from utils.data.decoding import BrokenImageError
from utils.data.image_folder import scan
from utils.data.loading import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageDataset,
    Reading,
    eval_transform,
    replaced_lines,
    train_transform,
    training_batches,
    validation_batches,
)
from utils.data.sampler import SeededBatches
from utils.recipes.classification import Recipe
from utils.system.errors import EXIT_FAILED, UserError
from utils.system.processes import end_children

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


@pytest.fixture
def folder(tmp_path):
    """14 noisy images of different sizes in two classes."""
    chance = np.random.default_rng(0)
    for i in range(14):
        place = tmp_path / "images" / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        size = (20 + i, 40 - i, 3)
        Image.fromarray(chance.integers(0, 255, size, dtype=np.uint8)).save(place / f"{i:02}.png")
    return scan(str(tmp_path / "images"))


def train_pass(folder, seed=0, epoch=0, step=0, workers=0, skip=False, decoder="torchvision"):
    order = SeededBatches(len(folder), RECIPE.batch_size, seed)
    order.seek(epoch, step)
    reading = Reading(CPU, workers, 60, decoder)
    return list(training_batches(folder, order, RECIPE, seed, reading, skip)())


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x.images, y.images) and torch.equal(x.targets, y.targets)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("decoder", ["torchvision", "pil"])
def test_a_pass_depends_on_seed_epoch_and_index_alone(folder, decoder):
    whole = train_pass(folder, decoder=decoder)
    assert [tuple(b.images.shape) for b in whole] == [(4, 3, 16, 16)] * 3
    torch.manual_seed(5)  # the state of the global generator is no part of it
    assert same(train_pass(folder, workers=2, decoder=decoder), whole)
    assert same(train_pass(folder, workers=1, step=1, decoder=decoder), whole[1:])
    assert not same(train_pass(folder, epoch=1, decoder=decoder), whole)
    assert not same(train_pass(folder, seed=1, decoder=decoder), whole)


def test_one_image_looks_different_in_every_epoch_and_each_differs_from_its_neighbour(folder):
    dataset = ImageDataset(folder, train_transform(16, 0.2, 0.5), seed=0)
    views = [dataset[epoch, 3][0] for epoch in range(6)]
    assert len({v.numpy().tobytes() for v in views}) == 6


def test_reading_leaves_the_global_generator_alone(folder):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    train_pass(folder)
    assert torch.equal(torch.rand(3), expected)


def test_evaluation_equals_the_usual_pillow_pipeline_with_the_pil_decoder(folder):
    """Bit for bit before the normalisation: published evaluations resized with Pillow."""
    transform = v1.Compose([v1.Resize(20), v1.CenterCrop(16), v1.PILToTensor()])
    dataset = ImageDataset(folder, eval_transform(16, 0.8), decoder="pil")
    for index in range(len(folder)):
        expected = transform(Image.open(folder.path(index)).convert("RGB"))
        image, label, broken = dataset[0, index]
        assert torch.equal(image, expected)
        assert (label, broken) == (folder.labels[index], -1)


def test_batches_are_normalised_as_imagenet(folder):
    dataset = ImageDataset(folder, eval_transform(16, 0.8))
    batch = next(validation_batches(folder, RECIPE, Reading(CPU, 0))())
    expected = torch.stack([dataset[0, i][0] for i in range(4)]).double() / 255
    mean, std = (
        torch.tensor(v, dtype=torch.double).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD)
    )
    torch.testing.assert_close(batch.images.double(), (expected - mean) / std, atol=1e-5, rtol=0)
    assert batch.images.dtype == torch.float32
    assert batch.targets.tolist() == folder.labels[:4].tolist()


@pytest.mark.parametrize("decoder", ["torchvision", "pil"])
def test_both_memory_formats_hold_the_same_numbers(folder, decoder):
    keys = [[(0, i) for i in range(4)]]
    dataset = ImageDataset(folder, train_transform(16, 0.2, 0.5), 0, decoder)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    for layout in (torch.contiguous_format, torch.channels_last):
        for workers in (0, 1):
            reading = Reading(CPU, workers, 60, memory_format=layout)
            (batch,) = reading.batches(dataset, keys)()
            assert batch.images.is_contiguous(memory_format=layout)
            for key, image in zip(keys[0], batch.images, strict=True):
                expected = (dataset[key][0].double() / 255 - mean) / std
                torch.testing.assert_close(image, expected.float())


@pytest.mark.parametrize("ranks", [1, 3])
def test_validation_sees_every_image_once(folder, ranks):
    count = sum(
        len(batch.targets)
        for rank in range(ranks)
        for batch in validation_batches(folder, RECIPE, Reading(CPU, 0), rank, ranks)()
    )
    assert count == 14


def spoil(folder, *indices):
    for index in indices:
        with open(folder.path(index), "wb") as file:
            file.write(b"no image")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_stops_with_its_path(folder, workers):
    spoil(folder, 5)
    assert 5 in [i for b in SeededBatches(len(folder), 4, 0) for _, i in b]
    with pytest.raises(UserError) as caught:
        train_pass(folder, workers=workers)
    message = str(caught.value)
    assert os.fsdecode(folder.path(5)) in message
    assert "not an image" in message
    assert "--skip-bad-images" in message
    assert caught.value.exit_code == EXIT_FAILED
    assert "\n" not in message


def test_skipping_takes_the_next_readable_one_and_reports_it(folder):
    whole = train_pass(folder)
    spoil(folder, 5, 6)
    skipped = train_pass(folder, skip=True)
    broken = [i for b in skipped for i in b.broken]
    keys = SeededBatches(len(folder), 4, 0)
    wanted = [i for b in keys for _, i in b]
    assert sorted(broken) == [i for i in (5, 6) if i in wanted]
    assert broken  # the seed is such that there is one
    assert replaced_lines(folder, [6, 5, 6]) == [
        "3 times an image that cannot be read was replaced:",
        *(os.fsdecode(folder.path(i)) for i in (5, 6)),
    ]
    assert replaced_lines(folder, []) == []

    dataset = ImageDataset(folder, train_transform(16, 0.2, 0.5), 0, skip_broken=True)
    image, label, reported = dataset[0, 5]
    assert (label, reported) == (folder.labels[7], 5)
    assert image.shape == (3, 16, 16)
    # The others are as they were, bit for bit.
    for at, index in enumerate(wanted):
        if index not in (5, 6):
            batch, place = divmod(at, 4)
            assert torch.equal(skipped[batch].images[place], whole[batch].images[place])


def test_skipping_gives_up_when_everything_is_broken(folder):
    spoil(folder, *range(14))
    with pytest.raises(UserError, match="not an image"):
        train_pass(folder, skip=True)


def test_validation_never_skips(folder):
    spoil(folder, 5)
    with pytest.raises(UserError, match="not an image"):
        list(validation_batches(folder, RECIPE, Reading(CPU, 0))())


class Stuck(ImageDataset):
    def __getitem__(self, key):
        time.sleep(3600)


def test_a_hung_worker_is_answered_after_the_timeout(folder):
    reading = Reading(CPU, 1, timeout=1)
    order = SeededBatches(len(folder), 4, 0)
    batches = reading.batches(Stuck(folder, eval_transform(16, 1)), order)()
    began = time.monotonic()
    with pytest.raises(UserError, match=r"no batch from the loader workers for 1 s.*--worker-time"):
        next(batches)
    assert time.monotonic() - began < 600
    assert end_children()


class SignalsItself(ImageDataset):
    def __getitem__(self, key):
        for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
            os.kill(os.getpid(), signum)
        return super().__getitem__(key)


def test_workers_leave_stop_requests_to_the_main_process(folder):
    """A signal to the whole process group must not take the batches away from the last step."""
    order = SeededBatches(len(folder), 4, 0)
    dataset = SignalsItself(folder, eval_transform(16, 1))
    assert len(list(Reading(CPU, 1, 60).batches(dataset, order)())) == 3


class SaysWhoItIs(ImageDataset):
    def __getitem__(self, key):
        import ctypes

        signum = ctypes.c_int()
        ctypes.CDLL(None).prctl(2, ctypes.byref(signum))  # PR_GET_PDEATHSIG
        return torch.zeros(3, 1, 1), signum.value * 1000 + torch.get_num_threads(), -1


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's prctl")
def test_workers_die_with_the_main_process_and_use_one_thread(folder):
    order = SeededBatches(len(folder), 4, 0)
    batch = next(Reading(CPU, 1, 60).batches(SaysWhoItIs(folder, None), order)())
    assert batch.targets.tolist() == [signal.SIGKILL * 1000 + 1] * 4


def test_an_error_of_our_own_keeps_its_traceback(folder):
    class Wrong(ImageDataset):
        def __getitem__(self, key):
            raise KeyError("a programming error")

    order = SeededBatches(len(folder), 4, 0)
    for workers in (0, 1):
        with pytest.raises(KeyError, match="a programming error"):
            next(Reading(CPU, workers, 60).batches(Wrong(folder, None), order)())


def test_a_broken_image_is_one_value_of_the_batch():
    broken = BrokenImageError("a.jpg", "the file is empty")
    assert loading._collate([(torch.zeros(3, 1, 1), 0, -1), broken]) is broken


@pytest.mark.parametrize("decoder", ["torchvision", "pil"])
@pytest.mark.parametrize("auto_augment", ["trivial", "rand"])
def test_strong_augmentation_is_a_function_of_the_key(folder, decoder, auto_augment):
    transform = train_transform(16, 0.2, 0.5, auto_augment, random_erasing=0.5)
    dataset = ImageDataset(folder, transform, seed=0, decoder=decoder)
    keys = [(0, 3), (0, 3, 1), (0, 3, 2), (1, 3), (0, 4)]
    views = [dataset[key][0] for key in keys]
    torch.manual_seed(5)
    torch.rand(9)
    for key, view in zip(keys, views, strict=True):
        assert view.dtype == torch.uint8
        assert view.shape == (3, 16, 16)
        assert torch.equal(dataset[key][0], view)
    assert len({v.numpy().tobytes() for v in views}) == len(keys)


def test_strong_augmentation_comes_after_the_crop(folder):
    """The same chance gives the same crop and flip first; only then do the operations differ."""
    plain = ImageDataset(folder, train_transform(16, 0.2, 0.5), seed=0)
    trivial = ImageDataset(folder, train_transform(16, 0.2, 0.5, "trivial"), seed=0)
    views = [(plain[0, i][0], trivial[0, i][0]) for i in range(len(folder))]
    assert any(torch.equal(a, b) for a, b in views)  # one of its 14 operations is the identity
    assert any(not torch.equal(a, b) for a, b in views)


def test_erased_rectangles_are_zero_once_normalised(folder):
    dataset = ImageDataset(folder, train_transform(16, 1.0, 0.0, random_erasing=1.0), seed=0)
    plain = ImageDataset(folder, train_transform(16, 1.0, 0.0), seed=0)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    for index in range(len(folder)):
        image, whole = dataset[0, index][0], plain[0, index][0]
        erased = (image != whole).any(dim=0)
        rows, columns = erased.any(dim=1), erased.any(dim=0)
        box = rows[:, None] & columns
        normalised = (image / 255 - mean) / std
        assert normalised[:, box].abs().max() < 0.01
        assert 0.01 < box.float().mean() < 0.4
        assert torch.equal(image[:, ~box], whole[:, ~box])


def test_crops_may_be_smaller_than_what_is_evaluated(folder):
    recipe = RECIPE.override(train_size=12, auto_augment="trivial")
    order = SeededBatches(len(folder), 4, 0)
    batch = next(training_batches(folder, order, recipe, 0, Reading(CPU, 0))())
    assert batch.images.shape == (4, 3, 12, 12)
    batch = next(validation_batches(folder, recipe, Reading(CPU, 0))())
    assert batch.images.shape == (4, 3, 16, 16)
