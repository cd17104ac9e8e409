"""A training step (forward, loss, backward, SGD) of an ECA-Net, beside what it competes with.

    python benchmarks/train_step.py [--network resnet50] [--batch N] [--compile] [--json FILE]
                                    [--smoke]

bfloat16 is by autocast, and only where the device has it. On a CPU the textbook form also runs in a
process of its own with glibc's allocator as it is.
"""

import itertools

import side_by_side as side  # first: it puts the repository on the path

# isort: split
import textbook
import torch
from torch import nn
from torch.nn import functional as F

import models
from utils.system.faults import run_script

BASE, PLAIN = "textbook ECA, float32 NCHW", "torchvision's plain"
AS_IT_IS = f"{BASE}, malloc as it is"
DEPTHS = {"resnet18": 18, "resnet50": 50}
COMPILED = (PLAIN, "textbook ECA", "ours, ECA")  # those that --compile adds


class Step:
    """One network with its optimizer; calling it takes a step."""

    def __init__(self, network, images, labels, dtype, channels_last, compiled=False):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.device, self.dtype = images.device, dtype
        self.network = network.to(self.device, memory_format=layout).train()
        self.run = torch.compile(self.network) if compiled else self.network
        self.images, self.labels = images.to(memory_format=layout), labels
        self.optimizer = torch.optim.SGD(
            network.parameters(), 1e-4, momentum=0.9, weight_decay=1e-4, fused=True
        )

    def __call__(self) -> None:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = F.cross_entropy(self.run(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def plain(network: str) -> nn.Module:
    """torchvision's."""
    if network == "mobilenetv2":
        return textbook.plain_mobilenetv2()
    return textbook.plain_resnet(DEPTHS[network])


def textbook_eca(network: str) -> nn.Module:
    """ECA as published, in torchvision's network."""
    return textbook.OF_OURS[f"eca_{network}"]()


def networks(network: str) -> dict[str, nn.Module]:
    """Each in channels_last, by the name it has in the table."""
    built = {
        PLAIN: plain(network),
        "textbook ECA": textbook_eca(network),
        "ours, ECA": models.create_model(f"eca_{network}"),
        "ours, ECA, module by module": models.create_model(f"eca_{network}"),
        "ours, plain": models.create_model(network),
    }
    if network in DEPTHS:
        built["textbook SE"] = textbook.se_resnet(DEPTHS[network])
        built["timm's ECA"] = textbook.timm_eca_resnet(DEPTHS[network])
    models.set_fused(built["ours, ECA, module by module"], False)
    return {name: network for name, network in built.items() if network is not None}


def textbook_step(network: str, size: tuple[int, ...]) -> Step:
    labels = torch.randint(1000, size[:1])
    return Step(textbook_eca(network), torch.randn(size), labels, torch.float32, False)


def main() -> None:
    parser = side.make_parser(__doc__, batch=(16, 256), rounds=15)
    parser.add_argument("--network", choices=(*DEPTHS, "mobilenetv2"), default="resnet50")
    parser.add_argument("--compile", action="store_true", help="also through torch.compile")
    args = side.settle(parser.parse_args())
    network = "resnet18" if args.smoke and args.network in DEPTHS else args.network
    size = (args.batch, 3, args.img_size, args.img_size)
    images = torch.randn(size, device=args.device)
    labels = torch.randint(1000, (args.batch,), device=args.device)

    steps = {BASE: Step(textbook_eca(network), images, labels, torch.float32, False)}
    dtypes, pairs = {BASE: "float32"}, []
    for dtype, compiled in itertools.product(side.dtypes_for(args.device), (False, True)):
        if compiled and not args.compile:
            continue
        suffix = f", {dtype}{', compiled' if compiled else ''}"
        for name, built in networks(network).items():
            if compiled and name not in COMPILED:
                continue
            label = name + suffix
            steps[label] = Step(built, images, labels, side.DTYPES[dtype], True, compiled)
            dtypes[label] = dtype
            pairs += [(label, f"{PLAIN}{suffix}"), (label, BASE)]
    if args.device.type == "cpu":  # where this format is the usual one, and no slower
        nchw = {
            f"{PLAIN}, float32 NCHW": plain(network),
            "ours, ECA, float32 NCHW": models.create_model(f"eca_{network}"),
        }
        for label, built in nchw.items():
            steps[label] = Step(built, images, labels, torch.float32, False)
            dtypes[label] = "float32"
            pairs += [(label, f"{PLAIN}, float32 NCHW"), (label, BASE)]
    if side.keeps_memory(args.device):
        steps[AS_IT_IS] = side.AsItIs(textbook_step, network, size)
        dtypes[AS_IT_IS] = "float32"
        pairs += [(label, AS_IT_IS) for label in steps if label == BASE or label.startswith("ours")]
    times = side.interleave(steps, args.rounds, args.device)
    pairs = [pair for pair in pairs if pair[0] != pair[1]]
    pairs.sort(key=lambda pair: (pair[1] == BASE, pair[1] == AS_IT_IS))
    common = side.settings(args) | {"network": network}
    rows = side.compare("train_step", times, pairs, dtypes, common)
    for row in rows:
        row["images_per_second"] = args.batch / row["seconds_median"]
    side.report(args, rows, "the variant's speed over the other's; channels_last unless said")


if __name__ == "__main__":
    run_script(main)
