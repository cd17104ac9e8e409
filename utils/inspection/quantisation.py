"""Makes an ONNX file in 8-bit integers, calibrated on images and judged on others.

Convolutions are computed in 8 bits, weights per output channel; scales of the activations come from
calibration images. What stays float is ECA's gate (some values a sample, with a sigmoid behind
them, so that there is nothing to gain), the first convolution (it sees the image, and takes few
operations), the pooling behind it (slow in 8 bits) and the last layer (the logits).
"""

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.inspection.export_formats import INPUT


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

    with tempfile.TemporaryDirectory() as folder, _without_warnings():
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        model = onnx.shape_inference.infer_shapes(onnx.load_from_string(onnx_file))
        onnx.save(model, source)
        quantization.quantize_static(
            str(source),
            str(target),
            _Reader(batches),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Relu", "Clip", "Mul", "Add"],
            per_channel=True,
            # With signed ones onnxruntime computes convolutions before a ReLU in float on x86.
            activation_type=quantization.QuantType.QUInt8,
            # Processors without VNNI add two products of 8 bits in 16, where 8-bit weights overflow
            reduce_range=True,
            nodes_to_exclude=_float_nodes(model),
            calibrate_method=quantization.CalibrationMethod.MinMax,
            extra_options={
                "ActivationSymmetric": False,
                "WeightSymmetric": True,
                "CalibMovingAverage": True,
            },
        )
        result = onnx.load(target)
        del result.metadata_props[:]
        result.metadata_props.extend(onnx.load_from_string(onnx_file).metadata_props)
        for entry in result.metadata_props:
            if entry.key == "precision":
                entry.value = "int8"
        return result.SerializeToString()


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Hides onnxruntime's advice, to fold what is folded already, from the terminal."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class _Reader:
    """Gives calibration images as onnxruntime asks for them: one batch a call, None at the end."""

    def __init__(self, batches: Iterable[Tensor]):
        self.batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {INPUT: batch.numpy()}

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return iter(self.get_next, None)

    def __next__(self) -> dict[str, np.ndarray]:
        found = self.get_next()
        if found is None:
            raise StopIteration
        return found


def _float_nodes(model) -> list[str]:
    """Returns the names of nodes that stay in float: the first convolution, and the gates."""
    made_by = {output: node for node in model.graph.node for output in node.output}
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    kept = [first.name]
    for node in model.graph.node:
        if node.op_type == "Sigmoid":
            before = made_by.get(node.input[0])
            while before is not None and before.op_type not in ("ReduceMean", "GlobalAveragePool"):
                kept.append(before.name)
                before = made_by.get(before.input[0])
    return kept


@torch.no_grad()
def judge(
    networks: dict[str, Callable[[Tensor], Tensor]], batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[dict[str, float], float, int]:
    """Evaluates networks on the same images, batch by batch.

    Args:
        networks: name -> images (N, 3, S, S) to logits (N, C). Agreement is that of the first with
            the last.
        batches: normalised images and labels (N,).

    Returns:
        Top-1 in % of each network, the share of images in % for which the first and the last name
        the same class, and the number of images.
    """
    right = dict.fromkeys(networks, 0)
    agree = images = 0
    for x, labels in batches:
        guesses = {name: run(x).argmax(1) for name, run in networks.items()}
        for name, guess in guesses.items():
            right[name] += int((guess == labels).sum())
        first, *_, last = guesses.values()
        agree += int((first == last).sum())
        images += len(labels)
    top1 = {name: 100 * count / images for name, count in right.items()}
    return top1, 100 * agree / images, images
