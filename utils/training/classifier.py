"""Builds the classifier of a run, with first or saved weights, and says how it runs."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import models
from models import start as start_weights
from models import weights
from models.attention import typed_attention
from models.fused import tail_speed
from models.registry import is_of_library
from models.weights import Network
from utils.config.classification import Config, DataSettings, NetworkSettings, Recipe
from utils.config.recipes import PAPER
from utils.data.loader import Loader
from utils.runs.checkpoint import Checkpoint
from utils.runs.named_weights import is_name
from utils.runs.resume import Start
from utils.system import backends, distributed
from utils.system.distributed import Context, device_lines
from utils.system.errors import UserError, as_user_error
from utils.system.text import counted
from utils.training.classification import ClassificationMeter
from utils.training.classification_data import TrainingData
from utils.training.optim import make_optimizer
from utils.training.state import NonFiniteGuard, TrainingState, WeightAverage

FUSED = "fused"  # how the description of fused tails begins
SLOWER = 1.02  # so many times as long as the modules is as fast, by how much timings differ
AUGMENT_NAMES = {"trivial": "TrivialAugment", "rand": "RandAugment"}


def network_line(network: Network) -> str:
    """Returns one line: name, parameters, kernel sizes per stage, classes, what is frozen."""
    parameters = sum(p.numel() for p in network.parameters())
    ksize = f"ksize {','.join(map(str, network.ksize))}" if network.ksize else "no ECA"
    if network.ksize and is_of_library(network.arch):
        sizes = ", ".join(map(str, sorted(set(network.ksize))))
        ksize = f"{len(network.ksize)} layers of ksize {sizes}"
    prefix = network.arch.partition("_")[0]
    named = prefix if prefix in ("eca", "se") else "none"
    other = "" if network.attention == named else f" with {network.attention}"
    line = (
        f"network: {network.arch}{other}, {parameters:,} parameters, {ksize}, "
        f"{counted(network.num_classes, 'class')}"
    )
    if network.frozen:
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        first, last = network.frozen[0], network.frozen[-1]
        names = first if first == last else f"{first} to {last}"
        line += f"; {names} frozen, {trained:,} parameters train"
    return f"{line}\n{network.attention_note}" if network.attention_note else line


def recipe_lines(recipe: Recipe, name: str | None, grad_checkpointing: bool) -> list[str]:
    """Returns the numbers of training, and in further lines what is on beyond the paper's.

    Args:
        name: of the recipe that flags may have changed since; None for the paper's.
        grad_checkpointing: backward computes each block again.
    """
    how = recipe.schedule
    if how == "step":
        how = f"times {recipe.lr_decay:g} every {counted(recipe.lr_step, 'epoch')}"
    elif how == "exp":
        how = f"times {recipe.lr_decay:g} every epoch"
    warm = ""
    if recipe.warmup_epochs:
        warm = f", warm-up {counted(recipe.warmup_epochs, 'epoch', 'g')}"
    rule = f"lr {recipe.lr:g} {how}{warm}"
    if recipe.optimizer == "sgd":
        rule += f", momentum {recipe.momentum:g}"
    else:
        rule = f"{recipe.optimizer} {rule}"
    title = "recipe" if name in (None, PAPER) else f"recipe {name}"
    pixels = f"{recipe.img_size} pixels"
    if recipe.crop_size != recipe.img_size:
        pixels = f"{recipe.crop_size} pixels (evaluation {recipe.img_size})"
    lines = [
        f"{title}: {counted(recipe.epochs, 'epoch')}, batch {recipe.batch_size}, "
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
            *(("upside down", recipe.vflip), ("colours changed by", recipe.colour)),
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
    if parts:
        lines.append(f"  {', '.join(parts)}")
    if grad_checkpointing:
        lines.append("  gradient checkpointing: backward computes each block again")
    return lines


def first_network(
    recipe: Recipe,
    flags: NetworkSettings,
    pretrained: Checkpoint | None,
    classes: Sequence[str] | None = None,
) -> tuple[Network, list[str]]:
    """Makes a new run's network.

    Args:
        pretrained: the file of first weights, or None.
        classes: names of the data's classes; None where they are not known yet.

    Returns:
        The network, and lines that say what became of the weights.

    Raises:
        UserError: flags, classes and weights do not fit together.
    """
    file = flags.pretrained or ""
    if pretrained is not None and is_name(file):
        file = str(pretrained.file)
    with as_user_error():
        network, notes = start_weights.first_network(
            recipe.arch,
            flags.num_classes,
            flags.ksize,
            typed_attention(flags.attention),
            None if pretrained is None else pretrained.contents,
            file,
            classes,
            flags.identity_start,
            recipe.drop_path,
        )
    return _with_trained_parts(network, recipe), notes


def _with_trained_parts(network: Network, recipe: Recipe) -> Network:
    """Returns the network with the recipe's stochastic depth and frozen layers."""
    with as_user_error():
        models.set_drop_path(network, recipe.drop_path)
    if recipe.freeze != "none":
        with as_user_error("--freeze: "):
            models.freeze(network, recipe.freeze)
    return network


