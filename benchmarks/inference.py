"""Inference of ECA-ResNet-50 and ECA-MobileNetV2 beside the textbook form and plain networks.

    python benchmarks/inference.py [--network resnet50|mobilenetv2|both] [--no-compile]
                                   [--batch N] [--json FILE] [--smoke]

Eager networks run without gradients; `optimised` is models.optimise_for_inference, `compiled` the
same with compile=True, for plain and ECA alone, as compiling takes a minute each; on CUDA in
bfloat16 alone. bfloat16 only where the device has it. On a CPU the textbook form also runs in a
process of its own with glibc's allocator as it is.
"""

import side_by_side as side  # first: it puts the repository on the path

# isort: split
import copy
from functools import partial

import textbook
import torch
from torch import nn

import models
from models.inference import optimise_for_inference
from utils.system.faults import run_script

BASE = "textbook ECA, eager float32 NCHW"
AS_IT_IS = f"{BASE}, malloc as it is"
COMPILED = ("our plain", "our eca")


class Eager:
    """A network as it is, without gradients."""

    def __init__(self, network: nn.Module, images: torch.Tensor, dtype: torch.dtype, layout):
        self.network = network.to(images.device, memory_format=layout).eval()
        self.images, self.dtype = images.to(memory_format=layout), dtype

    def __call__(self) -> torch.Tensor:
        enabled = self.dtype != torch.float32
        with torch.inference_mode(), torch.autocast(self.images.device.type, self.dtype, enabled):
            return self.network(self.images)


def textbook_form(network: str, smoke: bool, size: tuple[int, ...]) -> Eager:
    resnet = partial(textbook.eca_resnet, 18 if smoke else 50)
    built = textbook.eca_mobilenetv2() if network == "mobilenetv2" else resnet()
    return Eager(built, torch.randn(size), torch.float32, torch.contiguous_format)


def families(smoke: bool) -> dict[str, dict[str, nn.Module | None]]:
    depth = 18 if smoke else 50

    def ours(arch: str) -> dict[str, nn.Module]:
        prefixes = {"our plain": "", "our eca": "eca_", "our se": "se_"}
        return {name: models.create_model(prefix + arch) for name, prefix in prefixes.items()}

    return {
        "resnet50": {
            "textbook ECA": textbook.eca_resnet(depth),
            "torchvision's plain": textbook.plain_resnet(depth),
            "textbook SE": textbook.se_resnet(depth),
            "timm's ECA": textbook.timm_eca_resnet(depth),
            **ours(f"resnet{depth}"),
        },
        "mobilenetv2": {
            "textbook ECA": textbook.eca_mobilenetv2(),
            "torchvision's plain": textbook.plain_mobilenetv2(),
            **ours("mobilenetv2"),
        },
    }


def measure(network: str, built: dict, args, compile: bool) -> list[dict[str, object]]:
    images = torch.randn(args.batch, 3, args.img_size, args.img_size, device=args.device)
    nchw, nhwc = torch.contiguous_format, torch.channels_last
    calls = {BASE: Eager(copy.deepcopy(built["textbook ECA"]), images, torch.float32, nchw)}
    dtypes, pairs, tax = {BASE: "float32"}, [], []
    for dtype_name in side.dtypes_for(args.device):
        dtype = side.DTYPES[dtype_name]
        added = {}
        for name, module in built.items():
            if module is None:
                continue
            added[f"{name}, eager {dtype_name}"] = Eager(copy.deepcopy(module), images, dtype, nhwc)
            if name.startswith("our "):
                compiled = compile and name in COMPILED and dtype_name in side.compiled_dtypes(args)
                for how in ("optimised", "compiled") if compiled else ("optimised",):
                    label = f"{name}, {how} {dtype_name}"
                    on_device = module.to(images.device)
                    optimised = optimise_for_inference(on_device, dtype, how == "compiled")
                    added[label] = partial(optimised, images.to(memory_format=nhwc))
                    if name != "our plain":
                        tax.append((label, f"our plain, {how} {dtype_name}"))
        tax += [
            (label, f"torchvision's plain, eager {dtype_name}")
            for label in added
            if ", eager" in label and "plain" not in label
        ]
        calls |= added
        pairs += [(label, BASE) for label in added]
        dtypes |= dict.fromkeys(added, dtype_name)
    if side.keeps_memory(args.device):
        calls[AS_IT_IS] = side.AsItIs(textbook_form, network, args.smoke, tuple(images.shape))
        dtypes[AS_IT_IS] = "float32"
        pairs += [(label, AS_IT_IS) for label in calls if label == BASE or label.startswith("our")]
    repeat = 2 if args.device.type == "cuda" else 1  # of a tenth of a second; 23 variants
    times = side.interleave(calls, args.rounds, args.device, repeat)
    common = side.settings(args) | {"network": network}
    rows = side.compare("inference", times, pairs + tax, dtypes, common)
    for row in rows:
        row["images_per_second"] = args.batch / row["seconds_median"]
    return rows


def main() -> None:
    parser = side.make_parser(__doc__, batch=(16, 256), rounds=15)
    parser.add_argument("--network", choices=("resnet50", "mobilenetv2", "both"), default="both")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    args = side.settle(parser.parse_args())
    rows = []
    for network, built in families(args.smoke).items():
        if args.network in (network, "both"):
            rows += measure(network, built, args, not (args.no_compile or args.smoke))
    unit = "the variant's speed over the other's; NHWC unless said"
    side.report(args, rows, unit, "{network}: {variant}")


if __name__ == "__main__":
    run_script(main)
