"""Writes a detector as an ONNX file for export.py, and compares what both find in three images.

PyTorch's exporter by tracing makes it: the newer one, by torch.export, does not get past
non-maximum suppression, whose number of boxes depends on the image.
"""

import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.inspection.object_agreement import SCORE, Agreement, Objects, compare
from utils.system.errors import EXIT_FAILED, UserError

INPUT = "image"
OUTPUTS = ("boxes", "labels", "scores", "masks")  # the last of Mask R-CNN alone
THRESHOLD = "score_thresh"  # how the name of the file's tensor with the least score ends
OPSET = 18
TIED = 0.02  # share of objects in whose place another one of the same score may be
TRIAL_OBJECTS = 10  # so many at least in each image, by a lower least score where needed

Finder = Callable[[Tensor], Objects]


class _OneImage(nn.Module):
    """Runs a detector on one image (3, H, W), and gives its objects as a tuple of tensors."""

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        (objects,) = self.detector([image])
        return tuple(objects[name] for name in OUTPUTS if name in objects)


def prepared(detector: nn.Module) -> nn.Module:
    """Returns a copy whose least score is a tensor, so that the file holds it by a name."""
    detector = copy.deepcopy(detector).eval().requires_grad_(False)
    head = _head(detector)
    value = torch.tensor(float(head.score_thresh))
    del head.score_thresh
    head.register_buffer(THRESHOLD, value)
    return detector


def _head(detector: nn.Module) -> Any:
    """Returns the module that leaves out what scores too little."""
    return getattr(detector, "roi_heads", detector)


def to_onnx(detector: nn.Module, metadata: Mapping[str, object]) -> bytes:
    """Returns an ONNX file: input "image" (3, H, W) from 0 to 1; outputs boxes (n, 4), labels (n,),
    scores (n,) and, of a Mask R-CNN, masks (n, 1, H, W).

    Args:
        detector: from `prepared`.
        metadata: become the file's properties.

    Raises:
        UserError: the exporter does not know an operation; names it.
    """
    import onnx

    names = [name for name in OUTPUTS if name != "masks" or _has_masks(detector)]
    axes = {INPUT: {1: "height", 2: "width"}, **{name: {0: "objects"} for name in names}}
    buffer = io.BytesIO()
    least = detector.transform.min_size[-1]
    traced = torch.rand(3, least + 5, int(1.4 * least) + 3)  # none of the trial's sizes
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # on what a trace takes for a constant: the trial shows it
        try:
            torch.onnx.export(
                _OneImage(detector).eval(),
                (traced,),
                buffer,
                dynamo=False,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=names,
                dynamic_axes=axes,
            )
        except Exception as error:  # what the exporter raises is open-ended
            reason = str(error).strip().splitlines()[0][:200]
            raise UserError(f"ONNX cannot hold this detector: {reason}", EXIT_FAILED) from None
    model = onnx.load_from_string(buffer.getvalue())
    for output in model.graph.output:
        if output.name == "masks":
            sides = output.type.tensor_type.shape.dim
            sides[1].dim_value, sides[2].dim_param, sides[3].dim_param = 1, "height", "width"
    for key, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value if isinstance(value, str) else json.dumps(value)
    return model.SerializeToString()


def _has_masks(detector: nn.Module) -> bool:
    return getattr(_head(detector), "mask_predictor", None) is not None


def trial_sizes(detector: nn.Module) -> list[tuple[int, int]]:
    """Returns height and width of three images: a usual one, one whose longer side decides how it
    is resized, and an upright one that is made smaller.
    """
    resizing: Any = detector.transform
    least, most = resizing.min_size[-1], resizing.max_size
    wide = (int(0.35 * most) + 1, int(1.25 * most))
    return [(least, int(1.25 * least) + 1), wide, (int(1.6 * least) + 3, int(1.2 * least))]


