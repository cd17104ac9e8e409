"""Makes int8 files for export.py: calibrated on images of train, judged on all of val."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from utils.data import demo_sets, splits
from utils.data.image_folder import ImageFolder
from utils.data.user_images import read_batches
from utils.inspection import export_formats, quantisation
from utils.system.errors import EXIT_FAILED, UserError
from utils.system.text import printable

BATCH = 16
TIMED = 9  # calls of each network, taken in turn

Contents = tuple[tuple[bytes, ...], str]


def quantised_files(
    onnx_file: bytes,
    metadata: Mapping[str, object],
    data: str,
    formats: Sequence[str],
    calibration_images: int,
    max_drop: float,
    say: Callable[[str], None],
) -> dict[str, Contents]:
    """Makes int8 files and judges each on all validation images.

    Args:
        onnx_file: the network in float32, BatchNorm folded; its figures are what int8 is held to.
        metadata: of the network: classes, img_size, crop_pct.
        data: folder with train/ and val/, or demo data.
        formats: onnx, openvino, or both.
        calibration_images: so many are taken from all over train; all where there are fewer.
        max_drop: points of top-1 that may be lost.
        say: shows a line.

    Returns:
        For each format the contents of its files, and what there is to say of them.

    Raises:
        UserError: the data does not fit, an image cannot be read, or top-1 falls by more.
    """
    train, val = _open_data(data, metadata)
    count = min(calibration_images, len(train))
    chosen = np.sort(np.random.default_rng(0).choice(len(train), count, replace=False))
    size = metadata["img_size"], metadata["crop_pct"]
    say(f"int8: calibrated on {count} of {len(train)} training images")
    images = (x for x, _ in _batches(train.take(chosen), *size))
    int8 = quantisation.quantise(onnx_file, images)
    metadata = {**metadata, "precision": "int8"}
    made = {"onnx": (int8,)}
    if "openvino" in formats:
        made["openvino"] = export_formats.to_openvino(int8, metadata)
    run = {"onnx": export_formats.run_onnx, "openvino": export_formats.run_openvino}
    floats = {
        "onnx": lambda: (onnx_file,),
        "openvino": lambda: export_formats.to_openvino(onnx_file, metadata),
    }
    found = {}
    for name in formats:
        before = floats[name]()
        pair = {"float32": run[name](*before), "int8": run[name](*made[name])}
        top1, agreement, judged = quantisation.judge(pair, _batches(val, *size))
        drop = top1["float32"] - top1["int8"]
        say(
            f"{name}: top-1 {top1['float32']:.2f} % in float32, {top1['int8']:.2f} % in int8; the "
            f"same class for {agreement:.2f} % of {judged} validation images"
        )
        _refuse_loss(name, drop, max_drop)
        share = sum(map(len, made[name])) / sum(map(len, before))
        note = f"{100 * share:.0f} % of float32's size; {_speeds(pair, size[0])}"
        found[name] = made[name], note
    return found


def _refuse_loss(name: str, drop: float, max_drop: float) -> None:
    if drop > max_drop:
        raise UserError(
            f"{name} in int8 loses {drop:.2f} points of top-1, more than --max-drop "
            f"{max_drop:g}: not written; more --calibration-images may help",
            EXIT_FAILED,
        )


def _open_data(data: str, metadata: Mapping[str, object]) -> tuple[ImageFolder, ImageFolder]:
    """Opens the images of train and val, labelled as the network's classes are."""
    root = demo_sets.prepare(data) if demo_sets.is_demo(data) else data
    train, val = splits.open_split(str(root), metadata["classes"] or None)
    if len(train.classes) != metadata["num_classes"]:
        raise UserError(
            f"{printable(str(root))} has {len(train.classes)} class folders, the network "
            f"{metadata['num_classes']} classes: the numbers must agree"
        )
    return train, val


def _batches(
    images: ImageFolder, img_size: int, crop_pct: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields normalised images (N, 3, S, S), prepared as in evaluation, and labels (N,)."""
    paths = [images.path(i) for i in range(len(images))]
    labels = torch.as_tensor(np.asarray(images.labels), dtype=torch.int64)
    for batch in read_batches(paths, img_size, crop_pct, BATCH, torch.device("cpu")):
        if batch.broken:
            index, reason = batch.broken[0]
            raise UserError(
                f"{printable(paths[index])}: {reason}; repair or remove it", EXIT_FAILED
            )
        yield batch.images, labels[batch.indices]


def _speeds(pair: Mapping[str, Callable[[Tensor], Tensor]], img_size: int) -> str:
    """Times both on random images, in turn, and tells the ratio at batch 1 and at `BATCH`."""
    told = []
    for batch in (1, BATCH):
        images = torch.randn(batch, 3, img_size, img_size)
        seconds: dict[str, list[float]] = {name: [] for name in pair}
        for _ in range(TIMED):
            for name, network in pair.items():
                began = time.perf_counter()
                network(images)
                seconds[name].append(time.perf_counter() - began)
        ratios = [f / i for f, i in zip(seconds["float32"], seconds["int8"], strict=True)]
        told.append(f"{statistics.median(ratios):.2f} at batch {batch}")
    return f"speed over float32's {', '.join(told)}"
