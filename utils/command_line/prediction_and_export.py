"""Defines the flags of predict.py and export.py, and settles what depends on the checkpoint."""

from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from typing import Any

from models.attention import is_file
from utils.command_line.parser import Parser
from utils.config.flags import count, crop, fraction, number, positive_int
from utils.data.decoding import DECODERS, decoder_name
from utils.inspection.export import NEEDS
from utils.inspection.exported_network import LARGEST_SIZE
from utils.inspection.predictions import FORMATS
from utils.system.backends import DTYPES
from utils.system.errors import UserError


def own_layer(text: str) -> str:
    """Checks --attention where a checkpoint is read, as an argparse type."""
    if not is_file(text):
        raise ArgumentTypeError(f"{text!r} is not FILE.py:CLASS; the checkpoint names any other")
    return text


def add_attention_flag(parser: Parser) -> None:
    """Adds --attention, which lets the layer in a user's file run."""
    parser.add_argument(
        "--attention",
        type=own_layer,
        metavar="FILE.py:CLASS",
        help="the layer that the network was trained with, where it is a user's own",
    )


# fmt: off
def prediction_parser(description: str) -> Parser:
    parser = Parser(description=description)
    add = parser.add_argument
    add("checkpoint", metavar="CKPT",
        help="of main.py, of detect_main.py, or released weights; or a file of export.py (.onnx, "
        ".xml)")
    add("images", metavar="IMAGES", nargs="+",
        help="files, folders, quoted patterns, or - for one path a line on standard input")
    add_attention_flag(parser)
    # What is said and drawn.
    add("-k", "--topk", type=positive_int, metavar="K", help="classes (default: 5)")
    add("--min-score", type=fraction, metavar="F",
        help="detectors: show objects from this score on (default: 0.5); files hold all")
    add("--format", choices=FORMATS, default="table", help="on standard output (default: table)")
    add("--maps", action="store_true", default=None,
        help="write each image with its class-activation map")
    add("--map-stage", type=positive_int, metavar="N",
        help="of this feature map, 1 the finest (default: the last with at least 4 x 4 positions)")
    add("--grid", action="store_true",
        help="write one picture of all images, of the first 400 at most (detectors: 100)")
    add("--output", metavar="DIR",
        help="folder for predictions.csv, predictions.json and the pictures (default with --maps "
        "or --grid: runs/predict-N, a new one)")
    # How images are read and the network is run.
    add("--names", metavar="FILE", help="class names, one a line (default: the checkpoint's)")
    add_image_flags(parser, 32, "none for a few images")
    add("--fast", action="store_true", default=None,
        help="BatchNorm folded, ECA's gate before the last convolution, --amp as weights; on a CPU "
        "a file of export.py --to openvino takes 0.8 of its time at batch 1, and starts in a fifth")
    add("--amp", choices=DTYPES,
        help="with --fast (default: bf16 where the device is faster in it, else off)")
    return parser


def add_image_flags(parser: Parser, batch_size: int, workers: str) -> None:
    """Adds the flags for how a user's images are read, and the device; their defaults, in words."""
    add = parser.add_argument
    add("--img-size", type=positive_int, metavar="S", help="pixels (default: the checkpoint's)")
    add("--crop-pct", type=crop, metavar="F",
        help="share of the resized image that is kept (default: the checkpoint's)")
    add("--decoder", type=decoder_name, metavar="NAME",
        help=f"{', '.join(DECODERS)}: as for main.py")
    add("-b", "--batch-size", type=positive_int, metavar="N", help=f"default: {batch_size}")
    add("-j", "--workers", type=count, metavar="N",
        help=f"loader processes (default: 4, or what the machine has; {workers})")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
# fmt: on


# The flags that one kind of network alone uses, with their defaults.
# fmt: off
OF_CLASSIFIERS: dict[str, Any] = {
    "attention": None, "topk": 5, "maps": False, "map_stage": None, "names": None, "img_size": None,
    "crop_pct": None, "fast": False, "amp": None, "decoder": DECODERS[0], "batch_size": 32,
    "workers": None,
}
# fmt: on
OF_DETECTORS: dict[str, Any] = {"min_score": 0.5}


def settle_prediction(typed: dict[str, Any], detector: bool) -> dict[str, Any]:
    """Returns the flags with defaults, once it is known what kind of network the checkpoint holds.

    Args:
        typed: {flag: value, None where it is left out}.

    Raises:
        UserError: a flag that this kind does not use.
    """
    kinds = ("classifier", OF_CLASSIFIERS), ("detector", OF_DETECTORS)
    (kind, used), (other, unused) = reversed(kinds) if detector else kinds
    for name in unused:
        if typed[name] is not None:
            raise UserError(
                f"--{name.replace('_', '-')} is for {other}s, and {typed['checkpoint']} holds a "
                f"{kind}: leave it out"
            )
    if typed["map_stage"] is not None and not typed["maps"]:
        raise UserError("--map-stage says which map --maps writes: add --maps, or leave it out")
    if typed["amp"] is not None and not typed["fast"]:
        raise UserError("--amp says in what --fast computes: add --fast, or leave it out")
    if typed["fast"] and typed["maps"]:
        raise UserError("--maps takes gradients, which --fast leaves no way to: give one of them")
    return typed | {name: used[name] for name in used if typed[name] is None}


