"""The flags of predict.py."""

from utils.cli import Parser, count, fraction, number, positive_int
from utils.image_io import DECODERS
from utils.predictions import FORMATS


def build_parser(description: str) -> Parser:
    parser = Parser(description=description)
    parser.add_argument(
        "checkpoint", metavar="CKPT", help="of main.py, of detect_main.py, or released weights"
    )
    parser.add_argument(
        "images", metavar="IMAGES", nargs="+",
        help="files, folders, quoted patterns, or - for one path a line on standard input",
    )  # fmt: skip
    parser.add_argument(
        "-k", "--topk", type=positive_int, default=5, metavar="K", help="classes (default: 5)"
    )
    parser.add_argument(
        "--min-score", type=fraction, default=0.5, metavar="F",
        help="detectors: show objects from this score on (default: 0.5); files hold all",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=FORMATS, default="table", help="on standard output (default: table)"
    )
    parser.add_argument(
        "--maps", action="store_true", help="write each image with its class-activation map"
    )
    parser.add_argument(
        "--map-stage", type=positive_int, metavar="N",
        help="of this feature map, 1 the finest (default: the last with at least 4 x 4 positions)",
    )  # fmt: skip
    parser.add_argument("--grid", action="store_true", help="write one picture of all images")
    parser.add_argument(
        "--output", metavar="DIR",
        help="folder for predictions.csv, predictions.json and the pictures (default with --maps "
        "or --grid: runs/predict-N, a new one)",
    )  # fmt: skip
    parser.add_argument(
        "--names", metavar="FILE", help="class names, one a line (default: the checkpoint's)"
    )
    parser.add_argument(
        "--img-size", type=positive_int, metavar="S", help="pixels (default: the checkpoint's)"
    )
    parser.add_argument(
        "--crop-pct", type=number(float, 0, 1, above=True), metavar="F",
        help="share of the resized image that is kept (default: the checkpoint's)",
    )  # fmt: skip
    parser.add_argument("--decoder", choices=DECODERS, default="torchvision", help="as for main.py")
    parser.add_argument(
        "-b", "--batch-size", type=positive_int, default=32, metavar="N", help="default: 32"
    )
    parser.add_argument(
        "-j", "--workers", type=count, metavar="N",
        help="loader processes (default: 4, or what the machine has; none for a few images)",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    return parser
