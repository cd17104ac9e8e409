"""From files to batches: a pure function of (seed, epoch, index)."""

import pytest
import torch
from helpers.loader_passes import CPU, RECIPE, same, train_pass
from PIL import Image
from torchvision import transforms as v1

from utils.data import loader
from utils.data.decoding import BrokenImageError
from utils.data.loader import ImageDataset, Loader, check_readable
from utils.data.sampler import SeededBatches
from utils.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, train_transform
from utils.system.distributed import Context
from utils.system.errors import EXIT_FAILED, UserError
from utils.training.classification_data import training_batches, validation_batches


@pytest.mark.parametrize("decoder", ["simplejpeg", "pil"])
def test_a_pass_depends_on_seed_epoch_and_index_alone(noisy_images, decoder):
    whole = train_pass(noisy_images, decoder=decoder)
    assert [tuple(b.images.shape) for b in whole] == [(4, 3, 16, 16)] * 3
    torch.manual_seed(5)  # the state of the global generator is no part of it
    assert same(train_pass(noisy_images, workers=2, decoder=decoder), whole)
    assert same(train_pass(noisy_images, workers=1, step=1, decoder=decoder), whole[1:])
    assert not same(train_pass(noisy_images, epoch=1, decoder=decoder), whole)
    assert not same(train_pass(noisy_images, seed=1, decoder=decoder), whole)


def test_reading_leaves_the_global_generator_alone(noisy_images):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    train_pass(noisy_images)
    assert torch.equal(torch.rand(3), expected)


def test_evaluation_equals_the_usual_pillow_pipeline_with_the_pil_decoder(noisy_images):
    """Bit for bit before the normalisation: published evaluations resized with Pillow."""
    transform = v1.Compose([v1.Resize(20), v1.CenterCrop(16), v1.PILToTensor()])
    dataset = ImageDataset(noisy_images, Preprocessing(16, 0.8), decoder="pil")
    for index in range(len(noisy_images)):
        expected = transform(Image.open(noisy_images.path(index)).convert("RGB"))
        image, label, broken = dataset[0, index]
        assert torch.equal(image, expected)
        assert (label, broken) == (noisy_images.labels[index], -1)


def test_flags_of_preprocessing_reach_training_and_validation(noisy_images):
    """Against the formula in float64; and a single number is that of each colour."""
    recipe = RECIPE.override(mean=[0.2], std=[0.5, 0.25, 1.0], interpolation="bicubic", vflip=0.5)
    look = recipe.preprocessing
    assert look == Preprocessing(16, 0.8, "bicubic", (0.2, 0.2, 0.2), (0.5, 0.25, 1.0))
    batch = next(validation_batches(noisy_images, recipe, Loader(CPU, 0))())
    dataset = ImageDataset(noisy_images, look)
    pixels = torch.stack([dataset[0, i][0] for i in range(4)]).double() / 255
    expected = (pixels - 0.2) / torch.tensor([0.5, 0.25, 1.0], dtype=torch.double).view(3, 1, 1)
    torch.testing.assert_close(batch.images.double(), expected, atol=1e-5, rtol=0)

    order = SeededBatches(len(noisy_images), 4, 0)
    keys = next(iter(order))
    batch = next(training_batches(noisy_images, order, recipe, 0, Loader(CPU, 0))())
    transform = train_transform(16, 0.08, 0.5, vflip=0.5, interpolation="bicubic")
    pixels = torch.stack([ImageDataset(noisy_images, transform, 0)[key][0] for key in keys]) / 255
    expected = (pixels - 0.2) / torch.tensor([0.5, 0.25, 1.0]).view(3, 1, 1)
    torch.testing.assert_close(batch.images, expected, atol=1e-5, rtol=0)
    other = next(training_batches(noisy_images, order, RECIPE, 0, Loader(CPU, 0))())
    assert not torch.equal(other.images, batch.images)


@pytest.mark.parametrize("decoder", ["simplejpeg", "pil"])
def test_both_memory_formats_hold_the_same_numbers(noisy_images, decoder):
    keys = [[(0, i) for i in range(4)]]
    dataset = ImageDataset(noisy_images, train_transform(16, 0.2, 0.5), 0, decoder)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    for layout in (torch.contiguous_format, torch.channels_last):
        for workers in (0, 1):
            loader = Loader(CPU, workers, 60, memory_format=layout)
            (batch,) = loader.batches(dataset, keys)()
            assert batch.images.is_contiguous(memory_format=layout)
            for key, image in zip(keys[0], batch.images, strict=True):
                expected = (dataset[key][0].double() / 255 - mean) / std
                torch.testing.assert_close(image, expected.float())


