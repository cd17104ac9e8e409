"""Images per second of the training pipeline, one process, against PIL + ToTensor + Normalize.

    python benchmarks/data_loading.py [--batch N] [--json FILE] [--smoke]

The images are generated: 500 x 375 pixels of coloured noise whose spectrum falls off as a
photograph's does, as JPEGs of about 100 KB. All pipelines crop and flip by the same chance, so
that their outputs can be compared pixel by pixel. One thread each, as a loader worker has. The
baseline also runs in a process of its own with glibc's allocator as it is.
"""

import side_by_side as side  # first: it puts the repository on the path

# isort: split
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms as v1

from utils.data.decoding import DECODERS
from utils.data.image_folder import ImageFolder, scan
from utils.data.loader import ImageDataset, Loader
from utils.data.sampler import SeededBatches, mix_seed
from utils.data.transforms import IMAGENET_MEAN, IMAGENET_STD, train_transform
from utils.system.faults import run_script

BASE = "PIL + ToTensor + Normalize"
AS_IT_IS = f"{BASE}, malloc as it is"


def noise_photo(seed: int, height: int = 375, width: int = 500) -> Image.Image:
    """Coloured 1/f noise, in which the channels have most of their structure in common."""
    chance = np.random.default_rng(seed)
    radius = np.fft.fftfreq(height)[:, None] ** 2 + np.fft.rfftfreq(width)[None] ** 2
    radius[0, 0] = 1

    def layer() -> np.ndarray:
        shape = (height, width // 2 + 1)
        spectrum = chance.normal(size=shape) + 1j * chance.normal(size=shape)
        return np.fft.irfft2(spectrum / radius**0.5, s=(height, width))

    common = layer()
    channels = [common + 0.3 * layer() for _ in range(3)]
    scaled = [(c - c.mean()) / c.std() * 55 + 120 for c in channels]
    return Image.fromarray(np.stack(scaled, -1).clip(0, 255).astype(np.uint8))


def write_images(folder: Path, count: int) -> None:
    (folder / "train" / "a").mkdir(parents=True)
    for i in range(count):
        noise_photo(i).save(folder / "train" / "a" / f"{i:04d}.jpg", quality=88)


def textbook_batches(folder: ImageFolder, size: int, keys: list) -> Callable[[], torch.Tensor]:
    """What torchvision's and the original's ImageNet scripts do for each image."""
    transform = v1.Compose(
        [
            v1.RandomResizedCrop(size),
            v1.RandomHorizontalFlip(),
            v1.ToTensor(),
            v1.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )

    def batch() -> torch.Tensor:
        images = []
        for epoch, index in keys:
            torch.manual_seed(mix_seed(0, epoch, index))
            images.append(transform(Image.open(folder.path(index)).convert("RGB")))
        return torch.stack(images)

    return batch


def main() -> None:
    parser = side.make_parser(__doc__, batch=(32, 32), rounds=60)
    # With cuda, batches are sent there and normalised.
    parser.set_defaults(device="cpu")
    args = side.settle(parser.parse_args())
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as home:
        write_images(Path(home), args.batch * 2)
        folder = scan(str(Path(home) / "train"))
        kilobytes = sum(f.stat().st_size for f in Path(home).rglob("*.jpg")) / len(folder) / 1e3
        keys = next(iter(SeededBatches(len(folder), args.batch, seed=0)))
        variants = {BASE: textbook_batches(folder, args.img_size, keys)}
        for decoder in DECODERS:
            transform = train_transform(args.img_size, 0.08, 0.5)
            dataset = ImageDataset(folder, transform, 0, decoder)
            batches = Loader(args.device, 0).batches(dataset, [keys])
            variants[f"ours, {decoder}"] = lambda batches=batches: next(batches()).images
        outputs = {name: run().cpu() for name, run in variants.items()}
        if side.keeps_memory(args.device):
            variants[AS_IT_IS] = side.AsItIs(textbook_batches, folder, args.img_size, keys)
        times = side.interleave(variants, args.rounds, args.device)

    common = side.settings(args) | {"kilobytes_per_image": kilobytes}
    bases = [base for base in (BASE, AS_IT_IS) if base in variants]
    pairs = [(name, base) for base in bases for name in outputs if name != base]
    rows = side.compare("data_loading", times, pairs, dict.fromkeys(variants, "uint8"), common)
    std = torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)
    for row in rows:
        apart = ((outputs[row["variant"]] - outputs[BASE]).abs() * std).mean().item() * 255
        row["mean_difference_of_255"] = apart
        row["images_per_second"] = args.batch / row["seconds_median"]
    unit = f"speed over the other's; {kilobytes:.0f} KB a JPEG"
    side.report(args, rows, unit, "{variant}, off by {mean_difference_of_255:.3f} of 255")


if __name__ == "__main__":
    run_script(main)
