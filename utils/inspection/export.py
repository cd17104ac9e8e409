"""Writes a network for other programs, and compares each file with the network before it is kept.

Classifiers: ONNX, torch.export's .pt2, OpenVINO's .xml and .bin, and the texts of a Hugging Face
folder. Detectors: ONNX, by PyTorch's exporter by tracing, since the newer one, by torch.export,
does not get past non-maximum suppression, whose number of boxes depends on the image.

The optional packages are imported where they are used.
"""

import copy
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from utils.inspection import exported_network as engines
from utils.runs.checkpoint import Checkpoint
from utils.system.errors import EXIT_FAILED, UserError, require

NEEDS = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "pt2": (),
    "safetensors": ("safetensors",),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "hf": ("safetensors",),
}
METADATA = "metadata.json"  # within a .pt2
TOLERANCE = 1e-4  # relative to the largest logit
# Of a Hugging Face folder; config.json is written last, as whoever reads begins with it.
HF_FILES = ("config.json", "model.safetensors", "README.md")
CONFIG_FORMAT = 1

# Of detectors.
THRESHOLD = "score_thresh"  # how the name of the file's tensor with the least score ends
OPSET = 18
PIXELS, SCORE, OVERLAP = 0.1, 1e-4, 0.9  # that boxes and scores may be off; masks' least IoU
OTHERS = 0.02  # share of objects that may be on one side alone, see `Agreement`
TRIAL_OBJECTS = 10  # so many at least in each image, by a lower least score where needed

CARD = Path(__file__).with_name("model_card.txt")  # README.md of a Hugging Face folder


def check_packages(formats: Sequence[str], int8: bool = False) -> None:
    """Refuses an export, before its work, when a package is missing."""
    for name in formats:
        require(NEEDS[name], f"--to {name}", engines.INSTALL)
    if int8:
        require(NEEDS["onnx"], "--int8", engines.INSTALL)


def to_exported(
    network: nn.Module, size: tuple[int, int], any_size: bool = True
) -> torch.export.ExportedProgram:
    """Returns the graph of `network` for any batch and, if so asked, any height and width.

    Args:
        network: (N, 3, H, W) float32 → logits (N, C), in eval mode on the CPU.
        size: height and width of the example that it is traced with. Equal sides, or ones that
            leave a single position of the last feature map, would be taken for a rule.
    """
    axes = (0, 2, 3) if any_size else (0,)
    dynamic = dict.fromkeys(axes, torch.export.Dim.DYNAMIC)
    with torch.no_grad():
        return torch.export.export(network, (torch.zeros(2, 3, *size),), dynamic_shapes=(dynamic,))


def to_pt2(exported: torch.export.ExportedProgram, metadata: Mapping[str, object]) -> bytes:
    """Returns a .pt2 file, for `torch.export.load`, with metadata.json as an extra file."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on tensors that share memory, which is as it should be
        torch.export.save(exported, buffer, extra_files={METADATA: json.dumps(metadata)})
    return buffer.getvalue()


def to_onnx(
    exported: torch.export.ExportedProgram, metadata: Mapping[str, object], any_size: bool = True
) -> bytes:
    """Returns an ONNX file, input "images" and output "logits"; the metadata are its properties."""
    with _quiet_exporter():
        program = torch.onnx.export(
            exported,
            input_names=[engines.INPUT],
            output_names=[engines.OUTPUT],
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    for dimension, name in ((0, "batch"), (2, "height"), (3, "width"))[: 1 + 2 * any_size]:
        model.graph.input[0].type.tensor_type.shape.dim[dimension].dim_param = name
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    return _with_properties(model, metadata)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Hides what the exporter says of its future and of constants: the trial shows what counts."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _with_properties(model: Any, metadata: Mapping[str, object]) -> bytes:
    """Returns an onnx.ModelProto as bytes with metadata: strings as they are, others as JSON."""
    for key, value in metadata.items():
        text = value if isinstance(value, str) else json.dumps(value)
        model.metadata_props.add(key=key, value=text)
    return bytes(model.SerializeToString())


def _run(written: Callable[[Tensor], Any], images: Tensor, name: str) -> Any:
    """Runs a file that was just made; refuses one that cannot be run."""
    try:
        return written(images)
    except Exception as error:  # what a runtime raises is open-ended
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{name} does not run at {tuple(images.shape)}: {reason}; not written", EXIT_FAILED
        ) from None


def to_openvino(onnx_file: bytes, metadata: Mapping[str, object]) -> tuple[bytes, bytes]:
    """Returns OpenVINO's two files, .xml and .bin, of the network in an ONNX file."""
    import openvino

    model = engines.openvino_core().read_model(onnx_file)
    model.set_rt_info(json.dumps(metadata), engines.OPENVINO_INFO)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model.xml"
        openvino.save_model(model, target, compress_to_fp16=False)
        return target.read_bytes(), target.with_suffix(".bin").read_bytes()