DEFAULT = ("onnx", "pt2", "safetensors")
TRACED = frozenset({"onnx", "pt2", "openvino"})  # made from the network's graph
IN_INT8 = ("onnx", "openvino")
OF_ENDING = {".onnx": "onnx", ".pt2": "pt2", ".safetensors": "safetensors", ".xml": "openvino"}
OF_INT8 = {"calibration_images": 512, "max_drop": 1.0}


# fmt: off
def export_parser(description: str) -> Parser:
    parser = Parser(description=description)
    add = parser.add_argument
    add_attention_flag(parser)
    add("checkpoint", metavar="CKPT", help="of main.py, of detect_main.py, or released weights")
    add("--to", metavar="FORMAT", nargs="+", choices=tuple(NEEDS),
        help="onnx, pt2, safetensors (default: these three; with --int8: onnx), openvino, "
        "hf (a folder for Hugging Face); a detector: onnx")
    add("--output", metavar="DIR",
        help="folder of the files (default: the checkpoint's own), or the file of one format, such "
        "as deploy/bees.onnx")
    add("--no-fold", action="store_true",
        help="onnx, openvino and pt2: keep BatchNorm instead of folding it into the convolutions")
    add("--img-size", type=number(int, 1, LARGEST_SIZE), metavar="S",
        help="pixels, recorded in the files (default: the checkpoint's); up to 32, a .pt2 takes "
        "this size alone")
    add("--int8", metavar="DATA",
        help="onnx and openvino in 8 bits: calibrated on images of DATA/train, top-1 compared on "
        "DATA/val with float32's; as for main.py, demo:digits included")
    add("--calibration-images", type=positive_int, metavar="N",
        help=f"images of DATA/train (default: {OF_INT8['calibration_images']})")
    add("--max-drop", type=number(float, 0, 100), metavar="P",
        help="points of top-1 that int8 may lose; it is not written where it loses more "
        f"(default: {OF_INT8['max_drop']:g})")
    return parser
# fmt: on


def settle_export(args: Namespace) -> Namespace:
    """Fills in the defaults that depend on other flags.

    Raises:
        UserError: flags that do not go together.
    """
    int8 = args.int8 is not None
    if (named := format_of(args.output)) and {*(args.to or [named])} != {named}:
        raise UserError(
            f"--output {args.output} is a file, and --to makes {', '.join(args.to)}: give a "
            f"folder, or --to {named} alone"
        )
    args.to = args.to or ([named] if named else None)
    args.to = list(dict.fromkeys(args.to or (("onnx",) if int8 else DEFAULT)))
    if int8 and (others := [name for name in args.to if name not in IN_INT8]):
        raise UserError(
            f"--int8 makes onnx and openvino: leave {', '.join(others)} out, or export it without "
            "--int8"
        )
    if args.no_fold and int8:
        raise UserError("--int8 needs BatchNorm folded: leave --no-fold out")
    if args.no_fold and not TRACED & set(args.to):
        raise UserError(
            "--no-fold is for onnx, openvino and pt2, and the others hold BatchNorm as it is: "
            "leave it out"
        )
    for name, default in OF_INT8.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif not int8:
            raise UserError(f"--{name.replace('_', '-')} goes with --int8 DATA")
    return args


def format_of(output: str | None) -> str | None:
    """Returns the format that --output names by its ending; None for a folder's name."""
    path = Path(output or "")
    return None if path.is_dir() else OF_ENDING.get(path.suffix)


def refuse_for_detector(args: Namespace) -> None:
    """Refuses flags that do nothing with a detector, which is written as ONNX alone.

    Args:
        args: the flags as they were typed.

    Raises:
        UserError: one line with the flag.
    """
    named = format_of(args.output)
    others = [name for name in args.to or ([named] if named else ()) if name != "onnx"]
    if others:
        raise UserError(
            f"--to {others[0]}: {args.checkpoint} holds a detector, which is written as onnx alone"
        )
    for flag, value in {
        "--int8": args.int8,
        "--attention": args.attention,
        "--img-size": args.img_size,
        "--no-fold": args.no_fold or None,
    }.items():
        if value is not None:
            raise UserError(
                f"{flag} is for classifiers, and {args.checkpoint} holds a detector: leave it out"
            )
