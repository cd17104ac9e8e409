"""Makes the lines that a run prints before it starts: data, network, recipe."""

from collections.abc import Sequence

from torch import nn

from utils.data.class_weights import describe_weights
from utils.data.image_folder import ImageFolder, describe
from utils.recipes.classification import PAPER, Recipe

AUGMENT_NAMES = {"trivial": "TrivialAugment", "rand": "RandAugment"}


def network_line(network: nn.Module) -> str:
    """Returns one line: name, parameters, kernel sizes per stage, classes, what is frozen."""
    parameters = sum(p.numel() for p in network.parameters())
    ksize = f"ksize {','.join(map(str, network.ksize))}" if network.ksize else "no ECA"
    prefix = network.arch.partition("_")[0]
    named = prefix if prefix in ("eca", "se") else "none"
    other = "" if network.attention == named else f" with {network.attention}"
    line = (
        f"network: {network.arch}{other}, {parameters:,} parameters, {ksize}, "
        f"{network.num_classes} classes"
    )
    if network.frozen:
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        first, last = network.frozen[0], network.frozen[-1]
        names = first if first == last else f"{first} to {last}"
        line += f"; {names} frozen, {trained:,} parameters train"
    return line


def recipe_lines(recipe: Recipe, name: str) -> list[str]:
    """Returns the numbers of training, and in a second line what is on beyond the paper's.

    Args:
        name: of the recipe that flags may have changed since.
    """
    how = recipe.schedule
    if how == "step":
        how = f"times {recipe.lr_decay:g} every {recipe.lr_step} epochs"
    elif how == "exp":
        how = f"times {recipe.lr_decay:g} every epoch"
    warm = f", warm-up {recipe.warmup_epochs:g} epochs" if recipe.warmup_epochs else ""
    rule = f"lr {recipe.lr:g} {how}{warm}"
    if recipe.optimizer == "sgd":
        rule += f", momentum {recipe.momentum:g}"
    else:
        rule = f"{recipe.optimizer} {rule}"
    title = "recipe" if name == PAPER else f"recipe {name}"
    pixels = f"{recipe.img_size} pixels"
    if recipe.crop_size != recipe.img_size:
        pixels = f"{recipe.crop_size} pixels (evaluation {recipe.img_size})"
    lines = [
        f"{title}: {recipe.epochs} epochs, batch {recipe.batch_size}, "
        f"{rule}, weight decay {recipe.weight_decay:g}, {pixels}"
    ]
    parts = [
        f"{words} {value:g}"
        for words, value in (
            ("label smoothing", recipe.label_smoothing),
            ("target threshold", recipe.bce_threshold),
            ("stochastic depth", recipe.drop_path),
            ("mixup", recipe.mixup),
            ("cutmix", recipe.cutmix),
            ("random erasing", recipe.random_erasing),
            ("EMA", recipe.ema),
            ("gradient norm at most", recipe.clip_grad),
            ("layer decay", recipe.layer_decay if recipe.layer_decay != 1 else 0),
        )
        if value
    ]
    augment = recipe.auto_augment
    switches = (
        (recipe.loss == "bce", "binary cross-entropy"),
        (augment != "none", AUGMENT_NAMES.get(augment, f"timm's {augment}")),
        (not recipe.norm_decay, "no decay on norms, biases and ECA kernels"),
        (recipe.repeats > 1, f"each image {recipe.repeats} times a batch"),
        (recipe.accumulate > 1, f"each batch in {recipe.accumulate} parts"),
        (recipe.sync_bn, "SyncBatchNorm"),
        (recipe.sampler == "balanced", "each class alike often"),
    )
    parts += [words for on, words in switches if on]
    return [*lines, f"  {', '.join(parts)}"] if parts else lines


def data_lines(
    train: ImageFolder, val: ImageFolder, weights: Sequence[float] | None = None
) -> list[str]:
    """Returns counts of train and val, what a user should check, and the loss's class weights."""
    lines = [*describe(train, "train"), *describe(val, "val")]
    if weights is not None:
        lines.append(describe_weights(weights, val.classes))
    return lines


def evaluation_lines(figures: dict[str, float], seconds: float) -> list[str]:
    """Returns one line with the figures of an evaluation, and one for those by ReaL labels."""
    lines = [
        f"{figures['images']:,} images  top-1 {figures['top1']:.3f} %  "
        f"top-5 {figures['top5']:.3f} %  loss {figures['loss']:.4f}  "
        f"{figures['images'] / seconds:,.0f} images/s"
    ]
    if "real_top1" in figures:
        lines.append(
            f"ReaL labels: {figures['real_images']:,} images with labels  "
            f"top-1 {figures['real_top1']:.3f} %"
        )
    return lines