def build_network(
    config: Config, start: Start, classes: Sequence[str], context: Context
) -> tuple[Network, Config, list[str]]:
    """Makes the network that is trained, with its first or saved weights, on its device.

    Returns:
        The network, the config with what `settle_tails` decides, and lines about the network and
        how it runs.
    """
    recipe, flags = config.recipe, config.network
    notes: list[str] = []
    if start.saved is None:
        network, notes = first_network(recipe, flags, start.pretrained, classes)
    else:
        network = start.saved.network(flags.attention)
        _with_trained_parts(network, recipe)
    free = start.saved is None and config.run.seed is None and "fused" not in config.typed
    flags, tails = settle_tails(network, recipe, flags, context, measure=free)
    lines = [network_line(network), *notes, *_device_lines(flags, context, tails)]
    if flags.grad_checkpointing:
        _checkpoint_gradients(network)
    to_device(network, flags, context)
    return network, Config(recipe, config.data, flags, config.run, config.typed), lines


def _checkpoint_gradients(network: Network) -> None:
    """Has backward compute each block again, in a library's network by its own means.

    Raises:
        UserError: a library's network has none, or BatchNorm would count each batch twice.
    """
    norms = any(isinstance(module, _BatchNorm) for module in network.modules())
    try:
        if norms and is_of_library(network.arch):  # ours leave the statistics alone the second time
            raise UserError(
                f"--grad-checkpointing: BatchNorm of {network.arch} would count each batch twice: "
                "leave it out"
            )
        network.set_grad_checkpointing()
    except (AttributeError, AssertionError):
        raise UserError(f"--grad-checkpointing: {network.arch} has none: leave it out") from None


def settle_tails(
    network: nn.Module, recipe: Recipe, flags: NetworkSettings, context: Context, measure: bool
) -> tuple[NetworkSettings, str]:
    """Decides how the network's block tails run, and describes it; on GPUs, for all ranks alike.

    Where a rank's Triton fails, or fused tails are slower, the flags that are returned say
    `fused=False`: a checkpoint keeps them, so that a resumed run rounds as before.

    Args:
        measure: by speed, too. Else, as under --seed, the size of a tensor alone decides.
    """
    device, layout, dtype = context.device, layout_of(flags), backends.DTYPES[flags.amp]
    described = partial(models.describe_tails, network, device, flags.fused, dtype)
    tails = described(flags.compile, recipe.sync_bn)
    if device.type != "cuda" or flags.compile or len(context.data_parallel) > 1:
        return flags, tails
    if not described(True, recipe.sync_bn).startswith(FUSED):
        return flags, tails  # not for want of Triton: on all ranks alike
    speed = math.inf
    if measure and tails.startswith(FUSED):
        part = recipe.batch_size // context.replicas // recipe.accumulate
        size = (part, 3, recipe.crop_size, recipe.crop_size)
        speed = tail_speed.speed(network, size, dtype, layout, device)
        if speed * SLOWER < 1:
            tails = f"block tails module by module (fused ones have {speed:.2f} of their speed)"
    everywhere = distributed.gather((speed, tails))
    for _, other in everywhere:
        if not other.startswith(FUSED):
            return replace(flags, fused=False), other
    speed = min(speed for speed, _ in everywhere)
    return flags, f"{tails}, {speed:.2f} times the modules' speed" if measure else tails


