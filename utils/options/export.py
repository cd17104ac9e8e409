"""Defines the flags of export.py."""

from argparse import Namespace

from utils.inspection import export_formats
from utils.options.parser import Parser, number, positive_int
from utils.system.errors import UserError

DEFAULT = ("onnx", "pt2", "safetensors")
TRACED = frozenset({"onnx", "pt2", "openvino"})  # made from the network's graph
IN_INT8 = ("onnx", "openvino")
OF_INT8 = {"calibration_images": 512, "max_drop": 1.0}


def build_parser(description: str) -> Parser:
    parser = Parser(description=description)
    parser.add_argument(
        "checkpoint", metavar="CKPT", help="of main.py, of detect_main.py, or released weights"
    )
    parser.add_argument(
        "--to",
        metavar="FORMAT",
        nargs="+",
        choices=tuple(export_formats.NEEDS),
        help="onnx, pt2, safetensors (default: these three; with --int8: onnx), openvino, "
        "hf (a folder for Hugging Face); a detector: onnx",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="folder of the files (default: the checkpoint's own)"
    )
    parser.add_argument(
        "--no-fold",
        action="store_true",
        help="onnx, openvino and pt2: keep BatchNorm instead of folding it into the convolutions",
    )
    parser.add_argument(
        "--img-size",
        type=positive_int,
        metavar="S",
        help="pixels, recorded in the files (default: the checkpoint's); up to 32, a .pt2 takes "
        "this size alone",
    )
    parser.add_argument(
        "--int8",
        metavar="DATA",
        help="onnx and openvino in 8 bits: calibrated on images of DATA/train, top-1 compared on "
        "DATA/val with float32's; as for main.py, demo:digits included",
    )
    parser.add_argument(
        "--calibration-images",
        type=positive_int,
        metavar="N",
        help=f"images of DATA/train (default: {OF_INT8['calibration_images']})",
    )
    parser.add_argument(
        "--max-drop",
        type=number(float, 0, 100),
        metavar="P",
        help="points of top-1 that int8 may lose; it is not written where it loses more "
        f"(default: {OF_INT8['max_drop']:g})",
    )
    return parser


def settle(args: Namespace) -> Namespace:
    """Fills in the defaults that depend on other flags.

    Raises:
        UserError: flags that do not go together.
    """
    int8 = args.int8 is not None
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


def refuse_for_detector(args: Namespace) -> None:
    """Refuses flags that do nothing with a detector, which is written as ONNX alone.

    Args:
        args: the flags as they were typed.

    Raises:
        UserError: one line with the flag.
    """
    others = [name for name in args.to or () if name != "onnx"]
    if others:
        raise UserError(
            f"--to {others[0]}: {args.checkpoint} holds a detector, which is written as onnx alone"
        )
    for flag, value in {
        "--int8": args.int8,
        "--img-size": args.img_size,
        "--no-fold": args.no_fold or None,
    }.items():
        if value is not None:
            raise UserError(
                f"{flag} is for classifiers, and {args.checkpoint} holds a detector: leave it out"
            )
