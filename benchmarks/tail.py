"""The end of a residual block alone (BatchNorm, ECA, addition, ReLU), forward and backward.

    python benchmarks/tail.py [--batch N] [--json FILE] [--smoke]

On the four shapes that ResNet-50's blocks end in, and summed over its 16 blocks.
"""

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


WAYS = (PLAIN, "textbook ECA, eager", "textbook SE, eager", "ours, ECA", "ours, plain")


class Call:
    """Forward and backward of a Tail on tensors of its own."""

    def __init__(self, tail: Tail, shape, dtype, layout, device):
        self.tail = tail.to(device)
        tensors = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
        self.z, self.residual, self.grad = (t.to(memory_format=layout) for t in tensors)
        self.z.requires_grad_()
        self.residual.requires_grad_()
        self.wanted = (self.z, self.residual, *tail.parameters())

    def __call__(self) -> None:
        half = self.z.dtype != torch.float32
        with torch.autocast(self.z.device.type, self.z.dtype, half):
            out = self.tail(self.z, self.residual)
        torch.autograd.grad(out, self.wanted, self.grad)


def main() -> None:
    parser = side.make_parser(__doc__, batch=(16, 256), rounds=15)
    args = side.settle(parser.parse_args())
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
