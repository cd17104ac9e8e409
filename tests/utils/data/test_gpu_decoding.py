"""--decoder cuda, with the CPU in the GPU's place: all but nvJPEG itself, and that where one is."""

import pickle
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.loader_passes import CPU, RECIPE, same
from helpers.mixed_images import PLAIN, photo, write_mixed

from utils.data import decoding, gpu_decoding
from utils.data.decoding import BrokenImageError, read_image
from utils.data.gpu_decoding import Finish, Unfinished, check_decoder, pack, reading_of
from utils.data.image_folder import scan
from utils.data.loading import (
    IMAGENET_STD,
    ImageDataset,
    Reading,
    training_batches,
    validation_batches,
)
from utils.data.sampler import SeededBatches
from utils.data.transforms import eval_transform, train_transform
from utils.system.errors import EXIT_FAILED, UserError
from utils.system.processes import end_children


@pytest.fixture(autouse=True)
def no_workers_left():
    """Those of a pass that failed wait for work until their loader is collected, and then 5 s."""
    yield
    end_children()


@pytest.fixture
def images(tmp_path):
    """13 images of as many kinds in one class, and 3 in another."""
    write_mixed(tmp_path / "images" / "a")
    (tmp_path / "images" / "b").mkdir()
    for i in range(3):
        photo().save(tmp_path / "images" / "b" / f"plain-{i}.jpg")
    return scan(str(tmp_path / "images"))


def epoch(images, decoder, workers=0, step=0, recipe=RECIPE, skip=False, device=CPU, **reading):
    order = SeededBatches(len(images), recipe.batch_size, 0, repeats=recipe.repeats)
    order.seek(1, step)
    reading = reading_of(decoder)(device, workers, 60, decoder, **reading)
    return list(training_batches(images, order, recipe, 0, reading, skip)())


def validation(images, decoder, workers=0):
    reading = reading_of(decoder)(CPU, workers, 60, decoder)
    return list(validation_batches(images, RECIPE, reading)())


def at(images, name: str) -> int:
    return next(i for i in range(len(images)) if name in str(images.path(i)))


def break_inside(images, index: int) -> str:
    """Spoils a JPEG where no look at its ends finds it; returns its path."""
    path = Path(images.path(index).decode())
    path.write_bytes(path.read_bytes().replace(b"\xff\xdb", b"\xff\xfe"))  # tables to comments
    assert read_image(path, "cuda").ndim == 1
    return str(path)


def test_plain_jpegs_travel_as_bytes_and_all_else_as_torchvision_s_pixels(images):
    seen = set()
    for path in map(images.path, range(len(images))):
        got, name = read_image(path, "cuda"), Path(path.decode()).stem.split("-")[0]
        seen.add(name)
        if name in PLAIN:
            assert got.numpy().tobytes() == Path(path.decode()).read_bytes()
        else:
            assert torch.equal(got, read_image(path))
    assert len(seen) == 12
    assert seen > set(PLAIN)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_torchvision_decoder(images, workers):
    """Crops, flips, labels and numbers, bit for bit, where the same library decodes."""
    assert reading_of("torchvision") is Reading
    whole = epoch(images, "torchvision")
    assert len(whole) == 4
    assert same(epoch(images, "cuda", workers), whole)
    assert same(epoch(images, "cuda", workers, step=2), whole[2:])
    assert same(validation(images, "cuda", workers), validation(images, "torchvision"))


def test_so_are_strong_augmentation_copies_and_channels_last(images):
    recipe = RECIPE.override(auto_augment="trivial", random_erasing=0.5, repeats=2)
    layout = {"memory_format": torch.channels_last}
    wanted = epoch(images, "torchvision", recipe=recipe, **layout)
    got = epoch(images, "cuda", recipe=recipe, **layout)
    assert same(got, wanted)
    assert all(b.images.is_contiguous(memory_format=torch.channels_last) for b in got)


def test_the_global_generator_is_left_alone(images):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    epoch(images, "cuda")
    assert torch.equal(torch.rand(3), expected)


def batch_of(images, seed=None, skip=False):
    transform = eval_transform(16, 0.8) if seed is None else train_transform(16, 0.2, 0.5)
    dataset = ImageDataset(images, transform, seed, "cuda", skip)
    keys = [(1, index) for index in range(len(images))]
    expected = ImageDataset(images, transform, seed, skip_broken=skip)
    wanted = [item for item in map(expected.__getitem__, keys) if not isinstance(item, Exception)]
    return dataset, pack([Unfinished(dataset)[key] for key in keys]), wanted


def test_a_batch_travels_as_one_tensor_and_survives_a_pickle(images):
    """A tensor for each image would be a file for each: 1,024 are open to a process as a rule."""
    dataset, packed, _ = batch_of(images)
    assert [part.ndim for part in packed if isinstance(part, torch.Tensor)] == [1, 1]
    for image, shape in zip(packed.images(), packed.shapes, strict=True):
        assert shape == (16, 16, 3) or (len(image),) == shape
    again = pickle.loads(pickle.dumps((Finish(dataset, CPU), packed)))
    assert torch.equal(again[0](again[1])[0], Finish(dataset, CPU)(packed)[0])


