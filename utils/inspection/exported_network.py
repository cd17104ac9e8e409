"""Loads a file of export.py as a network: .onnx by onnxruntime, .pt2 by PyTorch, .xml by OpenVINO.

predict.py and main.py -e take such a file in the place of a checkpoint, so that its figures can be
compared with those of the checkpoint that it came from. What it says of itself (classes, image
size, crop) is in its metadata; a file without them is refused, because images prepared in another
way would give wrong figures without a word.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.inspection import export_formats, program_checks
from utils.system.errors import UserError
from utils.system.optional_packages import require

ENDINGS = {".onnx": "onnxruntime", ".pt2": "torch.export", ".xml": "OpenVINO"}
NEEDED = ("arch", "num_classes", "classes", "img_size", "crop_pct", "mean", "std")
INSTALL = "-r requirements-export.txt"
Shape = tuple[int | None, ...]  # of the input; None where any number will do


class ExportedNetwork(nn.Module):
    """Runs (N, 3, H, W) float32 on the CPU → logits (N, C) float32, by the file's engine.

    Attributes:
        metadata: what the file says of itself; has the keys of a checkpoint that describe the
            network, the class names and the preprocessing.
        engine: what runs it.
        fixed_size: (height, width) where the file takes images of one size alone, else None.
        fixed_batch: so many images the file takes at once, no more and no fewer; None: any number.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Tensor],
        path: Path,
        metadata: Mapping[str, object],
        shape: Shape,
    ):
        super().__init__()
        self.run, self.path = run, path
        self.metadata: dict[str, Any] = dict(metadata)
        self.engine = ENDINGS[path.suffix]
        self.fixed_batch, _, height, width = shape
        self.fixed_size = None if height is None or width is None else (height, width)
        self.arch = str(metadata["arch"])
        self.num_classes = int(metadata["num_classes"])

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Computes the logits, on the images' device.

        A file for a fixed number of images gets them in such parts.

        Raises:
            UserError: the file is for another image size, or its engine fails.
        """
        self.check_size(*images.shape[2:])
        device, images = images.device, images.detach().to("cpu", torch.float32).contiguous()
        try:
            if self.fixed_batch is None:
                logits = self.run(images)
            else:
                parts = [self._run_padded(part) for part in images.split(self.fixed_batch)]
                logits = torch.cat(parts)
        except Exception as error:  # what an engine raises is open-ended
            raise UserError(f"{self.path}: {self.engine} fails: {first_line(error)}") from None
        if logits.shape != (len(images), self.num_classes):
            raise UserError(
                f"{self.path}: gives an output of shape {tuple(logits.shape)} for {len(images)} "
                f"images, not ({len(images)}, {self.num_classes}); export it again"
            )
        return logits.to(device)

    def _run_padded(self, images: Tensor) -> Tensor:
        """Fills up with black images, whose logits are left out: each image has its own."""
        assert self.fixed_batch is not None
        lacking = self.fixed_batch - len(images)
        return self.run(F.pad(images, (0, 0) * 3 + (0, lacking)))[: len(images)]

    def check_size(self, height: int, width: int) -> None:
        """Refuses images of a size that the file does not take.

        Raises:
            UserError: says which it takes.
        """
        if self.fixed_size and (height, width) != self.fixed_size:
            raise UserError(
                f"{self.path}: made for images of {self.fixed_size[0]} x {self.fixed_size[1]} "
                f"pixels, not {height} x {width}: leave --img-size out, or export it again with "
                "that size"
            )

    def describe(self) -> str:
        """Gives the line that stands in the place of a checkpoint's network line."""
        precision = self.metadata.get("precision", "float32")
        return (
            f"network: {self.arch} from {self.path.name}, {precision}, run by {self.engine}, "
            f"{self.num_classes} classes"
            + (f", {self.fixed_batch} images at a time" if self.fixed_batch else "")
        )


def is_exported(path: str | Path) -> bool:
    """Tells by its name whether a file is one that this module reads."""
    return Path(path).suffix in ENDINGS


