"""Broken images and workers that hang, die or fail: named, skipped where asked, answered."""

import os
import signal
import sys
import time

import pytest
import torch
from helpers.loader_passes import CPU, RECIPE, train_pass
from helpers.small_runs import own_children

from utils.data.loader import ImageDataset, Loader
from utils.data.sampler import SeededBatches
from utils.data.transforms import Preprocessing, train_transform
from utils.system.errors import EXIT_FAILED, UserError
from utils.training.classification_data import replaced_lines, validation_batches


def spoil(folder, *indices):
    for index in indices:
        with open(folder.path(index), "wb") as file:
            file.write(b"no image")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_stops_with_its_path(noisy_images, workers):
    spoil(noisy_images, 5)
    assert 5 in [i for b in SeededBatches(len(noisy_images), 4, 0) for _, i in b]
    with pytest.raises(UserError) as caught:
        train_pass(noisy_images, workers=workers)
    message = str(caught.value)
    assert os.fsdecode(noisy_images.path(5)) in message
    assert "not an image" in message
    assert "--skip-bad-images" in message
    assert caught.value.exit_code == EXIT_FAILED
    assert "\n" not in message
    assert own_children() == []  # though the traceback that is kept here refers to the pass


def test_skipping_takes_the_next_readable_one_and_reports_it(noisy_images):
    whole = train_pass(noisy_images)
    spoil(noisy_images, 5, 6)
    skipped = train_pass(noisy_images, skip=True)
    broken = [i for b in skipped for i in b.broken]
    keys = SeededBatches(len(noisy_images), 4, 0)
    wanted = [i for b in keys for _, i in b]
    assert sorted(broken) == [i for i in (5, 6) if i in wanted]
    assert broken  # the seed is such that there is one
    assert replaced_lines(noisy_images, [6, 5, 6]) == [
        "3 times an image that cannot be read was replaced:",
        *(os.fsdecode(noisy_images.path(i)) for i in (5, 6)),
    ]
    assert replaced_lines(noisy_images, []) == []

    dataset = ImageDataset(noisy_images, train_transform(16, 0.2, 0.5), 0, skip_broken=True)
    image, label, reported = dataset[0, 5]
    assert (label, reported) == (noisy_images.labels[7], 5)
    assert image.shape == (3, 16, 16)
    # The others are as they were, bit for bit.
    for at, index in enumerate(wanted):
        if index not in (5, 6):
            batch, place = divmod(at, 4)
            assert torch.equal(skipped[batch].images[place], whole[batch].images[place])


def test_skipping_gives_up_when_everything_is_broken(noisy_images):
    spoil(noisy_images, *range(14))
    with pytest.raises(UserError, match="not an image"):
        train_pass(noisy_images, skip=True)


def test_validation_never_skips(noisy_images):
    spoil(noisy_images, 5)
    with pytest.raises(UserError, match="not an image"):
        list(validation_batches(noisy_images, RECIPE, Loader(CPU, 0))())


class Stuck(ImageDataset):
    def __getitem__(self, key):
        time.sleep(3600)


def test_a_hung_worker_is_answered_after_the_timeout(noisy_images):
    loader = Loader(CPU, 1, timeout=1)
    order = SeededBatches(len(noisy_images), 4, 0)
    batches = loader.batches(Stuck(noisy_images, Preprocessing(16, 1)), order)()
    began = time.monotonic()
    with pytest.raises(UserError, match=r"no batch from the loader workers for 1 s.*--worker-time"):
        next(batches)
    assert time.monotonic() - began < 600
    assert own_children() == []


class SignalsItself(ImageDataset):
    def __getitem__(self, key):
        for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
            os.kill(os.getpid(), signum)
        return super().__getitem__(key)


def test_workers_leave_stop_requests_to_the_main_process(noisy_images):
    """A signal to the whole process group must not take the batches away from the last step."""
    order = SeededBatches(len(noisy_images), 4, 0)
    dataset = SignalsItself(noisy_images, Preprocessing(16, 1))
    assert len(list(Loader(CPU, 1, 60).batches(dataset, order)())) == 3


class SaysWhoItIs(ImageDataset):
    def __getitem__(self, key):
        import ctypes

        signum = ctypes.c_int()
        ctypes.CDLL(None).prctl(2, ctypes.byref(signum))  # PR_GET_PDEATHSIG
        return torch.zeros(3, 1, 1), signum.value * 1000 + torch.get_num_threads(), -1


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's prctl")
def test_workers_die_with_the_main_process_and_use_one_thread(noisy_images):
    order = SeededBatches(len(noisy_images), 4, 0)
    batch = next(Loader(CPU, 1, 60).batches(SaysWhoItIs(noisy_images, None), order)())
    assert batch.targets.tolist() == [signal.SIGKILL * 1000 + 1] * 4


def test_an_error_of_our_own_keeps_its_traceback(noisy_images):
    class Wrong(ImageDataset):
        def __getitem__(self, key):
            raise KeyError("a programming error")

    order = SeededBatches(len(noisy_images), 4, 0)
    for workers in (0, 1):
        with pytest.raises(KeyError, match="a programming error"):
            next(Loader(CPU, workers, 60).batches(Wrong(noisy_images, None), order)())
