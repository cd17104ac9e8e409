"""Makes int8 files for export.py: calibrated on images of train, compared on all of val.

Convolutions are computed in 8 bits, weights per output channel; scales of the activations come from
calibration images. What stays float is ECA's gate (some values a sample, with a sigmoid behind
them, so that there is nothing to gain), the first convolution (it sees the image, and takes few
operations), the pooling behind it (slow in 8 bits) and the last layer (the logits).
"""

import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.data import demo_sets, shards
from utils.data.image_folder import ImageFolder
from utils.data.transforms import Preprocessing
from utils.inspection import export
from utils.inspection.exported_network import INPUT, Run, run_onnx, run_openvino
from utils.inspection.predictions import read_batches
from utils.system.errors import EXIT_FAILED, UserError
from utils.system.text import printable

BATCH = 16
TIMED = 9  # calls of each network, taken in turn
OPTIONS = {"ActivationSymmetric": False, "WeightSymmetric": True, "CalibMovingAverage": True}

Contents = tuple[tuple[bytes, ...], str]


def quantised_files(
    onnx_file: bytes,
    metadata: Mapping[str, object],
    data: tuple[ImageFolder, ImageFolder],
    formats: Sequence[str],
    calibration_images: int,
    max_drop: float,
) -> dict[str, Contents]:
    """Makes int8 files and evaluates each on all validation images.

    Args:
        onnx_file: the network in float32, BatchNorm folded, which int8 is compared with.
        metadata: of the network: classes, and the fields of `Preprocessing`.
        data: images of train and of val, from `open_data`.
        calibration_images: so many are taken from all over train; all where there are fewer.

    Returns:
        For each format the contents of its files, and a note on them.

    Raises:
        UserError: an image cannot be read, or top-1 falls by more.
    """
    train, val = data
    count = min(calibration_images, len(train))
    chosen = np.sort(np.random.default_rng(0).choice(len(train), count, replace=False))
    values: dict[str, Any] = {f.name: metadata[f.name] for f in fields(Preprocessing)}
    look = Preprocessing(**values)
    print(f"int8: calibrated on {count} of {len(train)} training images", flush=True)
    int8 = quantise(onnx_file, (images for images, _ in _batches(train.take(chosen), look)))
    made: dict[str, Contents] = {}
    for name in formats:
        before: tuple[bytes, ...] = (onnx_file,)
        after: tuple[bytes, ...] = (int8,)
        run: Callable[..., Run] = run_onnx
        if name == "openvino":
            before = export.to_openvino(onnx_file, metadata)
            after = export.to_openvino(int8, {**metadata, "precision": "int8"})
            run = run_openvino
        pair = {"float32": run(*before), "int8": run(*after)}
        top1, agreement, images = evaluate(pair, _batches(val, look))
        line = f"{name}: top-1 {top1['float32']:.2f} % in float32, {top1['int8']:.2f} % in int8"
        same = f"the same class for {agreement:.2f} % of {images} validation images"
        print(f"{line}; {same}", flush=True)
        if (drop := top1["float32"] - top1["int8"]) > max_drop:
            raise UserError(
                f"{name} in int8 loses {drop:.2f} points of top-1, more than --max-drop "
                f"{max_drop:g}: not written; more --calibration-images may help",
                EXIT_FAILED,
            )
        share = sum(map(len, after)) / sum(map(len, before))
        made[name] = after, f"{100 * share:.0f} % of float32's size; {_speeds(pair, look.img_size)}"
    return made


def open_data(
    data: str, classes: Sequence[str], num_classes: int
) -> tuple[ImageFolder, ImageFolder]:
    """Opens the images of train and val of DATA, labelled as the network's classes are.

    Args:
        classes: the network's; empty where its `num_classes` have no names.

    Raises:
        UserError: there is no such data, or it has other classes.
    """
    root = demo_sets.prepare(data)
    train, val = shards.open_split(str(root), classes or None)
    assert train is not None
    if len(train.classes) != num_classes:
        raise UserError(
            f"{printable(str(root))} has {len(train.classes)} class folders, the network "
            f"{num_classes} classes: the numbers must agree"
        )
    return train, val


