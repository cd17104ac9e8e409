"""Writes the network of a checkpoint in forms that other programs read, and checks each.

examples:
  export.py runs/eca_resnet50-1/best.pth        best.onnx, best.pt2, best.safetensors beside it
  export.py CKPT --to onnx openvino --output deploy
  export.py CKPT --to hf                        a folder best-hf for models.from_pretrained
  export.py DETECTOR                            best.onnx: boxes, labels, scores (and masks)
  export.py CKPT --int8 DATA                    best.int8.onnx, evaluated on the images in DATA/val
"""

import utils.system.script_start  # noqa: F401  # isort: skip - what follows takes seconds
import io
import os
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from models.classifier import Classifier
from models.inference import optimise_for_inference
from models.inspection import COARSEST
from models.weights import Network, describe_network
from utils.command_line.prediction_and_export import (
    TRACED,
    export_parser,
    format_of,
    refuse_for_detector,
    settle_export,
)
from utils.data.decoding import DECODERS
from utils.inspection import export as formats
from utils.inspection import int8
from utils.inspection.exported_network import run_onnx, run_openvino
from utils.inspection.predictions import class_table
from utils.runs import foreign_files
from utils.runs.checkpoint import Checkpoint
from utils.system.errors import EXIT_FAILED, UserError
from utils.system.faults import run_script
from utils.system.files import check_writable, write_atomically
from utils.training.classifier import network_line

# What is added to the checkpoint's name; for the others it is a point and the format's name.
ENDINGS = {"openvino": (".xml", ".bin"), "hf": tuple(f"-hf/{name}" for name in formats.HF_FILES)}
Contents = tuple[bytes, ...]  # of each file of a format


def main() -> None:
    typed = export_parser(__doc__).parse_args()
    args = settle_export(Namespace(**vars(typed)))
    formats.check_packages(args.to, int8=args.int8 is not None)
    source = Path(args.checkpoint)
    checkpoint = Checkpoint.read(source)
    if checkpoint.is_detector:
        refuse_for_detector(typed)
        write_detector(source, checkpoint, args.output)
        return
    targets = target_files(source, args.output, args.to, args.int8 is not None)
    network = checkpoint.network(args.attention).eval().requires_grad_(False)
    metadata = {
        **describe_network(network),
        "classes": list(checkpoint.classes or ()),
        **vars(checkpoint.preprocessing(args.img_size)),
        "precision": "float32",
    }
    data = None
    if args.int8 is not None:  # before the minutes of tracing
        data = int8.open_data(args.int8, metadata["classes"], network.num_classes)
    # Only a graph is evaluated again without its checkpoint (main.py -e), which would know this.
    decoder = checkpoint.flags.get("decoder")
    graphs = {**metadata, "decoder": decoder if decoder in DECODERS else DECODERS[0]}
    print(network_line(network), flush=True)
    form = network
    if not args.no_fold and TRACED & set(args.to) and isinstance(network, Classifier):
        form = optimise_for_inference(network, torch.float32).network
    if data is not None:
        (onnx_file,), _ = graph_file("onnx", form, network, graphs, "float32")
        made = int8.quantised_files(
            onnx_file, graphs, data, args.to, args.calibration_images, args.max_drop
        )
        for name, (contents, note) in made.items():
            write(targets[name], contents, note)
        return
    for name, files in targets.items():
        if name in TRACED:
            contents, note = graph_file(name, form, network, graphs, files[0].name)
        elif name == "safetensors":
            contents = (tensors(network, metadata, files[0].name),)
            note = "the tensors of the checkpoint"
        else:
            contents = formats.hugging_face_texts(network, checkpoint, metadata)
            contents = (contents[0], tensors(network, metadata, files[1].name), contents[1])
            note = "for models.from_pretrained; read README.md before you upload the folder"
        write(files, contents, note)


