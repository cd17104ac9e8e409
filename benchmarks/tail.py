"""The end of a residual block alone (BatchNorm, ECA, addition, ReLU), forward and backward.

    python benchmarks/tail.py [--batch N] [--json FILE] [--smoke]
    python benchmarks/tail.py --table [--json FILE] [--smoke]

On the four shapes that ResNet-50's blocks end in, and summed over its 16 blocks. With --table: what
the blocks call (one operation where that is faster, else the modules) over the modules alone, on
shapes from 1 to 256 images, 16 to 2048 channels and 1 to 112 pixels a side, with and without ECA.
"""

import argparse
import itertools

import side_by_side as side  # first: it puts the repository on the path

# isort: split
import textbook
import torch
from torch import Tensor, nn

from models.eca_module import ECALayer
from models.fused.block_tail import block_tail
from utils.system.faults import run_script

SHAPES = (
    (256, 4, 3, 3),
    (512, 8, 4, 5),
    (1024, 16, 6, 5),
    (2048, 32, 3, 7),
)  # C, 1/size, blocks, k
PLAIN = "plain, eager"
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


class Tail(nn.Module):
    """One of the ways to compute relu(attention(bn(z)) + residual)."""

    def __init__(self, way: str, channels: int, k: int):
        super().__init__()
        self.way = way
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.attention = None
        if way == "textbook ECA, eager":
            self.attention = textbook.TextbookECA(k)
        elif way == "textbook SE, eager":
            self.attention = textbook.TextbookSE(channels)
        elif "ECA" in way:
            self.attention = ECALayer(k)

    def forward(self, z: Tensor, residual: Tensor) -> Tensor:
        if self.way.startswith("ours"):
            return block_tail(z, self.bn, self.attention, residual, self.relu)
        y = self.bn(z)
        if self.attention is not None:
            y = self.attention(y)
        y += residual
        return self.relu(y)


# N, C, side: what MobileNetV2 and ResNets have at 224, 64 and 32 pixels, and both ends.
TABLE = (
    *((1, 64, 56), (1, 512, 7), (1, 2048, 7), (8, 256, 8), (16, 16, 112), (16, 96, 112)),
    *((16, 144, 56), (16, 960, 7), (16, 2048, 7), (32, 64, 56), (32, 384, 2), (32, 960, 1)),
    *((64, 16, 32), (64, 24, 16), (64, 32, 8), (64, 64, 4), (64, 64, 16), (64, 96, 32)),
    *((64, 192, 8), (64, 320, 2), (64, 384, 4), (64, 512, 2), (64, 1280, 2), (256, 32, 4)),
)
MODULES, OURS = "module by module", "as the blocks call it"


class Form(nn.Module):
    """An end of a block, by `block_tail` or by its modules: (N, C, H, W) twice → the same."""

    def __init__(self, attends: bool, channels: int, fused: bool):
        super().__init__()
        self.bn, self.fused = nn.BatchNorm2d(channels), fused
        self.attention = ECALayer(3) if attends else None
        self.activation = None if attends else nn.ReLU6(inplace=True)

    def forward(self, z: Tensor, residual: Tensor) -> Tensor:
        given = residual if self.attention is not None else None
        return block_tail(z, self.bn, self.attention, given, self.activation, self.fused)


FORMS = {"BatchNorm, ECA, addition": True, "BatchNorm, ReLU6": False}
WAYS = (PLAIN, "textbook ECA, eager", "textbook SE, eager", "ours, ECA", "ours, plain")


class Call:
    """Forward and backward of a Tail on tensors of its own."""

    def __init__(self, tail: Tail, shape, dtype, layout, device):
        self.tail = tail.to(device)
        tensors = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
        self.z, self.residual, self.grad = (t.to(memory_format=layout) for t in tensors)
        self.z.requires_grad_()
        self.residual.requires_grad_()
        self.inputs = (self.z, self.residual, *tail.parameters())

    def __call__(self) -> None:
        half = self.z.dtype != torch.float32
        with torch.autocast(self.z.device.type, self.z.dtype, half):
            out = self.tail(self.z, self.residual)
        torch.autograd.grad(out, self.inputs, self.grad, allow_unused=True)


def table(args: argparse.Namespace) -> None:
    """Prints a row for each shape, form, layout and dtype."""
    common, rows = side.settings(args), []
    for dtype, layout, form in itertools.product(side.dtypes_for(args.device), LAYOUTS, FORMS):
        for n, channels, size in TABLE[: 2 if args.smoke else None]:
            shape = (n, channels, size, size)
            elements = n * channels * size * size
            calls = {
                way: Call(
                    Form(FORMS[form], channels, way == OURS),
                    shape,
                    side.DTYPES[dtype],
                    LAYOUTS[layout],
                    args.device,
                )
                for way in (MODULES, OURS)
            }
            repeat = 1 if args.smoke else max(1, min(50, 10**6 // elements))
            times = side.interleave(calls, args.rounds, args.device, repeat)
            place = common | {"layout": layout, "shape": list(shape), "form": form}
            pairs, dtypes = [(OURS, MODULES)], dict.fromkeys((OURS, MODULES), dtype)
            rows += side.compare("tail --table", times, pairs, dtypes, place)
    shown = [
        {**row, "variant": f"{row['form']}, {row['dtype']} {row['layout']}, {row['shape']}"}
        for row in rows
    ]
    side.report(args, rows, "speed over that of the modules", shown)
    worst = min(row["ratio_median"] for row in rows)
    slower = sum(row["ratio_median"] < 0.98 for row in rows)
    print(f"{len(rows)} rows, the slowest {worst:.3f}, {slower} below 0.98")


def main() -> None:
    parser = side.make_parser(__doc__, batch=(16, 256), rounds=15)
    parser.add_argument("--table", action="store_true", help="many shapes, over the modules")
    args = side.settle(parser.parse_args())
    if args.table:
        return table(args)
    common, rows = side.settings(args), []
    for dtype in side.dtypes_for(args.device):
        for layout, memory_format in LAYOUTS.items():
            total = {way: [0.0] * args.rounds for way in WAYS}
            for channels, fraction, blocks, k in SHAPES:
                size = max(1, args.img_size // fraction)
                shape = (args.batch, channels, size, size)
                calls = {
                    way: Call(
                        Tail(way, channels, k),
                        shape,
                        side.DTYPES[dtype],
                        memory_format,
                        args.device,
                    )
                    for way in WAYS
                }
                repeat = 10 if args.device.type == "cuda" else 1
                times = side.interleave(calls, args.rounds, args.device, repeat)
                pairs = [(way, PLAIN) for way in WAYS[1:]]
                place = common | {"layout": layout, "shape": list(shape)}
                rows += side.compare("tail", times, pairs, dict.fromkeys(WAYS, dtype), place)
                for way in WAYS:
                    total[way] = [
                        t + blocks * s for t, s in zip(total[way], times[way], strict=True)
                    ]
            place = common | {"layout": layout, "shape": "ResNet-50's 16 blocks"}
            rows += side.compare("tail", total, pairs, dict.fromkeys(WAYS, dtype), place)
    shown = [
        {**row, "variant": f"{row['variant']}, {row['dtype']} {row['layout']}, {row['shape']}"}
        for row in rows
    ]
    side.report(args, rows, "the variant's speed over the other's", shown)


if __name__ == "__main__":
    run_script(main)