def load(path: str | Path) -> ExportedNetwork:
    """Reads a file of export.py.

    Raises:
        UserError: no such file, damaged, without export.py's metadata, prepared in another way, or
            its engine is not installed.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {what}; give a file of export.py")
    read = {".onnx": _read_onnx, ".pt2": _read_pt2, ".xml": _read_openvino}[path.suffix]
    with damage_in_one_line(path):
        run, metadata, shape = read(path)
    if describes_detector(metadata):
        raise UserError(f"{path}: holds a detector; give the file of a classifier")
    metadata = _checked(metadata, path)
    if len(shape) != 4 or shape[1] not in (3, None):
        shown = ", ".join("any" if side is None else str(side) for side in shape)
        raise UserError(
            f"{path}: takes an input of shape ({shown}), not (images, 3, height, width); make it "
            "with export.py"
        )
    network = ExportedNetwork(run, path, metadata, shape)
    side = int(network.metadata["img_size"])
    network(torch.zeros(1, 3, side, side))  # that it runs is found here, not after reading images
    return network


@contextmanager
def damage_in_one_line(path: Path) -> Iterator[None]:
    """Turns what a file makes its engine raise into one line with the file's name."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # what a damaged file makes an engine raise is open-ended
        raise UserError(
            f"{path}: damaged, or not a file of export.py ({first_line(error)})"
        ) from None


def describes_detector(metadata: Mapping[str, object]) -> bool:
    """Tells whether a file's metadata are a detector's."""
    return "backbone" in metadata


def _checked(metadata: Mapping[str, object], path: Path) -> Mapping[str, object]:
    lacking = [key for key in NEEDED if key not in metadata]
    if lacking:
        raise UserError(
            f"{path}: does not say {', '.join(lacking)}, so its images cannot be prepared as it "
            "needs them; make it with export.py"
        )
    classes, size, crop = (metadata[key] for key in ("classes", "img_size", "crop_pct"))
    fits = (
        isinstance(classes, list)
        and all(isinstance(name, str) for name in classes)
        and isinstance(metadata["num_classes"], int)
        and isinstance(size, int)
        and 0 < size <= 65536
        and isinstance(crop, int | float)
        and 0 < crop <= 1
    )
    if not fits:
        raise UserError(f"{path}: its metadata are not those of export.py; make it again")
    own = export_formats.MEAN_AND_STD
    if (tuple(metadata["mean"]), tuple(metadata["std"])) != own:
        raise UserError(f"{path}: made for images of mean and deviation other than {own}")
    return metadata


def open_onnx(path: Path) -> tuple[Any, dict[str, Any]]:
    """Opens an ONNX file: an onnxruntime.InferenceSession, and the metadata.

    Raises:
        UserError: onnxruntime is not installed.
    """
    require(("onnxruntime",), str(path), INSTALL)
    import onnxruntime

    # From bytes, so that a file cannot name others on this machine to be read as its weights.
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        path.read_bytes(), options, providers=["CPUExecutionProvider"]
    )
    held = session.get_modelmeta().custom_metadata_map
    return session, {key: _value(key, text) for key, text in held.items()}


def _read_onnx(path: Path) -> tuple[Callable, dict, Shape]:
    session, metadata = open_onnx(path)
    shape = _whole_numbers(session.get_inputs()[0].shape)
    return export_formats.by_onnxruntime(session), metadata, shape


def _read_pt2(path: Path) -> tuple[Callable, dict, Shape]:
    program_checks.refuse_code(path)
    extra = {export_formats.METADATA: ""}
    program = torch.export.load(path, extra_files=extra)
    metadata = json.loads(extra[export_formats.METADATA] or "{}")
    (example,) = program.graph_signature.user_inputs
    node = next(node for node in program.graph.nodes if node.name == example)
    shape = _whole_numbers(node.meta["val"].shape)
    module = program.module()
    return lambda images: module(images), metadata, shape  # as a child its eval() would fail


def _read_openvino(path: Path) -> tuple[Callable, dict, Shape]:
    require(("openvino",), str(path), INSTALL)
    weights = path.with_suffix(".bin")
    if not weights.is_file():
        raise UserError(f"{path}: {weights.name} must lie beside it; export.py writes the two")
    model = export_formats.openvino_core().read_model(path, weights)
    info = model.get_rt_info(export_formats.OPENVINO_INFO).value
    metadata = json.loads(str(info))
    sides = model.inputs[0].partial_shape
    shape = tuple(side.get_length() if side.is_static else None for side in sides)
    return export_formats.by_openvino(model), metadata, shape


def _whole_numbers(shape: Iterable[object]) -> Shape:
    """Puts None in the place of sides that have a name or a symbol, which stand for any number."""
    return tuple(side if isinstance(side, int) else None for side in shape)


def _value(key: str, text: str) -> object:
    """Undoes what `to_onnx` does to a value: strings as they are, others as JSON."""
    if key in export_formats.TEXT_METADATA:
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def first_line(error: Exception) -> str:
    """Returns the beginning of what an engine says, or the name of its error."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
