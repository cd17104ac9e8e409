"""Loads a file of export.py as a network: .onnx by onnxruntime, .xml by OpenVINO.

predict.py takes such a file in the place of a checkpoint, of a classifier or of a detector;
main.py -e takes a classifier's, so that its figures can be compared with those of the checkpoint
that it came from. What a file says of itself (classes, image size, crop) is in its metadata; one
without them is refused, because images prepared in another way would give wrong figures without a
word.

A .pt2 is written but not read: to open it is to run what it holds. No other file of this machine is
read for what a file names: a tensor in an .onnx may say that its values lie elsewhere, and such a
file is refused. An .xml has its weights in the .bin of its own name, and in nothing else.
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from utils.system.errors import UserError, require
from utils.system.text import counted

ENDINGS = {".onnx": "onnxruntime", ".xml": "OpenVINO"}
INSTALL = "-r requirements-export.txt"

# What export.py writes, and this file reads.
INPUT, OUTPUT = "images", "logits"
IMAGE, OBJECTS = "image", ("boxes", "labels", "scores", "masks")  # of a detector
OPENVINO_INFO = ["eca_net", "metadata"]  # where an .xml keeps them
TEXT_METADATA = ("arch", "attention", "backbone", "decoder", "precision")  # in ONNX as they are
MEAN_AND_STD = (IMAGENET_MEAN, IMAGENET_STD)  # what the images of all networks here are made with
NEEDED = ("arch", "num_classes", "classes", "img_size", "crop_pct", "mean", "std")
OF_DETECTOR = {
    **dict.fromkeys(("arch", "backbone"), str),
    **dict.fromkeys(("num_classes", "first_label", "max_size"), int),
    **dict.fromkeys(("classes", "category_ids"), list),
}

LARGEST_SIZE = 8192  # pixels of a side

Shape = tuple[int | None, ...]  # of the input; None where any number will do
Objects = dict[str, Tensor]
Run = Callable[[Tensor], Tensor]
Finder = Callable[[Tensor], Objects]


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
            raise UserError(f"{self.path}: {self.engine} fails: {_first_line(error)}") from None
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
            f"{counted(self.num_classes, 'class')}"
            + (f", {counted(self.fixed_batch, 'image')} at a time" if self.fixed_batch else "")
        )


class ExportedDetector(nn.Module):
    """Runs a list of (3, H, W) images from 0 to 1 → a dict of objects each, by onnxruntime.

    Attributes:
        metadata: what the file says of itself; has the keys of a checkpoint that name the network
            and its classes.
        transform: has `max_size`, the longer side to which the file reduces an image.
        first_label: the label of the first class.
    """

    def __init__(self, find: Finder, path: Path, metadata: dict[str, Any]):
        super().__init__()
        self.find, self.path, self.metadata = find, path, metadata
        self.arch, self.backbone_arch = str(metadata["arch"]), str(metadata["backbone"])
        self.num_classes, self.first_label = metadata["num_classes"], metadata["first_label"]
        self.transform = SimpleNamespace(max_size=metadata["max_size"])

    @torch.no_grad()
    def forward(self, images: list[Tensor]) -> list[Objects]:
        """Finds the objects of each image.

        Raises:
            UserError: onnxruntime fails.
        """
        try:
            return [self.find(image.to("cpu", torch.float32).contiguous()) for image in images]
        except Exception as error:  # what onnxruntime raises is open-ended
            reason = _first_line(error)
            raise UserError(f"{self.path}: onnxruntime fails: {reason}") from None


def is_exported(path: str | Path) -> bool:
    """Tells by its name whether a file is one that this module reads."""
    return Path(path).suffix in ENDINGS


def load(path: str | Path) -> ExportedNetwork | ExportedDetector:
    """Reads a file of export.py, of a classifier or of a detector.

    Raises:
        UserError: no such file, damaged, without export.py's metadata, prepared in another way,
            with weights in other files, or its engine is not installed.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {what}; give a file of export.py")
    with _damage_in_one_line(path):
        if path.suffix == ".xml":
            run, metadata, shape = _read_openvino(path)
        else:
            session, metadata = _open_onnx(path)
            if "backbone" in metadata:
                return _detector(session, path, metadata)
            run, shape = by_onnxruntime(session), _whole_numbers(session.get_inputs()[0].shape)
    metadata = _checked(metadata, path)
    if len(shape) != 4 or shape[1] not in (3, None):
        shown = ", ".join("any" if side is None else str(side) for side in shape)
        raise UserError(
            f"{path}: takes an input of shape ({shown}), not (images, 3, height, width); make it "
            "with export.py"
        )
    network = ExportedNetwork(run, path, metadata, shape)
    side = int(network.metadata["img_size"])
    network(torch.zeros(1, 3, side, side))  # that it runs is known here, not after reading images
    return network


