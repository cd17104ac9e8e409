"""Defines the flags of predict.py."""

from typing import Any

from utils.data.decoding import DECODERS, decoder_name
from utils.inspection.class_predictions import FORMATS
from utils.options.parser import Parser, count, fraction, number, positive_int
from utils.system.backends import DTYPES
from utils.system.errors import UserError


def build_parser(description: str) -> Parser:
    parser = Parser(description=description)
    parser.add_argument(
        "checkpoint",
        metavar="CKPT",
        help="of main.py, of detect_main.py, or released weights; or a file of export.py (.onnx, "
        ".pt2, .xml)",
    )
    parser.add_argument(
        "images",
        metavar="IMAGES",
        nargs="+",
        help="files, folders, quoted patterns, or - for one path a line on standard input",
    )
    _add_output_flags(parser)
    _add_input_flags(parser)
    return parser


def _add_output_flags(parser: Parser) -> None:
    """Adds the flags for what is said and drawn."""
    parser.add_argument("-k", "--topk", type=positive_int, metavar="K", help="classes (default: 5)")
    parser.add_argument(
        "--min-score",
        type=fraction,
        metavar="F",
        help="detectors: show objects from this score on (default: 0.5); files hold all",
    )
    parser.add_argument(
        "--format", choices=FORMATS, default="table", help="on standard output (default: table)"
    )
    parser.add_argument(
        "--maps",
        action="store_true",
        default=None,
        help="write each image with its class-activation map",
    )
    parser.add_argument(
        "--map-stage",
        type=positive_int,
        metavar="N",
        help="of this feature map, 1 the finest (default: the last with at least 4 x 4 positions)",
    )
    parser.add_argument(
        "--grid",
        action="store_true",
        help="write one picture of all images, of the first 400 at most (detectors: 100)",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder for predictions.csv, predictions.json and the pictures (default with --maps "
        "or --grid: runs/predict-N, a new one)",
    )


def _add_input_flags(parser: Parser) -> None:
    """Adds the flags for how images are read and the network is run."""
    parser.add_argument(
        "--names", metavar="FILE", help="class names, one a line (default: the checkpoint's)"
    )
    parser.add_argument(
        "--img-size", type=positive_int, metavar="S", help="pixels (default: the checkpoint's)"
    )
    parser.add_argument(
        "--crop-pct",
        type=number(float, 0, 1, above=True),
        metavar="F",
        help="share of the resized image that is kept (default: the checkpoint's)",
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        default=None,
        help="BatchNorm folded, ECA's gate before the last convolution, --amp as weights",
    )
    parser.add_argument(
        "--amp",
        choices=DTYPES,
        help="with --fast (default: bf16 where the device is faster in it, else off)",
    )
    parser.add_argument(
        "--decoder",
        type=decoder_name,
        metavar="NAME",
        help=f"{', '.join(DECODERS)}: as for main.py",
    )
    parser.add_argument("-b", "--batch-size", type=positive_int, metavar="N", help="default: 32")
    parser.add_argument(
        "-j",
        "--workers",
        type=count,
        metavar="N",
        help="loader processes (default: 4, or what the machine has; none for a few images)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")


def refuse_for_exported(given: dict[str, Any]) -> None:
    """Refuses flags that a file of export.py has no use for.

    Args:
        given: {flag: value, None where it was left out}.

    Raises:
        UserError: one of them was given.
    """
    for name, reason in {
        "fast": "an exported network is rebuilt already",
        "amp": "an exported network has a precision of its own",
        "maps": "maps are made from gradients, which an exported network has none of",
    }.items():
        if given[name]:
            raise UserError(f"--{name}: {reason}; leave it out, or give the checkpoint")
    if given["device"] not in ("auto", "cpu"):
        raise UserError(
            f"--device {given['device']}: {given['checkpoint']} is run on the CPU; leave it out, "
            "or give the checkpoint"
        )


# The flags that one kind of network alone uses, with their defaults.
OF_CLASSIFIERS = {
    "topk": 5,
    "maps": False,
    "map_stage": None,
    "names": None,
    "img_size": None,
    "crop_pct": None,
    "fast": False,
    "amp": None,
    "decoder": "torchvision",
    "batch_size": 32,
    "workers": None,
}
OF_DETECTORS = {"min_score": 0.5}


def settle(given: dict[str, Any], detector: bool) -> dict[str, Any]:
    """Returns the flags with defaults, once it is known what kind of network the checkpoint holds.

    Args:
        given: {flag: value, None where it was left out}.

    Raises:
        UserError: a flag was given that this kind does not use.
    """
    used, unused = OF_CLASSIFIERS, OF_DETECTORS
    kind, at_work = "classifier", "detectors"
    if detector:
        used, unused, kind, at_work = unused, used, "detector", "classifiers"
    for name in unused:
        if given[name] is not None:
            raise UserError(
                f"--{name.replace('_', '-')} is for {at_work}, and {given['checkpoint']} holds a "
                f"{kind}: leave it out"
            )
    if given["map_stage"] is not None and not given["maps"]:
        raise UserError("--map-stage says which map --maps writes: add --maps, or leave it out")
    if given["amp"] is not None and not given["fast"]:
        raise UserError("--amp says in what --fast computes: add --fast, or leave it out")
    if given["fast"] and given["maps"]:
        raise UserError("--maps takes gradients, which --fast leaves no way to: give one of them")
    return given | {name: used[name] for name in used if given[name] is None}
