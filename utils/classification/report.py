"""What a run says before it starts: data, network, device, recipe."""

import torch
from torch import nn

from utils.data.image_folder import ImageFolder, describe
from utils.recipes.classification import PAPER, Recipe
from utils.system.distributed import Context

AUGMENT_NAMES = {"trivial": "TrivialAugment", "rand": "RandAugment"}


def network_line(network: nn.Module) -> str:
    """Name, parameters, kernel sizes per stage, classes."""
    parameters = sum(p.numel() for p in network.parameters())
    ksize = f"ksize {','.join(map(str, network.ksize))}" if network.ksize else "no ECA"
    prefix = network.arch.partition("_")[0]
    named = prefix if prefix in ("eca", "se") else "none"
    other = "" if network.attention == named else f" with {network.attention}"
    return (
        f"network: {network.arch}{other}, {parameters:,} parameters, {ksize}, "
        f"{network.num_classes} classes"
    )


def device_lines(
    context: Context, amp: str, channels_last: bool, compiled: bool, tails: str = ""
) -> list[str]:
    """Where the run takes place and how; `tails` says how the ends of blocks run."""
    name = str(context.device)
    if context.device.type == "cuda":
        name = torch.cuda.get_device_name(context.device)
    elif context.device.type == "cpu":
        name = f"CPU, {torch.get_num_threads()} threads"
    if context.world_size > 1:
        name += f", {context.world_size} processes (DistributedDataParallel)"
    elif len(context.data_parallel) > 1:
        name += f" x {len(context.data_parallel)} (DataParallel)"
    traits = ["float32" if amp == "off" else amp]
    traits += ["channels_last"] * channels_last + ["compiled"] * compiled
    traits += [tails] if tails else []
    lines = [f"device: {name}; {', '.join(traits)}"]
    if len(context.data_parallel) > 1:
        lines.append(f"  torchrun --nproc-per-node={len(context.data_parallel)} is faster")
    return lines


def recipe_lines(recipe: Recipe, name: str) -> list[str]:
    """The numbers of training, and in a second line what is on beyond the paper's.

    Args:
        name: of the recipe that flags may have changed since.
    """
    how = recipe.schedule
    if how == "step":
        how = f"times {recipe.lr_decay:g} every {recipe.lr_step} epochs"
    elif how == "exp":
        how = f"times {recipe.lr_decay:g} every epoch"
    warm = f", warm-up {recipe.warmup_epochs:g} epochs" if recipe.warmup_epochs else ""
    title = "recipe" if name == PAPER else f"recipe {name}"
    pixels = f"{recipe.img_size} pixels"
    if recipe.crop_size != recipe.img_size:
        pixels = f"{recipe.crop_size} pixels (evaluation {recipe.img_size})"
    lines = [
        f"{title}: {recipe.epochs} epochs, batch {recipe.batch_size}, "
        f"lr {recipe.lr:g} {how}{warm}, momentum {recipe.momentum:g}, "
        f"weight decay {recipe.weight_decay:g}, {pixels}"
    ]
    parts = [
        f"{words} {value:g}"
        for words, value in (
            ("label smoothing", recipe.label_smoothing),
            ("mixup", recipe.mixup),
            ("cutmix", recipe.cutmix),
            ("random erasing", recipe.random_erasing),
            ("EMA", recipe.ema),
            ("gradient norm at most", recipe.clip_grad),
        )
        if value
    ]
    switches = (
        (recipe.auto_augment != "none", AUGMENT_NAMES.get(recipe.auto_augment)),
        (not recipe.norm_decay, "no decay on norms, biases and ECA kernels"),
        (recipe.repeats > 1, f"each image {recipe.repeats} times a batch"),
        (recipe.accumulate > 1, f"each batch in {recipe.accumulate} parts"),
        (recipe.sync_bn, "SyncBatchNorm"),
    )
    parts += [words for on, words in switches if on]
    return [*lines, f"  {', '.join(parts)}"] if parts else lines


def data_lines(train: ImageFolder | None, val: ImageFolder) -> list[str]:
    """Counts of both sides, and what a user should look at."""
    lines = [] if train is None else describe(train, "train")
    lines += describe(val, "val")
    return lines


def epoch_line(row: dict[str, float], epochs: int, speed: float, improved: bool) -> str:
    """One finished epoch."""
    return (
        f"epoch {row['epoch'] + 1}/{epochs}  train loss {row['train_loss']:.4f} "
        f"top-1 {row['train_top1']:.2f} %  val loss {row['val_loss']:.4f} "
        f"top-1 {row['val_top1']:.2f} % top-5 {row['val_top5']:.2f} %  {speed:,.0f} images/s"
        + ("  (best)" if improved else "")
    )


def evaluation_line(figures: dict[str, float], seconds: float) -> str:
    """What an evaluation found."""
    return (
        f"{figures['images']:,} images  top-1 {figures['top1']:.3f} %  "
        f"top-5 {figures['top5']:.3f} %  loss {figures['loss']:.4f}  "
        f"{figures['images'] / seconds:,.0f} images/s"
    )
