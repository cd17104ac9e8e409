"""Images per second of the training pipeline, one process, against PIL + ToTensor + Normalize.

    python benchmarks/data_loading.py [--json FILE] [--smoke]

The images are generated: 500 x 375 pixels of coloured noise whose spectrum falls off as a
photograph's does, as JPEGs of about 100 KB. Both pipelines crop and flip by the same chance, so
that their outputs can be compared pixel by pixel.
"""

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision import transforms as v1

import sys  # isort: skip

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts' own packages

from utils.data import IMAGENET_MEAN, IMAGENET_STD, ImageDataset, Reading, train_transform
from utils.image_folder import scan
from utils.sampler import SeededBatches, mix_seed


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


class Textbook:
    """What torchvision's and the original's ImageNet scripts do for each image."""

    def __init__(self, folder, size: int):
        self.folder, self.transform = folder, v1.Compose([
            v1.RandomResizedCrop(size),
            v1.RandomHorizontalFlip(),
            v1.ToTensor(),
            v1.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ])  # fmt: skip

    def batch(self, keys: list[tuple[int, int]]) -> torch.Tensor:
        images = []
        for epoch, index in keys:
            torch.manual_seed(mix_seed(0, epoch, index))
            image = Image.open(self.folder.path(index)).convert("RGB")
            images.append(self.transform(image))
        return torch.stack(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--smoke", action="store_true", help="few images: does it run?")
    args = parser.parse_args()
    rounds, batch = (2, 4) if args.smoke else (args.rounds, args.batch)
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as place:
        write_images(Path(place), batch * 2)
        folder = scan(str(Path(place) / "train"))
        kilobytes = sum(f.stat().st_size for f in Path(place).rglob("*.jpg")) / len(folder) / 1e3
        textbook = Textbook(folder, 224)
        keys = next(iter(SeededBatches(len(folder), batch, seed=0)))
        variants = {"PIL + ToTensor + Normalize": lambda: textbook.batch(keys)}
        for decoder in ("torchvision", "pil"):
            dataset = ImageDataset(folder, train_transform(224, 0.08, 0.5), 0, decoder)
            batches = Reading(torch.device("cpu"), 0).batches(dataset, [keys])
            variants[f"ours, {decoder}"] = lambda batches=batches: next(batches()).images

        outputs = {name: run() for name, run in variants.items()}
        times: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(rounds):
            for name in random.sample(list(variants), len(variants)):
                began = time.perf_counter()
                variants[name]()
                times[name].append(time.perf_counter() - began)

    base = "PIL + ToTensor + Normalize"
    std = torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)
    print(f"batch {batch}, {kilobytes:.0f} KB per JPEG, torch {torch.__version__}, torchvision "
          f"{torchvision.__version__}, one thread of {platform.processor() or platform.machine()}")
    print(f"{'pipeline':28} {'images/s':>9} {'ratio min':>10} {'median':>7} {'max':>6} "
          f"{'difference of 255':>18}")
    rows = []
    for name in variants:
        ratios = [b / t for b, t in zip(times[base], times[name], strict=True)]
        apart = ((outputs[name] - outputs[base]).abs() * std).mean().item() * 255
        rows.append({
            "benchmark": "data_loading", "variant": name, "baseline": base, "device": "cpu",
            "dtype": "uint8", "batch": batch, "ratio_min": min(ratios),
            "ratio_median": statistics.median(ratios), "ratio_max": max(ratios),
            "images_per_second": batch / statistics.median(times[name]),
            "mean_difference_of_255": apart, "torch": torch.__version__,
        })  # fmt: skip
        row = rows[-1]
        print(f"{name:28} {row['images_per_second']:9.0f} {row['ratio_min']:10.2f} "
              f"{row['ratio_median']:7.2f} {row['ratio_max']:6.2f} {apart:18.3f}")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