def write_detector(source: Path, checkpoint: Checkpoint, output: str | None) -> None:
    """Writes a detector as ONNX, compared with the network on images of several sizes."""
    from models.detection import detectors  # torchvision is slow to import

    files = target_files(source, output, ("onnx",), in_int8=False)["onnx"]
    network = checkpoint.detector()
    description = detectors.describe_detector(network)
    if description["model_kwargs"]["legacy"]:
        raise UserError(
            f"{source}: has mmdetection v1's geometry (--legacy), whose resizing and RoIAlign "
            "count in Python, which a graph does not follow: it cannot be exported"
        )
    first_label = detectors.FIRST_LABEL[network.arch]
    names, ids = class_table(checkpoint, network.num_classes - first_label)
    metadata = {
        **description,
        "classes": names,
        "category_ids": ids,
        "first_label": first_label,
        "min_size": network.transform.min_size[-1],
        "max_size": network.transform.max_size,
        "precision": "float32",
    }
    print(f"network: {network.arch} on {network.backbone_arch}, {len(names)} classes", flush=True)
    detector = formats.prepared_detector(network)
    data = formats.detector_to_onnx(detector, metadata)
    same = formats.check_detector(data, detector, files[0].name)
    note = f"one image of any size; {same.objects} objects within {same.pixels:.0e} pixels"
    note += f", IoU of masks {100 * same.overlap:.1f} %" * (network.arch == "mask_rcnn")
    note += f", {same.others} of a tie" * (same.others > 0)
    write(files, (data,), note)


def target_files(
    source: Path, output: str | None, names: Sequence[str], in_int8: bool
) -> dict[str, list[Path]]:
    """Names the files to write: OpenVINO's two, the three of hf, one of each other format.

    Args:
        output: a folder, or the file itself, see `format_of`; None for the checkpoint's folder.
        in_int8: which then is in the files' names.
    """
    folder = Path(output) if output else source.parent
    stem = re.sub(r"(\.(pth|pt|tar|safetensors))+$", "", source.name) + ".int8" * in_int8
    if format_of(output):
        folder, stem = folder.parent, folder.stem
    targets = {
        name: [folder / f"{stem}{ending}" for ending in ENDINGS.get(name, (f".{name}",))]
        for name in names
    }
    for target in (file for files in targets.values() for file in files):
        if os.path.lexists(target):  # a link that leads nowhere, too
            raise UserError(f"{target}: is there already; move it, or choose another --output")
    check_writable(folder)
    return targets


def tensors(network: Network, metadata: Mapping[str, object], shown: str) -> bytes:
    """Returns a .safetensors file, read back and compared bit for bit; `shown` is its name."""
    state_dict = network.state_dict()
    data = foreign_files.to_safetensors(state_dict, metadata)
    foreign_files.check_safetensors(data, state_dict, shown)
    return data


def graph_file(
    name: str, form: nn.Module, network: nn.Module, metadata: Mapping[str, object], shown: str
) -> tuple[Contents, str]:
    """Makes a format's files from the network's graph, and compares their logits.

    Args:
        name: onnx, pt2 or openvino.
        form: the network as it is to be written, such as with BatchNorm folded.
        network: what `form` stands for.

    Returns:
        The contents of each file, and a note on them.
    """
    size = metadata["img_size"]
    # A .pt2 is for one position of the last feature map, or for more: not for both. A library's
    # network may take one size alone.
    any_size = isinstance(network, Classifier) and (name != "pt2" or size > COARSEST)
    side = max(size, 2 * COARSEST)
    example = (side, side + COARSEST) if any_size else (size, size)  # no rule is read into these
    graph = formats.to_exported(form, example, any_size)
    contents: Contents
    if name == "pt2":
        contents = (formats.to_pt2(graph, metadata),)
        run = torch.export.load(io.BytesIO(contents[0])).module()
    else:
        contents = (formats.to_onnx(graph, metadata, any_size),)
        if name == "openvino":
            contents = formats.to_openvino(*contents, metadata)
        run = run_onnx(*contents) if name == "onnx" else run_openvino(*contents)
    shapes = [(1, size, size), (4, size, size), (2, size + 9, size + 40)][: 2 + any_size]
    worst = formats.largest_difference(run, network, shapes, shown)
    sizes = "any size" if any_size else f"{size} x {size} pixels"
    if name == "pt2" and any_size:
        sizes = f"sizes above {COARSEST}"
    return contents, f"any batch, {sizes}; logits within {worst:.0e} of the network's"


def write(files: Sequence[Path], contents: Contents, note: str) -> None:
    """Writes each file whole or not at all; the first, which readers open, as the last."""
    try:
        files[0].parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{files[0].parent}: {error.strerror}; choose another --output", EXIT_FAILED
        ) from None
    for target, data in reversed(list(zip(files, contents, strict=True))):
        write_atomically(target, data)
    same = all(file.stem == files[0].stem for file in files)
    names = " and ".join([str(files[0]), *(f.suffix if same else f.name for f in files[1:])])
    print(f"{names}: {sum(map(len, contents)) / 1e6:.1f} MB, {note}", flush=True)


if __name__ == "__main__":
    run_script(main)
