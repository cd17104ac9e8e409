"""Loads a file of export.py as a network: .onnx by onnxruntime, .xml by OpenVINO.

predict.py takes such a file in the place of a checkpoint; main.py -e takes a classifier's. Classes,
image size and crop are in its metadata; a file without them is refused, because images prepared in
another way would silently give wrong figures.

A .pt2 is written but not read: to open it is to run its code. No other file of this machine is read
because a file names it: an .onnx whose weights lie elsewhere is refused, and an .xml has its
weights in the .bin of its own name.
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal
from xml.etree import ElementTree

import msgspec
import torch
from torch import Tensor, nn

from utils.system.errors import UserError, require
from utils.system.text import counted, printable

ENDINGS = {".onnx": "onnxruntime", ".xml": "OpenVINO"}
INSTALL = "-r requirements-export.txt"

# What export.py writes, and this file reads.
INPUT, OUTPUT = "images", "logits"
IMAGE, OBJECTS = "image", ("boxes", "labels", "scores", "masks")  # of a detector
OPENVINO_INFO = ["eca_net", "metadata"]  # where an .xml has them
LARGEST_SIZE = 8192  # pixels of a side

Objects = dict[str, Tensor]
Run = Callable[[Tensor], Tensor]
Finder = Callable[[Tensor], Objects]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Mean = Annotated[float, msgspec.Meta(ge=0, le=1)]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]


class ClassifierMetadata(msgspec.Struct):
    """Lists what a classifier's file must say of itself; it may say more."""

    arch: str
    num_classes: Positive
    classes: tuple[str, ...]  # empty where they have no names
    img_size: Annotated[int, msgspec.Meta(ge=1, le=LARGEST_SIZE)]
    crop_pct: Share
    mean: tuple[Mean, Mean, Mean]
    std: tuple[Share, Share, Share]
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def __post_init__(self) -> None:
        if len(self.classes) > self.num_classes:
            raise ValueError(f"{len(self.classes)} names for {self.num_classes} classes")


class DetectorMetadata(msgspec.Struct):
    """Lists what a detector's file must say of itself; it may say more."""

    arch: str
    backbone: str
    num_classes: Positive
    first_label: int
    max_size: Positive
    classes: tuple[str, ...]
    category_ids: tuple[int | None, ...]


class ExportedNetwork(nn.Module):
    """Runs (N, 3, H, W) float32 on the CPU → logits (N, C) float32, by the file's engine.

    Attributes:
        metadata: what the file says of itself, under a checkpoint's names.
    """

    def __init__(self, run: Run, path: Path, metadata: Mapping[str, Any]):
        super().__init__()
        self.run, self.path, self.metadata = run, path, dict(metadata)
        self.engine = ENDINGS[path.suffix]
        self.arch, self.num_classes = metadata["arch"], metadata["num_classes"]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Computes the logits, on the images' device.

        Raises:
            UserError: the engine fails, or gives another number of classes.
        """
        device, images = images.device, images.detach().to("cpu", torch.float32).contiguous()
        with _one_line(f"{self.path}: {self.engine} fails: {{}}"):
            logits = self.run(images)
        if logits.shape != (len(images), self.num_classes):
            raise UserError(
                f"{self.path}: gives an output of shape {tuple(logits.shape)} for "
                f"{counted(len(images), 'image')}, not ({len(images)}, {self.num_classes}); export "
                "it again"
            )
        return logits.to(device)

    def describe(self) -> str:
        """Returns the line that stands in the place of a checkpoint's network line."""
        precision = self.metadata.get("precision", "float32")
        return (
            f"network: {self.arch} from {self.path.name}, {precision}, run by {self.engine}, "
            f"{counted(self.num_classes, 'class')}"
        )


class ExportedDetector(nn.Module):
    """Runs a list of (3, H, W) images from 0 to 1 → a dict of objects each, by onnxruntime.

    Attributes:
        metadata: what the file says of itself, as `ExportedNetwork` has it.
        max_size: the longer side to which the file reduces an image.
    """

    def __init__(self, find: Finder, path: Path, metadata: dict[str, Any]):
        super().__init__()
        self.find, self.path, self.metadata = find, path, metadata
        self.arch, self.backbone_arch = metadata["arch"], metadata["backbone"]
        self.num_classes, self.first_label = metadata["num_classes"], metadata["first_label"]
        self.max_size = metadata["max_size"]

    @torch.no_grad()
    def forward(self, images: list[Tensor]) -> list[Objects]:
        """Finds the objects of each image."""
        with _one_line(f"{self.path}: onnxruntime fails: {{}}"):
            return [self.find(image.to("cpu", torch.float32).contiguous()) for image in images]


