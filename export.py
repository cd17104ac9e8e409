"""Writes the network of a checkpoint in forms that other programs read, and checks each.

examples:
  export.py runs/eca_resnet50-1/best.pth        best.onnx, best.pt2, best.safetensors beside it
  export.py CKPT --to onnx --output deploy
"""

import re
from pathlib import Path

import torch

from models.inference import optimise_for_inference
from models.inspection import COARSEST
from models.weights import describe_network, network_from_checkpoint
from utils.classification.report import network_line
from utils.data.loading import IMAGENET_MEAN, IMAGENET_STD
from utils.inspection import export_formats
from utils.options.parser import Parser, positive_int, run_script
from utils.runs import checkpoint_info, safetensors_file
from utils.runs.checkpoint import load
from utils.system.errors import UserError, as_user_error
from utils.system.files import write_atomically

FORMATS = {
    "onnx": (export_formats.to_onnx, export_formats.run_onnx),
    "pt2": (export_formats.to_pt2, export_formats.run_pt2),
}


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoint", metavar="CKPT", help="of main.py, or released weights")
    parser.add_argument(
        "--to",
        metavar="FORMAT",
        nargs="+",
        choices=export_formats.NEEDS,
        default=list(export_formats.NEEDS),
        help="onnx, pt2, safetensors (default: all three)",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="folder of the files (default: the checkpoint's own)"
    )
    parser.add_argument(
        "--no-fold",
        action="store_true",
        help="onnx and pt2: keep BatchNorm instead of folding it into the convolutions",
    )
    parser.add_argument(
        "--img-size",
        type=positive_int,
        metavar="S",
        help="pixels, recorded in the files (default: the checkpoint's); up to 32, a .pt2 takes "
        "this size alone",
    )
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.no_fold and not set(args.to) & FORMATS.keys():
        raise UserError(
            "--no-fold is for onnx and pt2, and safetensors holds BatchNorm as it is: leave it out"
        )
    export_formats.check_packages(args.to)
    source = Path(args.checkpoint)
    folder = Path(args.output) if args.output else source.parent
    stem = re.sub(r"(\.(pth|pt|tar|safetensors))+$", "", source.name)
    targets = {name: folder / f"{stem}.{name}" for name in args.to}
    for target in targets.values():
        if target.exists():
            raise UserError(f"{target}: is there already; move it, or choose another --output")

    checkpoint = load(source)
    checkpoint_info.refuse_detector(checkpoint, source)
    with as_user_error(f"{source}: "):
        network = network_from_checkpoint(checkpoint).eval().requires_grad_(False)
    img_size, crop_pct = checkpoint_info.preprocessing(checkpoint, args.img_size)
    metadata = {
        **describe_network(network),
        "classes": list(checkpoint.get("classes") or ()),
        "img_size": img_size,
        "crop_pct": crop_pct,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
    }
    print(network_line(network))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; choose another --output") from None

    form = network
    if not args.no_fold and set(args.to) & FORMATS.keys():
        form = optimise_for_inference(network, torch.float32).network
    for name, target in targets.items():
        if name == "safetensors":
            data = safetensors_file.to_safetensors(network.state_dict(), metadata)
            safetensors_file.check_safetensors(data, network.state_dict(), target.name)
            note = "the tensors of the checkpoint"
        else:
            # A .pt2 is for one position of the last feature map, or for more: not for both.
            any_size = name == "onnx" or img_size > COARSEST
            graph = export_formats.to_exported(form, example_size(img_size, any_size), any_size)
            write, run = FORMATS[name]
            data = write(graph, metadata)
            shapes = trial_shapes(img_size, any_size)
            worst = export_formats.largest_difference(run(data), network, shapes, target.name)
            sizes = "any size" if any_size else f"{img_size} x {img_size} pixels"
            if name == "pt2" and any_size:
                sizes = f"sizes above {COARSEST}"
            note = f"any batch, {sizes}; logits within {worst:.0e} of the network's"
        write_atomically(target, data)
        print(f"{target}: {len(data) / 1e6:.1f} MB, {note}", flush=True)


def example_size(img_size: int, any_size: bool) -> tuple[int, int]:
    """Height and width to trace with; for any size, such that no rule can be read into them."""
    side = max(img_size, 2 * COARSEST)
    return (side, side + COARSEST) if any_size else (img_size, img_size)


def trial_shapes(img_size: int, any_size: bool) -> list[tuple[int, int, int]]:
    """Batch size, height and width of the images that a file is checked with."""
    square = [(1, img_size, img_size), (4, img_size, img_size)]
    return [*square, (2, img_size + 9, img_size + 40)] if any_size else square


if __name__ == "__main__":
    run_script(main)