def load_classifier(path: str | Path) -> ExportedNetwork:
    """Reads a classifier's file of export.py.

    Raises:
        UserError: it is a detector's, or as in `load`.
    """
    network = load(path)
    if isinstance(network, ExportedDetector):
        raise UserError(f"{path}: holds a detector; give the file of a classifier")
    return network


def _detector(session: Any, path: Path, metadata: dict[str, Any]) -> ExportedDetector:
    fits = all(isinstance(metadata.get(key), kind) for key, kind in OF_DETECTOR.items())
    outputs = {output.name for output in session.get_outputs()}
    if not fits or not {*OBJECTS[:3]} <= outputs:
        raise UserError(f"{path}: its metadata are not those of export.py; make it again")
    return ExportedDetector(objects_by_onnxruntime(session), path, metadata)


@contextmanager
def _damage_in_one_line(path: Path) -> Iterator[None]:
    """Turns what a file makes its engine raise into one line with the file's name."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # what a damaged file makes an engine raise is open-ended
        raise UserError(
            f"{path}: damaged, or not a file of export.py ({_first_line(error)})"
        ) from None


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
        and len(classes) <= metadata["num_classes"]
        and isinstance(size, int)
        and 0 < size <= LARGEST_SIZE
        and isinstance(crop, int | float)
        and 0 < crop <= 1
    )
    if not fits:
        raise UserError(f"{path}: its metadata are not those of export.py; make it again")
    if [metadata["mean"], metadata["std"]] != [list(values) for values in MEAN_AND_STD]:
        raise UserError(f"{path}: made for images of mean and deviation other than {MEAN_AND_STD}")
    return metadata


def onnx_session(data: bytes) -> Any:
    """Opens an ONNX model as an onnxruntime.InferenceSession on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    # Not by a look at the bytes: onnxruntime has a format of its own, which was not checked.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def by_onnxruntime(session: Any) -> Run:
    """Returns a function images → logits through an onnxruntime.InferenceSession."""
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def objects_by_onnxruntime(session: Any) -> Finder:
    """Returns a function image (3, H, W) → objects through an onnxruntime.InferenceSession."""
    names = [output.name for output in session.get_outputs()]

    def find(image: Tensor) -> Objects:
        found = session.run(names, {IMAGE: image.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}

    return find


def run_onnx(data: bytes) -> Run:
    """Runs the network in an ONNX file, see `by_onnxruntime`."""
    return by_onnxruntime(onnx_session(data))


def _open_onnx(path: Path) -> tuple[Any, dict[str, Any]]:
    """Opens an ONNX file: an onnxruntime.InferenceSession, and the metadata."""
    require(("onnx", "onnxruntime"), str(path), INSTALL)
    session = onnx_session(_self_contained(path))
    held = session.get_modelmeta().custom_metadata_map
    return session, {key: _value(key, text) for key, text in held.items()}


def _self_contained(path: Path) -> bytes:
    """Returns an ONNX model whose every tensor holds its values itself.

    It is written anew from what was looked at, so that an engine cannot see another model in the
    same bytes.

    Raises:
        UserError: a tensor's values lie in another file.
    """
    import onnx

    model = onnx.ModelProto.FromString(path.read_bytes())
    model.DiscardUnknownFields()
    for part in _messages(model):
        if isinstance(part, onnx.TensorProto) and (
            part.external_data or part.data_location == onnx.TensorProto.EXTERNAL
        ):
            where = {entry.key: entry.value for entry in part.external_data}.get("location", "")
            raise UserError(
                f"{path}: takes values of {part.name[:60]!r} from another file, {where[:200]!r}; "
                "refused: give a file that holds all of its weights, as export.py writes it"
            )
    return model.SerializeToString()


def _messages(message: Any) -> Iterator[Any]:
    """Yields a protobuf message and all that lie in it: graphs, nodes, attributes, tensors."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(part)


@functools.cache
def openvino_core() -> Any:
    """Returns the process's one openvino.Core, which lives to the end of the process.

    Each Core gives the thread a stack for signals and, when it goes, puts back the one of before.
    Two that go in the order in which they came leave the stack of the first, which is freed by
    then: the next signal, of a child that ends, say, is a segmentation fault.
    """
    import openvino

    return openvino.Core()


def by_openvino(model: Any) -> Run:
    """Returns a function images → logits through an openvino.Model, on the CPU.

    Without the hint OpenVINO would compute in bfloat16 where the processor has it, and other
    machines would give other figures.
    """
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino_core().compile_model(model, "CPU", settings).create_infer_request()
    return lambda images: torch.from_numpy(request.infer([images.numpy()])[0].copy())


def run_openvino(xml: bytes, weights: bytes) -> Run:
    """Runs the network in OpenVINO's files (.xml, .bin), on the CPU in the files' precision."""
    return by_openvino(openvino_core().read_model(xml, weights))


def _read_openvino(path: Path) -> tuple[Run, dict[str, Any], Shape]:
    require(("openvino",), str(path), INSTALL)
    model = openvino_core().read_model(*_with_its_weights(path))
    metadata = json.loads(str(model.get_rt_info(OPENVINO_INFO).value))
    sides = model.inputs[0].partial_shape
    shape = tuple(side.get_length() if side.is_static else None for side in sides)
    return by_openvino(model), metadata, shape


def _with_its_weights(path: Path) -> tuple[bytes, bytes]:
    """Returns the contents of an .xml and of its .bin.

    Raises:
        UserError: there is no such .bin, or it is not the one that was written with the .xml.
        ValueError: it is no XML. OpenVINO would look for a network in whatever it is: ONNX, say.
    """
    weights = path.with_suffix(".bin")
    if weights.is_symlink() or not weights.is_file():
        raise UserError(
            f"{path}: {weights.name} must lie beside it, as a file and not as a link; export.py "
            "writes the two"
        )
    xml, held = path.read_bytes(), weights.read_bytes()
    if not xml.startswith(b"<"):
        raise ValueError("no XML")
    parts = [part.attrib for part in ElementTree.fromstring(xml).iter("data")]
    ends = [int(part["offset"]) + int(part["size"]) for part in parts if "offset" in part]
    if max(ends, default=0) != len(held):
        raise UserError(
            f"{path}: needs {max(ends, default=0):,} bytes of weights, and {weights.name} has "
            f"{len(held):,}: it was not written with it; give both of one export"
        )
    return xml, held


def _whole_numbers(shape: Iterable[object]) -> Shape:
    """Puts None in the place of sides that have a name or a symbol, which stand for any number."""
    return tuple(side if isinstance(side, int) else None for side in shape)


def _value(key: str, text: str) -> object:
    """Undoes what `to_onnx` does to a value: strings as they are, others as JSON."""
    if key in TEXT_METADATA:
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _first_line(error: Exception) -> str:
    """Returns the beginning of what an engine says, or the name of its error."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
