"""The end of a residual block alone (BatchNorm, ECA, addition, ReLU), forward and backward.

    python benchmarks/tail.py [--batch N] [--json FILE] [--smoke]
    python benchmarks/tail.py --table [--json FILE] [--smoke]

On the four shapes that ResNet-50's blocks end in, and summed over its 16 blocks. With --table: what
the blocks call (one operation where that is faster, else the modules) over the modules alone, on
shapes from 1 to 256 images, 16 to 2048 channels and 1 to 112 pixels a side, with and without ECA.
"""

import argparse
import itertools
from collections.abc import Mapping

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
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
# N, C, side: what MobileNetV2 and ResNets have at 224, 64 and 32 pixels, and both ends.
TABLE = (
    *((1, 64, 56), (1, 512, 7), (1, 2048, 7), (8, 256, 8), (16, 16, 112), (16, 96, 112)),
    *((16, 144, 56), (16, 960, 7), (16, 2048, 7), (32, 64, 56), (32, 384, 2), (32, 960, 1)),
    *((64, 16, 32), (64, 24, 16), (64, 32, 8), (64, 64, 4), (64, 64, 16), (64, 96, 32)),
    *((64, 192, 8), (64, 320, 2), (64, 384, 4), (64, 512, 2), (64, 1280, 2), (256, 32, 4)),
)
MODULES, OURS = "module by module", "as the blocks call it"
FORMS = {"BatchNorm, ECA, addition": True, "BatchNorm, ReLU6": False}
PLAIN = "plain, eager"
WAYS = (PLAIN, "textbook ECA, eager", "textbook SE, eager", "ours, ECA", "ours, plain")


class Tail(nn.Module):
    """One of the ways to compute activation(attention(bn(z)) + residual): (N, C, H, W) twice.

    Args:
        fused: for `block_tail`; None for the modules as they are commonly called.
    """

    def __init__(
        self,
        channels: int,
        attention: nn.Module | None,
        activation: nn.Module | None,
        fused: bool | None = None,
        adds: bool = True,
    ):
        super().__init__()
        self.bn, self.attention, self.activation = nn.BatchNorm2d(channels), attention, activation
        self.fused, self.adds = fused, adds

    def forward(self, z: Tensor, residual: Tensor) -> Tensor:
        if self.fused is not None:
            added = residual if self.adds else None
            return block_tail(z, self.bn, self.attention, added, self.activation, self.fused)
        y = self.bn(z)
        if self.attention is not None:
            y = self.attention(y)
        y += residual
        return self.activation(y)


def tails(channels: int, k: int) -> dict[str, Tail]:
    """Returns the end of a ResNet's block in each of `WAYS`."""
    attentions = (None, textbook.TextbookECA(k), textbook.TextbookSE(channels), ECALayer(k), None)
    return {
        way: Tail(channels, attention, nn.ReLU(inplace=True), way.startswith("ours") or None)
        for way, attention in zip(WAYS, attentions, strict=True)
    }


def forms(attends: bool, channels: int) -> dict[str, Tail]:
    """Returns an end of a block by `block_tail` and by its modules."""
    return {
        way: Tail(channels, ECALayer(3), None, way == OURS)
        if attends
        else Tail(channels, None, nn.ReLU6(inplace=True), way == OURS, adds=False)
        for way in (MODULES, OURS)
    }


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


def times_of(
    ways: Mapping[str, Tail], shape: tuple[int, ...], dtype: str, layout: str, repeat: int, args
) -> side.Times:
    """Returns the seconds of forward and backward of each way."""
    dtype, layout = side.DTYPES[dtype], LAYOUTS[layout]
    calls = {name: Call(way, shape, dtype, layout, args.device) for name, way in ways.items()}
    return side.interleave(calls, args.rounds, args.device, repeat)


def table(args: argparse.Namespace) -> None:
    """Prints a row for each shape, form, layout and dtype."""
    common, rows = side.settings(args), []
    for dtype, layout, form in itertools.product(side.dtypes_for(args.device), LAYOUTS, FORMS):
        for n, channels, size in TABLE[: 2 if args.smoke else None]:
            shape = (n, channels, size, size)
            repeat = 1 if args.smoke else max(1, min(50, 10**6 // (n * channels * size * size)))
            times = times_of(forms(FORMS[form], channels), shape, dtype, layout, repeat, args)
            where = common | {"layout": layout, "shape": list(shape), "form": form}
            pairs, dtypes = [(OURS, MODULES)], dict.fromkeys((OURS, MODULES), dtype)
            rows += side.compare("tail --table", times, pairs, dtypes, where)
    shown = "{form}, {dtype} {layout}, {shape}"
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
    pairs = [(way, PLAIN) for way in WAYS[1:]]
    for dtype, layout in itertools.product(side.dtypes_for(args.device), LAYOUTS):
        total = {way: [0.0] * args.rounds for way in WAYS}
        dtypes = dict.fromkeys(WAYS, dtype)
        for channels, fraction, blocks, k in SHAPES:
            size = max(1, args.img_size // fraction)
            shape = (args.batch, channels, size, size)
            repeat = 10 if args.device.type == "cuda" else 1
            times = times_of(tails(channels, k), shape, dtype, layout, repeat, args)
            where = common | {"layout": layout, "shape": list(shape)}
            rows += side.compare("tail", times, pairs, dtypes, where)
            for way in WAYS:
                sums = zip(total[way], times[way], strict=True)
                total[way] = [t + blocks * s for t, s in sums]
        where = common | {"layout": layout, "shape": "ResNet-50's 16 blocks"}
        rows += side.compare("tail", total, pairs, dtypes, where)
    shown = "{variant}, {dtype} {layout}, {shape}"
    side.report(args, rows, "the variant's speed over the other's", shown)


if __name__ == "__main__":
    run_script(main)