@pytest.mark.parametrize("ranks", [1, 3])
def test_validation_sees_every_image_once(noisy_images, ranks):
    labels = []
    for rank in range(ranks):
        for batch in validation_batches(noisy_images, RECIPE, Loader(CPU, 0), rank, ranks)():
            labels += batch.targets.tolist()
    assert sorted(labels) == sorted(noisy_images.labels)


@pytest.mark.parametrize("decoder", ["simplejpeg", "pil"])
@pytest.mark.parametrize("auto_augment", ["trivial", "rand"])
def test_strong_augmentation_is_a_function_of_the_key(noisy_images, decoder, auto_augment):
    transform = train_transform(16, 0.2, 0.5, auto_augment, random_erasing=0.5)
    dataset = ImageDataset(noisy_images, transform, seed=0, decoder=decoder)
    keys = [(0, 3), (0, 3, 1), (0, 3, 2), (1, 3), (0, 4)]
    views = [dataset[key][0] for key in keys]
    torch.manual_seed(5)
    torch.rand(9)
    for key, view in zip(keys, views, strict=True):
        assert view.dtype == torch.uint8
        assert view.shape == (3, 16, 16)
        assert torch.equal(dataset[key][0], view)
    assert len({v.numpy().tobytes() for v in views}) == len(keys)


def test_strong_augmentation_comes_after_the_crop(noisy_images):
    """The same chance gives the same crop and flip first; only then do the operations differ."""
    plain = ImageDataset(noisy_images, train_transform(16, 0.2, 0.5), seed=0)
    trivial = ImageDataset(noisy_images, train_transform(16, 0.2, 0.5, "trivial"), seed=0)
    views = [(plain[0, i][0], trivial[0, i][0]) for i in range(len(noisy_images))]
    assert any(torch.equal(a, b) for a, b in views)  # one of its 14 operations is the identity
    assert any(not torch.equal(a, b) for a, b in views)


def test_erased_rectangles_are_zero_once_normalised(noisy_images):
    dataset = ImageDataset(noisy_images, train_transform(16, 1.0, 0.0, random_erasing=1.0), seed=0)
    plain = ImageDataset(noisy_images, train_transform(16, 1.0, 0.0), seed=0)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    for index in range(len(noisy_images)):
        image, whole = dataset[0, index][0], plain[0, index][0]
        erased = (image != whole).any(dim=0)
        rows, columns = erased.any(dim=1), erased.any(dim=0)
        box = rows[:, None] & columns
        normalised = (image / 255 - mean) / std
        assert normalised[:, box].abs().max() < 0.01
        assert 0.01 < box.float().mean() < 0.4
        assert torch.equal(image[:, ~box], whole[:, ~box])


def test_crops_may_be_smaller_than_what_is_evaluated(noisy_images):
    recipe = RECIPE.override(train_size=12, auto_augment="trivial")
    order = SeededBatches(len(noisy_images), 4, 0)
    batch = next(training_batches(noisy_images, order, recipe, 0, Loader(CPU, 0))())
    assert batch.images.shape == (4, 3, 12, 12)
    batch = next(validation_batches(noisy_images, recipe, Loader(CPU, 0))())
    assert batch.images.shape == (4, 3, 16, 16)


class Readings(list):
    """Items by (0, index), of which one may be broken; notes what was read."""

    def __init__(self, size: int, broken: int | None = None):
        super().__init__(range(size))
        self.broken, self.seen = broken, []

    def __getitem__(self, key):
        self.seen.append(key[1])
        return BrokenImageError("val/a/7.png", "the file is empty") if key[1] == self.broken else 0


def test_passes_on_a_gpu_share_a_stream(monkeypatch):
    """Each stream has freed memory of its own, which the others do not get."""
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or len(made))
    devices = [torch.device("cuda", index) for index in (0, 1, 0, 0)]
    assert [loader._side_stream(device) for device in devices] == [1, 2, 1, 1]
    loader._side_stream.cache_clear()


def test_all_validation_images_are_read_and_a_broken_one_is_named(capsys):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    ranks = [Readings(9), Readings(9)]
    for rank, items in enumerate(ranks):
        check_readable(items, Context(CPU, rank=rank, world_size=2))
    assert [sorted(items.seen) for items in ranks] == [[0, 2, 4, 6, 8], [1, 3, 5, 7]]
    assert capsys.readouterr().out == "check: 9 validation images can be read\n"  # of rank 0
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(UserError, match=r"^val/a/7.png: the file is empty; mend or ") as caught:
        check_readable(Readings(9, broken=7), Context(CPU))
    assert caught.value.exit_code == EXIT_FAILED