def is_exported(path: str | Path) -> bool:
    """Returns whether a file is, by its name, one that this module reads."""
    return Path(path).suffix in ENDINGS


def load(path: str | Path) -> ExportedNetwork | ExportedDetector:
    """Reads a file of export.py, of a classifier or of a detector.

    Raises:
        UserError: no such file, damaged, without export.py's metadata, prepared in another way,
            with weights in other files, for images of one size alone, or its engine is missing.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {what}; give a file of export.py")
    with _one_line(f"{path}: damaged, or not a file of export.py ({{}})"):
        if path.suffix == ".xml":
            run, metadata, shape = _read_openvino(path)
        else:
            require(("onnx", "onnxruntime"), str(path), INSTALL)
            session = onnx_session(_self_contained(path))
            properties = session.get_modelmeta().custom_metadata_map
            metadata = {key: _value(text) for key, text in properties.items()}
            run, shape = by_onnxruntime(session), _sides(session.get_inputs()[0].shape)
    if path.suffix == ".onnx" and "backbone" in metadata:
        _check(metadata, DetectorMetadata, path)
        return ExportedDetector(objects_by_onnxruntime(session), path, metadata)
    _check(metadata, ClassifierMetadata, path)
    side = metadata["img_size"]
    if shape not in (("any", 3, "any", "any"), ("any",) * 4, ("any", 3, side, side)):
        raise UserError(
            f"{path}: takes an input of shape ({', '.join(map(str, shape))}), not (any, 3, any, "
            "any); make it with export.py"
        )
    network = ExportedNetwork(run, path, metadata)
    network(torch.zeros(1, 3, side, side))  # that it runs is known here, not after reading images
    return network


def load_classifier(path: str | Path) -> ExportedNetwork:
    """Reads a classifier's file of export.py; raises as `load`."""
    network = load(path)
    if isinstance(network, ExportedDetector):
        raise UserError(f"{path}: holds a detector; give the file of a classifier")
    return network


@contextmanager
def _one_line(text: str) -> Iterator[None]:
    """Turns whatever an engine raises, which is open-ended, into one line: `text` with it in {}."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(text.format(printable(reason))) from None


def _check(metadata: Mapping[str, Any], kind: type[msgspec.Struct], path: Path) -> None:
    try:
        msgspec.convert(metadata, kind)
    except msgspec.ValidationError as error:
        raise UserError(
            f"{path}: its metadata are not those of export.py ({printable(str(error))}); make it "
            "with export.py"
        ) from None


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
        values = session.run(names, {IMAGE: image.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}

    return find


def run_onnx(data: bytes) -> Run:
    """Returns a function images → logits of an ONNX file."""
    return by_onnxruntime(onnx_session(data))


def _self_contained(path: Path) -> bytes:
    """Returns an ONNX model whose every tensor holds its values itself; refuses any other.

    It is written anew from what was looked at, so that an engine cannot see another model in the
    same bytes.
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
    return bytes(model.SerializeToString())


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


def _read_openvino(path: Path) -> tuple[Run, dict[str, Any], tuple[object, ...]]:
    require(("openvino",), str(path), INSTALL)
    model = openvino_core().read_model(*_with_its_weights(path))
    metadata = json.loads(str(model.get_rt_info(OPENVINO_INFO).value))
    shape = model.inputs[0].partial_shape
    sides = _sides(side.get_length() if side.is_static else None for side in shape)
    return by_openvino(model), metadata, sides


def _with_its_weights(path: Path) -> tuple[bytes, bytes]:
    """Returns the contents of an .xml and of its .bin, if the two were written together."""
    weights = path.with_suffix(".bin")
    if weights.is_symlink() or not weights.is_file():
        raise UserError(
            f"{path}: {weights.name} must lie beside it, as a file and not as a link; export.py "
            "writes the two"
        )
    xml, content = path.read_bytes(), weights.read_bytes()
    if not xml.startswith(b"<"):  # OpenVINO would look for a network in whatever it is: ONNX, say
        raise ValueError("no XML")
    parts = [part.attrib for part in ElementTree.fromstring(xml).iter("data")]
    ends = [int(part["offset"]) + int(part["size"]) for part in parts if "offset" in part]
    if max(ends, default=0) != len(content):
        raise UserError(
            f"{path}: needs {max(ends, default=0):,} bytes of weights, and {weights.name} has "
            f"{len(content):,}: it was not written with it; give both of one export"
        )
    return xml, content


def _sides(shape: Iterable[object]) -> tuple[object, ...]:
    """Returns a shape with "any" for a side of any length, which has a name or None here."""
    return tuple(side if isinstance(side, int) else "any" for side in shape)


def _value(text: str) -> object:
    """Undoes what `to_onnx` does to a value: strings as they are, others as JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text