def trial_image(height: int, width: int, chance: torch.Generator) -> Tensor:
    """Draws rectangles on a coloured ground with noise: (3, H, W) from 0 to 1."""
    ground = F.interpolate(torch.rand(1, 3, 4, 5, generator=chance), (height, width))[0]
    image = 0.8 * ground + 0.2 * torch.rand(3, height, width, generator=chance)
    for _ in range(8):
        place = torch.rand(4, generator=chance)
        top, left = int(0.8 * place[0] * height), int(0.8 * place[1] * width)
        bottom = top + 2 + int(0.5 * place[2] * height)
        right = left + 2 + int(0.5 * place[3] * width)
        image[:, top:bottom, left:right] = torch.rand(3, 1, 1, generator=chance)
    return image


@torch.no_grad()
def check(data: bytes, detector: nn.Module, name: str) -> Agreement:
    """Runs a file by onnxruntime and the network on images of three sizes, and compares.

    Where the network finds less than `TRIAL_OBJECTS` objects in one, both are compared with a lower
    least score, too.

    Args:
        data: from `to_onnx`.
        detector: from `prepared`.
        name: the file's, for messages.

    Raises:
        UserError: objects are missing or elsewhere, or the file does not run.
    """
    chance = torch.Generator().manual_seed(0)
    images = [trial_image(*size, chance) for size in trial_sizes(detector)]
    head = _head(detector)
    own = float(head.score_thresh)
    head.score_thresh.zero_()
    ranked = [detector([image])[0]["scores"] for image in images]
    lower = min([own, *(0.999 * float(s[:TRIAL_OBJECTS][-1]) for s in ranked if len(s))])
    results = []
    for least in dict.fromkeys((own, lower)):
        head.score_thresh.fill_(least)
        find = run_onnx(with_threshold(data, least))
        for image in images:
            expected = detector([image])[0]
            try:
                found = find(image)
            except Exception as error:  # what a runtime raises is open-ended
                reason = str(error).splitlines()[0][:200]
                raise UserError(
                    f"{name} does not run at {tuple(image.shape)}: {reason}; not written",
                    EXIT_FAILED,
                ) from None
            size = f"{image.shape[1]} x {image.shape[2]} pixels"
            # A full list's last objects, of about the same score, may be others.
            full = len(expected["scores"]) >= head.detections_per_img
            lowest = float(expected["scores"].min()) if full else least
            results.append(compare(expected, found, lowest + SCORE, f"{name}, {size}"))
    head.score_thresh.fill_(own)
    objects = sum(result.objects for result in results)
    if not objects:
        raise UserError(
            f"{name}: the network finds nothing in the trial images, so that nothing can be "
            "compared; not written",
            EXIT_FAILED,
        )
    tied = sum(result.tied for result in results)
    if tied > max(1, TIED * objects):
        raise UserError(
            f"{name}: has others of the same score in the place of {tied} of {objects} objects; "
            "not written",
            EXIT_FAILED,
        )
    pixels = max(result.pixels for result in results)
    return Agreement(objects, pixels, min(result.overlap for result in results), tied)


def with_threshold(data: bytes, least: float) -> bytes:
    """Returns an ONNX file of `to_onnx` with another least score."""
    import onnx

    model = onnx.load_from_string(data)
    (held,) = [tensor for tensor in model.graph.initializer if tensor.name.endswith(THRESHOLD)]
    value = torch.tensor(least).numpy()
    held.CopyFrom(onnx.numpy_helper.from_array(value, held.name))
    return model.SerializeToString()


def run_onnx(data: bytes) -> Finder:
    """Returns a function image (3, H, W) → objects, by onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return by_onnxruntime(session)


def by_onnxruntime(session: Any) -> Finder:
    """Returns a function image (3, H, W) → objects through an onnxruntime.InferenceSession."""
    names = [output.name for output in session.get_outputs()]

    def find(image: Tensor) -> Objects:
        found = session.run(names, {INPUT: image.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}

    return find