@torch.no_grad()
def largest_difference(
    written: Callable[[Tensor], Tensor],
    network: nn.Module,
    shapes: Sequence[tuple[int, int, int]],
    name: str,
) -> float:
    """Runs a network and its file on random images of some shapes (N, H, W).

    Returns:
        The largest difference of a logit, relative to the largest logit.

    Raises:
        UserError: it is more than `TOLERANCE`, or the file cannot be run.
    """
    chance = torch.Generator().manual_seed(0)
    worst = 0.0
    for n, height, width in shapes:
        images = torch.randn(n, 3, height, width, generator=chance)
        expected = network(images)
        apart = (_run(written, images, name) - expected).abs().max()
        difference = apart / expected.abs().max().clamp(min=1e-12)
        worst = max(worst, float(difference.nan_to_num(float("inf"))))
    if worst > TOLERANCE:
        raise UserError(
            f"{name} differs from the network by {worst:.1e} of the largest logit, more than "
            f"{TOLERANCE:g}: not written",
            EXIT_FAILED,
        )
    return worst


def hugging_face_texts(
    network: nn.Module, checkpoint: Checkpoint, metadata: Mapping[str, Any]
) -> tuple[bytes, bytes]:
    """Returns config.json, the fields that build the network and prepare its images, and README.md.

    The README's figures are those of exactly these weights: of the epoch at whose end the
    checkpoint was saved. One that was saved within an epoch has none.
    """
    fields = {"format": CONFIG_FORMAT, "library_name": "eca_net", **metadata}
    # In ASCII: the name of a class folder may be bytes that are no text, and comes back as it is.
    config = (json.dumps(fields, indent=2) + "\n").encode()
    figures = "The file that this folder was made from holds no figures of these weights."
    run = checkpoint.run
    row = run.history[-1] if run and run.history and run.step == 0 else {}
    if run and {"val_top1", "val_top5"} <= row.keys() and row["epoch"] + 1 == run.epoch:
        figures = (
            f"Top-1 {row['val_top1']:.2f} %, top-5 {row['val_top5']:.2f} % on the run's own "
            f"validation images, after epoch {row['epoch'] + 1:g}. The checkpoint does not say "
            "whose images those are."
        )
    card = CARD.read_text("utf-8").format(
        **{name: fields[name] for name in ("arch", "attention", "num_classes", "img_size")},
        parameters=sum(p.numel() for p in network.parameters()),
        ksize=", ".join(map(str, fields["ksize"] or ["none"])),
        interpolation=fields.get("interpolation", "bilinear"),
        resized=round(fields["img_size"] / fields["crop_pct"]),
        mean=", ".join(map(str, fields["mean"])),
        std=", ".join(map(str, fields["std"])),
        figures=figures,
    )
    return config, card.encode()


class Agreement(NamedTuple):
    """Says how a file's objects differ from its network's."""

    objects: int  # that were compared
    pixels: float  # the largest difference of a box's corner
    overlap: float  # the smallest IoU of two masks; 1 without masks
    others: int  # on one side alone: rounding decides which of two overlapping boxes stays


class _OneImage(nn.Module):
    """Runs a detector on one image (3, H, W), and gives its objects as a tuple of tensors."""

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        (objects,) = self.detector([image])
        return tuple(objects[name] for name in engines.OBJECTS if name in objects)


def prepared_detector(detector: nn.Module) -> Any:
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


def detector_to_onnx(detector: Any, metadata: Mapping[str, object]) -> bytes:
    """Returns an ONNX file: input "image" (3, H, W) from 0 to 1; outputs boxes (n, 4), labels (n,),
    scores (n,) and, of a Mask R-CNN, masks (n, 1, H, W).
    """
    import onnx

    masks = getattr(_head(detector), "mask_predictor", None) is not None
    names = engines.OBJECTS if masks else engines.OBJECTS[:-1]
    axes = {engines.IMAGE: {1: "height", 2: "width"}, **{name: {0: "objects"} for name in names}}
    if masks:
        axes["masks"] |= {2: "height", 3: "width"}
    least, buffer = detector.transform.min_size[-1], io.BytesIO()
    example = torch.rand(3, least + 5, int(1.4 * least) + 3)  # none of the trial's sizes
    with _quiet_exporter(), torch.no_grad():
        torch.onnx.export(
            _OneImage(detector).eval(),
            (example,),
            buffer,  # type: ignore[arg-type]  # which it takes, though its types say a path
            dynamo=False,
            opset_version=OPSET,
            input_names=[engines.IMAGE],
            output_names=list(names),
            dynamic_axes=axes,
        )
    model = onnx.load_from_string(buffer.getvalue())
    if masks:  # of one channel, which the exporter does not see
        model.graph.output[-1].type.tensor_type.shape.dim[1].dim_value = 1
    return _with_properties(model, metadata)


