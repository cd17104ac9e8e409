"""Shows what a trained network's channel attention does, class by class and block by block.

examples:
  visualize_attention.py CKPT DATA                      over DATA/val, or a folder of classes
  visualize_attention.py CKPT DATA --curves 0 3 8       these classes in the picture
  visualize_attention.py CKPT demo:digits --all-blocks  a panel for each block, not each stage
"""

import utils.system.script_start  # noqa: F401  # isort: skip - what follows takes seconds
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from models.inspection import attention_layers, recorded_gates
from utils.command_line.parser import Parser
from utils.command_line.prediction_and_export import add_attention_flag, add_image_flags
from utils.config.flags import positive_int
from utils.data import demo_sets, image_folder, shards
from utils.data.decoding import DECODERS
from utils.data.image_folder import ImageFolder
from utils.inspection import channel_weights
from utils.inspection.channel_weights import GateStatistics, LayerWeights, table, write_npz
from utils.inspection.predictions import read_batches
from utils.runs import folder as run_folder
from utils.runs.checkpoint import Checkpoint
from utils.system import distributed
from utils.system.errors import EXIT_FAILED, UserError
from utils.system.faults import run_script
from utils.system.files import check_free, write_atomically
from utils.system.processes import default_workers
from utils.system.text import counted, did_you_mean, printable
from utils.training.classifier import network_line

CURVES = 4  # as in the paper's figure
BATCH = 64  # images


# fmt: off
def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="of main.py, or released weights")
    add("data", metavar="DATA", help="a folder with val/, a folder of class folders, demo:digits")
    add_attention_flag(parser)
    add("--curves", metavar="CLASS", nargs="+",
        help=f"classes to draw (default: {CURVES}, evenly over the classes)")
    add("--all-blocks", action="store_true",
        help="draw the weights of every block (default: the last one of each stage)")
    add("--per-class", type=positive_int, metavar="N", help="images of each class (default: all)")
    add("--output", metavar="DIR", help="default: runs/attention-N, a new folder")
    add_image_flags(parser, BATCH, "demos: 0")
    return parser
# fmt: on


def main() -> int:
    args = build_parser().parse_args()
    check_free(args.output)
    saved = Checkpoint.read(Path(args.checkpoint))
    saved.refuse_detector()
    network = saved.network(args.attention)
    if not attention_layers(network):
        raise UserError(
            f"{args.checkpoint}: {network.arch} has no attention layers to look at; give a "
            "checkpoint of an ECA or SE network"
        )
    images = only(open_images(args.data), args.per_class)
    shown = chosen_classes(images.classes, args.curves)
    look = saved.preprocessing(args.img_size, args.crop_pct)
    device = distributed.setup(args.device).device
    network.to(device).eval().requires_grad_(False)
    print(network_line(network), *image_folder.describe(images, "images"), sep="\n", flush=True)

    workers = args.workers
    if workers is None:
        workers = 0 if demo_sets.is_demo(args.data) else default_workers()
    paths = [images.path(i) for i in range(len(images))]
    decoder = args.decoder or DECODERS[0]
    batches = read_batches(paths, look, args.batch_size or BATCH, device, workers, decoder)
    layers, broken = gather(network, batches, images)

    folder = run_folder.create("attention", args.output)
    names = [printable(name) for name in images.classes]
    drawn_images = counted(len(images) - len(broken), "image", ",")
    title = f"{network.arch}, {drawn_images} of {counted(len(names), 'class')}"
    last_of_each_stage = list({layer.stage: layer for layer in layers}.values())
    drawn = layers if args.all_blocks else last_of_each_stage
    pictures = {
        "channel_weights.png": channel_weights.draw_weights(drawn, names, shown, title),
        "spread.png": channel_weights.draw_spread(layers, title),
    }
    if layers[0].kernel is not None:
        kernels = channel_weights.draw_kernels(layers, f"{network.arch}, ECA kernels")
        pictures["kernels.png"] = kernels
    for name, picture in pictures.items():
        write_atomically(folder / name, picture)
    write_npz(folder / "attention.npz", layers, names)
    print(table(layers))
    print(f"written to {folder}: {', '.join(pictures)}, attention.npz")
    return EXIT_FAILED if broken else 0


def open_images(data: str) -> ImageFolder:
    """Opens DATA/val, or DATA where it has no val/; its classes need not be the checkpoint's."""
    data = str(demo_sets.prepare(data))
    inner = os.path.join(data, "val")
    return shards.open_images(inner if os.path.isdir(inner) else data)


def only(images: ImageFolder, per_class: int | None) -> ImageFolder:
    """Returns the first `per_class` images of each class; None for all."""
    if per_class is None:
        return images
    members = [np.flatnonzero(images.labels == i) for i in range(len(images.classes))]
    return images.take(np.concatenate([of_class[:per_class] for of_class in members]))


def chosen_classes(classes: Sequence[str], names: Sequence[str] | None) -> list[int]:
    """Returns the indices of the classes whose curves are drawn."""
    if names is None:
        evenly = np.linspace(0, len(classes) - 1, min(CURVES, len(classes)))
        return evenly.round().astype(int).tolist()
    for name in names:
        if name not in classes:
            hint = did_you_mean(name, classes) or f"; there is {', '.join(classes[:5])}, …"
            raise UserError(f"--curves: no class {name!r}{hint}")
    return [classes.index(name) for name in names]


def gather(
    network: nn.Module, batches, images: ImageFolder
) -> tuple[list[LayerWeights], list[int]]:
    """Returns the channel weights of every attention layer by class, and the images left out."""
    statistics = GateStatistics(len(images.classes))
    labels = torch.from_numpy(images.labels)
    broken: list[int] = []
    with torch.inference_mode(), recorded_gates(network) as gates:
        for batch in batches:
            for i, reason in batch.broken:
                print(f"! {printable(images.path(i))}: {reason}; passed over", flush=True)
                broken.append(i)
            if batch.indices:
                network(batch.images)
                statistics.update(gates, labels[batch.indices])
    if empty := [images.classes[i] for i in (statistics.counts == 0).nonzero().flatten()]:
        raise UserError(
            f"no readable image of class {empty[0]!r} ({len(empty)} such classes); remove or fill "
            "its folder"
        )
    return [statistics.layer(layer) for layer in attention_layers(network)], broken


if __name__ == "__main__":
    run_script(main, "a smaller -b or --img-size")