def _batches(images: ImageFolder, look: Preprocessing) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields normalised images (N, 3, S, S), prepared as in evaluation, and labels (N,)."""
    paths = [images.path(i) for i in range(len(images))]
    labels = torch.as_tensor(np.asarray(images.labels), dtype=torch.int64)
    for batch in read_batches(paths, look, BATCH, torch.device("cpu")):
        if batch.broken:
            index, reason = batch.broken[0]
            raise UserError(
                f"{printable(paths[index])}: {reason}; repair or remove it", EXIT_FAILED
            )
        yield batch.images, labels[batch.indices]


def _speeds(pair: Mapping[str, Run], img_size: int) -> str:
    """Times both on random images, in turn, and tells the ratio at batch 1 and at `BATCH`."""
    texts = []
    for batch in (1, BATCH):
        images = torch.randn(batch, 3, img_size, img_size)
        seconds: dict[str, list[float]] = {name: [] for name in pair}
        for _ in range(TIMED):
            for name, network in pair.items():
                began = time.perf_counter()
                network(images)
                seconds[name].append(time.perf_counter() - began)
        ratios = [f / i for f, i in zip(seconds["float32"], seconds["int8"], strict=True)]
        texts.append(f"{statistics.median(ratios):.2f} at batch {batch}")
    return f"speed over float32's {', '.join(texts)}"


def quantise(onnx_file: bytes, batches: Iterable[Tensor]) -> bytes:
    """Makes an int8 ONNX file by onnxruntime's static quantisation, with the same metadata.

    The file holds QuantizeLinear and DequantizeLinear around each operation, which onnxruntime,
    OpenVINO and TensorRT understand.

    Args:
        onnx_file: in float32, with BatchNorm folded into the convolutions.
        batches: normalised images (N, 3, S, S), all of one N. The range of each activation is the
            mean of the batches' ranges.
    """
    import onnx
    from onnxruntime import quantization

    feeds = ({INPUT: batch.numpy()} for batch in batches)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        logging.disable(logging.WARNING)  # onnxruntime's advice to fold what is folded already
        stack.callback(logging.disable, logging.NOTSET)
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        model = onnx.shape_inference.infer_shapes(onnx.load_from_string(onnx_file))
        onnx.save(model, source)
        quantization.quantize_static(
            str(source),
            str(target),
            SimpleNamespace(get_next=lambda: next(feeds, None)),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Relu", "Clip", "Mul", "Add"],
            per_channel=True,
            # With signed ones onnxruntime computes convolutions before a ReLU in float on x86.
            activation_type=quantization.QuantType.QUInt8,
            # Processors without VNNI add two products of 8 bits in 16, where 8-bit weights overflow
            reduce_range=True,
            nodes_to_exclude=_float_nodes(model),
            calibrate_method=quantization.CalibrationMethod.MinMax,
            extra_options=OPTIONS,
        )
        result = onnx.load(target)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(result, {**properties, "precision": "int8"})
    return bytes(result.SerializeToString())


def _float_nodes(model: Any) -> list[str]:
    """Returns the names of nodes that stay in float: the first convolution, and the gates."""
    made_by = {output: node for node in model.graph.node for output in node.output}
    names = [next(node.name for node in model.graph.node if node.op_type == "Conv")]
    for node in model.graph.node:
        if node.op_type == "Sigmoid":
            before = made_by.get(node.input[0])
            while before is not None and before.op_type not in ("ReduceMean", "GlobalAveragePool"):
                names.append(before.name)
                before = made_by.get(before.input[0])
    return names


@torch.no_grad()
def evaluate(
    networks: Mapping[str, Run], batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[dict[str, float], float, int]:
    """Evaluates two networks on the same normalised images and labels (N,).

    Returns:
        Top-1 in % of each network, the share of images in % for which the two name the same class,
        and the number of images.
    """
    correct = dict.fromkeys(networks, 0)
    agree = images = 0
    for x, labels in batches:
        classes = {name: run(x).argmax(1) for name, run in networks.items()}
        for name, predicted in classes.items():
            correct[name] += int((predicted == labels).sum())
        first, second = classes.values()
        agree += int((first == second).sum())
        images += len(labels)
    top1 = {name: 100 * count / images for name, count in correct.items()}
    return top1, 100 * agree / images, images
