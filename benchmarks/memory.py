"""What a training step keeps in memory for its backward pass, over the plain network's.

    python benchmarks/memory.py [--batch N] [--json FILE] [--smoke]

Counted, not timed: the tensors that autograd saves in one forward pass, each storage once, on
tensors without data. On a CUDA device also the peak that its allocator saw in one step.
"""

import side_by_side as side  # first: it puts the repository on the path

# isort: split
import textbook
import torch
from torch import nn

import models
from utils.system.faults import run_script

PLAIN = {"ResNet-50": "torchvision's ResNet-50", "MobileNetV2": "torchvision's MobileNetV2"}


def networks() -> dict[str, tuple[str, nn.Module]]:
    """Name in the table → family, network."""
    built = {
        PLAIN["ResNet-50"]: ("ResNet-50", textbook.plain_resnet()),
        "textbook ECA-ResNet-50": ("ResNet-50", textbook.eca_resnet()),
        "textbook SE-ResNet-50": ("ResNet-50", textbook.se_resnet()),
        "timm's ECA-ResNet-50": ("ResNet-50", textbook.timm_eca_resnet()),
        "our ECA-ResNet-50": ("ResNet-50", models.create_model("eca_resnet50")),
        PLAIN["MobileNetV2"]: ("MobileNetV2", textbook.plain_mobilenetv2()),
        "textbook ECA-MobileNetV2": ("MobileNetV2", textbook.eca_mobilenetv2()),
        "our ECA-MobileNetV2": ("MobileNetV2", models.create_model("eca_mobilenetv2")),
    }
    return {name: entry for name, entry in built.items() if entry[1] is not None}


def saved_bytes(network: nn.Module, images: torch.Tensor) -> int:
    """Bytes of the storages that autograd saves in a forward pass, weights left out."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = network(images)
    weights = {p.untyped_storage()._cdata for p in network.parameters()}
    del out
    return sum(s.nbytes() for key, s in storages.items() if key not in weights)


def peak_bytes(network: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> int:
    """What one step allocates on a CUDA device at its height, over what was there before it."""
    torch.cuda.reset_peak_memory_stats(images.device)
    before = torch.cuda.memory_allocated(images.device)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        network(images).float().sum().backward()
    network.zero_grad()
    return torch.cuda.max_memory_allocated(images.device) - before


def main() -> None:
    parser = side.make_parser(__doc__, batch=(16, 64), rounds=1)
    args = side.settle(parser.parse_args())
    common, rows = side.settings(args), []
    size = (args.batch, 3, args.img_size, args.img_size)
    for dtype_name, dtype in side.DTYPES.items():
        sizes: dict[tuple[str, str], int] = {}  # network, what → bytes
        with torch.device("meta"):
            images = torch.empty(size, dtype=dtype)
            plain = {}
            for name, (kind, network) in networks().items():
                sizes[name, "saved"] = saved_bytes(network.to(dtype).train(), images)
                plain[name] = PLAIN[kind]
        if args.device.type == "cuda":
            images = torch.randn(size, device=args.device).to(memory_format=torch.channels_last)
            for name, (_, network) in networks().items():
                network.to(args.device, memory_format=torch.channels_last).train()
                peak_bytes(network, images, dtype)  # cuDNN picks its algorithms
                sizes[name, "peak"] = peak_bytes(network, images, dtype)
                del network
        for (name, what), count in sizes.items():
            ratio = count / sizes[plain[name], what]
            rows.append(
                {
                    "benchmark": "memory",
                    "variant": name,
                    "baseline": plain[name],
                    "dtype": dtype_name,
                    "what": what,
                    **dict.fromkeys(("ratio_min", "ratio_median", "ratio_max"), ratio),
                    "mebibytes": count / 2**20,
                    **common,
                }
            )
    unit = "bytes of the variant over the other's, in one training step"
    side.report(args, rows, unit, "{variant}, {dtype}, {what}, {mebibytes:,.0f} MiB")


if __name__ == "__main__":
    run_script(main)