@pytest.mark.parametrize("limit", [0, 1, 3, 9])
def test_what_the_device_cannot_decode_together_it_decodes_in_parts_or_the_cpu(
    images, limit, capsys
):
    """A decoder that fails with more than `limit` images, and always with one of them."""
    dataset, packed, wanted = batch_of(images, seed=0)
    bad = read_image(images.path(at(images, "grey")), "cuda")
    asked = []

    def decode(encoded, device):
        asked.append(len(encoded))
        if len(encoded) > limit or any(torch.equal(e, bad) for e in encoded):
            raise RuntimeError("nvjpeg: 5")
        return gpu_decoding.decode_jpegs(encoded, device)

    finish = Finish(dataset, CPU, decode)
    stacked, labels, broken = finish(packed)
    assert asked[0] == 9
    assert min(asked) == 1
    finish(packed)
    (line,) = capsys.readouterr().err.splitlines()  # said once, of the first one
    first = images.path(at(images, "fine" if limit == 0 else "grey")).decode()
    assert line.startswith(f"! {first}: the GPU does not decode it")
    for image, label, (image_too, label_too, _) in zip(stacked, labels, wanted, strict=True):
        assert torch.equal(image, image_too)
        assert label == label_too
    assert broken == []


def test_an_image_too_large_for_the_device_s_memory_is_not_decoded_elsewhere(images):
    """The CPU's pixels are others: a run that is resumed would not be the same."""
    dataset, packed, wanted = batch_of(images, seed=0)
    asked = []

    def decode(encoded, device):
        asked.append(len(encoded))
        if len(encoded) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gpu_decoding.decode_jpegs(encoded, device)

    limit = 2
    stacked, _, _ = Finish(dataset, CPU, decode)(packed)
    assert asked[0] == 9
    for image, (expected, *_) in zip(stacked, wanted, strict=True):
        assert torch.equal(image, expected)
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        Finish(dataset, CPU, decode)(packed)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("passes", [epoch, validation])
def test_a_jpeg_broken_inside_ends_the_run_with_its_path(images, workers, passes):
    index = next(
        i for b in SeededBatches(len(images), 4, 0) for _, i in b if "plain" in str(images.path(i))
    )
    path = break_inside(images, index)
    with pytest.raises(UserError) as caught:
        passes(images, "cuda", workers)
    message = str(caught.value)
    assert message.startswith(f"{path}: Quantization table")
    assert ("--skip-bad-images" in message) == (passes is epoch)
    assert "\n" not in message
    assert caught.value.exit_code == EXIT_FAILED
    with pytest.raises(UserError) as usual:
        passes(images, "torchvision", workers)
    assert str(usual.value) == message


@pytest.mark.parametrize("content", [b"", b"no image", "cut"])
def test_what_is_broken_at_its_ends_a_worker_finds(images, content):
    index = at(images, "plain")
    path = Path(images.path(index).decode())
    path.write_bytes(path.read_bytes()[:-40] if content == "cut" else content)
    item = Unfinished(ImageDataset(images, eval_transform(16, 0.8), decoder="cuda"))[0, index]
    assert isinstance(item, BrokenImageError)
    assert item.path == str(path)
    assert pack([item]) is item


def test_skipping_takes_the_images_that_it_takes_elsewhere(images):
    """Of the last three, all broken, a worker finds the first, the device the others.

    What takes their place is the first image of all, of another class.
    """
    first = len(images) - 3
    Path(images.path(first).decode()).write_bytes(b"")
    for index in (first + 1, first + 2):
        break_inside(images, index)
    dataset, packed, wanted = batch_of(images, seed=0, skip=True)
    assert packed.broken.count(-1) == len(images) - 1
    stacked, labels, broken = Finish(dataset, CPU)(packed)
    assert broken == [first, first + 1, first + 2]
    assert labels.tolist() == [0] * len(images)
    for image, label, (image_too, label_too, _) in zip(stacked, labels, wanted, strict=True):
        assert torch.equal(image, image_too)
        assert label == label_too
    for workers in (0, 2):
        got, usual = (epoch(images, d, workers, skip=True) for d in ("cuda", "torchvision"))
        assert same(got, usual)
        assert [b.broken for b in got] == [b.broken for b in usual]


def test_nothing_is_decoded_before_what_has_its_memory_is_done(monkeypatch):
    """In this order: the stream is waited for, torchvision decodes; where it fails, the device."""
    done = []
    wait = SimpleNamespace(synchronize=lambda: done.append("stream"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: wait)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append("device"))

    def decode(encoded, device):
        done.append("decode")
        if not encoded:
            raise RuntimeError
        return encoded

    monkeypatch.setattr(decoding, "jpeg_decoder", lambda: decode)
    for encoded, raised in ([0], nullcontext()), ([], pytest.raises(RuntimeError)):
        with raised:
            gpu_decoding.decode_jpegs(encoded, torch.device("cuda"))
    assert done == ["stream", "decode", "stream", "decode", "device"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="nvJPEG needs a GPU")
def test_a_gpu_s_pixels_are_near_libjpeg_s(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(40):
            picture = photo(300 + i, 350 - i)
            picture = picture.convert("L") if i % 4 == 1 else picture
            kind = {"progressive": i % 4 == 2, "subsampling": 0 if i % 4 == 3 else 2}
            picture.save(tmp_path / name / f"{i}.jpg", quality=90, **kind)
    images, gpu = scan(str(tmp_path)), torch.device("cuda", 0)
    check_decoder("cuda", gpu)
    recipe = RECIPE.override(img_size=96)
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    for workers in (0, 2):
        there = epoch(images, "cuda", workers, recipe=recipe, device=gpu)
        here = epoch(images, "torchvision", recipe=recipe)
        assert len(there) == len(here) == 20
        for batch, usual in zip(there, here, strict=True):
            assert batch.images.device == gpu
            assert torch.equal(batch.targets.cpu(), usual.targets)
            apart = (batch.images.cpu() - usual.images) * std * 255
            assert apart.abs().mean() < 2
            assert apart.abs().mean((1, 2, 3)).max() < 6  # no image is another