def trial_images(detector: Any) -> list[Tensor]:
    """Returns images (3, H, W) from 0 to 1, none of the traced size: a photograph in three sizes (a
    usual one, one whose longer side decides how it is resized, and an upright one), and noise.
    """
    from matplotlib import cbook  # slow to import; it brings a photograph

    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as photo:
        pixels = torch.from_numpy(np.array(photo.convert("RGB"))).permute(2, 0, 1)[None] / 255
    least, most = detector.transform.min_size[-1], detector.transform.max_size
    usual, wide = (least, int(1.25 * least) + 1), (int(0.35 * most) + 1, int(1.25 * most))
    upright = (int(1.6 * least) + 3, int(1.2 * least))
    noise = torch.rand(3, *usual, generator=torch.Generator().manual_seed(0))
    return [*(F.interpolate(pixels, size)[0] for size in (usual, wide, upright)), noise]


@torch.no_grad()
def check_detector(data: bytes, detector: nn.Module, name: str) -> Agreement:
    """Runs a file of `detector_to_onnx` and its `prepared_detector` on images, and compares.

    Where the network finds less than `TRIAL_OBJECTS` objects in one, both do so with a lower least
    score than the file's own.

    Raises:
        UserError: objects are missing or elsewhere, or the file does not run.
    """
    images, head = trial_images(detector), _head(detector)
    own = float(head.score_thresh)
    head.score_thresh.zero_()
    # The least score takes objects from the end of a list, and no others.
    expected = [detector([image])[0] for image in images]
    head.score_thresh.fill_(own)
    tops = [objects["scores"][:TRIAL_OBJECTS] for objects in expected]
    least = min([own, *(0.999 * float(scores[-1]) for scores in tops if len(scores))])
    run = engines.objects_by_onnxruntime(engines.onnx_session(with_threshold(data, least)))
    results = []
    for image, objects in zip(images, expected, strict=True):
        # A full list's last objects, of about the same score, may be others.
        full = len(objects["scores"]) >= head.detections_per_img
        lowest = max(least, float(objects["scores"].min())) if full else least
        results.append(compare_objects(objects, _run(run, image, name), lowest + SCORE))
    counts, pixels, overlaps, others = zip(*results, strict=True)
    total = Agreement(sum(counts), max(pixels), min(overlaps), sum(others))
    if not total.objects or total.others > max(1, OTHERS * total.objects):
        wrong = f"finds {total.others} others than the {total.objects} objects of the network"
    elif total.overlap < OVERLAP:
        wrong = f"has a mask that shares {100 * total.overlap:.0f} % with the network's"
    else:
        return total
    raise UserError(f"{name}: {wrong} in the trial images; not written", EXIT_FAILED)


def compare_objects(
    expected: engines.Objects, written: engines.Objects, lowest: float
) -> Agreement:
    """Looks for each of the network's objects among the file's, whose order may differ in ties.

    Objects that score no more than `lowest` may be on one side alone.
    """
    scores = (expected["scores"][:, None] - written["scores"]).abs()
    alike = (expected["labels"][:, None] == written["labels"]) & (scores <= SCORE)
    apart = (expected["boxes"][:, None] - written["boxes"]).abs().amax(2).nan_to_num(torch.inf)
    nearest, partner = F.pad(apart.where(alike, torch.inf), (0, 1), value=torch.inf).min(1)
    compared = expected["scores"] > lowest
    same = compared & (nearest <= PIXELS)
    objects = int(compared.sum())
    more = int((written["scores"] > lowest + SCORE).sum()) - objects
    pixels, overlap = 0.0, 1.0
    if same.any():
        pixels = float(nearest[same].max())
        if "masks" in expected:
            theirs = written["masks"][partner[same]]
            a, b = (masks.flatten(1) > 0.5 for masks in (expected["masks"][same], theirs))
            shared = (a & b).sum(1).double() / (a | b).sum(1)
            overlap = float(shared.nan_to_num(1.0).min())  # of two empty ones
    return Agreement(objects, pixels, overlap, objects - int(same.sum()) + max(0, more))


def with_threshold(data: bytes, least: float) -> bytes:
    """Returns an ONNX file of `detector_to_onnx` with another least score."""
    import onnx

    model = onnx.load_from_string(data)
    (tensor,) = [entry for entry in model.graph.initializer if entry.name.endswith(THRESHOLD)]
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.float32(least), tensor.name))
    return bytes(model.SerializeToString())