def how_it_runs(network: nn.Module, flags: NetworkSettings, context: Context) -> list[str]:
    """Says on which device a network runs, in which precision, and how the ends of its blocks do.

    Call it before `to_device`, which may compile the network.
    """
    tails = ""
    if not flags.fast:
        dtype = backends.DTYPES[flags.amp]
        tails = models.describe_tails(network, context.device, flags.fused, dtype, flags.compile)
    return _device_lines(flags, context, tails)


def _device_lines(flags: NetworkSettings, context: Context, tails: str) -> list[str]:
    if tails.startswith(FUSED) and len(context.data_parallel) > 1:
        tails = "block tails module by module (DataParallel)"
    return device_lines(context, flags.amp, flags.channels_last, flags.compile, tails)


def layout_of(flags: NetworkSettings) -> torch.memory_format:
    """Returns the memory format of weights and batches."""
    return torch.channels_last if flags.channels_last else torch.contiguous_format


def to_device(network: nn.Module, flags: NetworkSettings, context: Context) -> None:
    """Puts the network on its device in its layout, compiled where the flags say so."""
    network.to(context.device).to(memory_format=layout_of(flags))
    models.set_fused(network, flags.fused)
    if flags.compile and not flags.fast:
        network.compile()


def loader_of(data: DataSettings, flags: NetworkSettings, context: Context) -> Loader:
    """Returns how files become batches on the device."""
    assert data.workers is not None  # the command line has chosen a number
    layout = layout_of(flags)
    return Loader(context.device, data.workers, data.worker_timeout, data.decoder, layout)


def begin_state(
    network: Network, recipe: Recipe, flags: NetworkSettings, start: Start, context: Context
) -> TrainingState:
    """Makes all that changes in training, as it was saved where a run goes on.

    Args:
        network: on its device, with its first weights, without any parallel wrapping.
    """
    device = context.device
    average = WeightAverage(network, recipe.ema) if recipe.ema else None
    if flags.compile and average is not None:
        average.module.compile()  # a copy of a compiled network is not compiled
    scales = None
    if recipe.layer_decay != 1:
        with as_user_error():
            scales = models.layer_scales(network, recipe.layer_decay)
    optimizer = make_optimizer(
        recipe.optimizer,
        network,
        recipe.lr,
        recipe.momentum,
        recipe.weight_decay,
        recipe.norm_decay,
        scales,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=flags.amp == "fp16")
    meter = ClassificationMeter(device, network.num_classes)
    guard = NonFiniteGuard(device, "loss or gradient" if recipe.clip_grad else "loss")
    state = TrainingState(network, optimizer, scaler, meter, guard, context.rank, average=average)
    if start.run is not None:
        state.restore(start.run)
    if start.at_epoch is not None:
        state.begin(start.at_epoch)
    return state


def record_of(
    network: Network, config: Config, seed: int, data: TrainingData, start: Start
) -> dict[str, Any]:
    """Returns what every checkpoint of a run holds besides the state, but for the environment."""
    first = config.network.pretrained if start.run is None else start.run.pretrained
    return {
        **weights.describe_network(network),
        "parameters": sum(p.numel() for p in network.parameters()),
        "classes": list(data.classes),
        **vars(config.recipe.preprocessing),
        **config.record(seed, len(data.train), data.digest),
        "class_weights": None if data.class_weights is None else list(data.class_weights),
        "pretrained": first,
    }
