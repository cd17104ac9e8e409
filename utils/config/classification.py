"""The configuration of main.py and light_main.py: a recipe, and how it is run on this machine.

`Recipe` holds what decides a run's results; a checkpoint keeps it, and `--recipe` names one. The
other frozen values hold where data, weights and files are, and what this machine does.
"""

import argparse
import math
import re
from dataclasses import dataclass

import models
from models.registry import check_name, is_of_library
from utils.config.flags import (
    ANY_TIME,
    NEVER,
    SWITCH,
    YES_NO,
    BaseConfig,
    BaseRecipe,
    ComputeSettings,
    LoaderSettings,
    RunSettings,
    below_one,
    count,
    crop,
    data_flag,
    fraction,
    modern_flag,
    network_flag,
    non_negative_float,
    one_of,
    own_data_flag,
    positive_float,
    positive_int,
    run_flag,
    share,
    training_flag,
)
from utils.config.recipes import recipe_name
from utils.data.decoding import DECODERS, decoder_name
from utils.data.sampler import SAMPLERS
from utils.data.transforms import (
    AUTO_AUGMENTS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    INTERPOLATIONS,
    TIMM_EXAMPLE,
    Preprocessing,
    is_timm_augment,
)

LOSSES = ("ce", "bce")
OPTIMIZERS = ("sgd", "adamw", "lamb")
SCHEDULES = ("step", "exp", "cosine")


def auto_augment(text: str) -> str:
    """Checks --auto-augment, as an argparse type."""
    if text not in AUTO_AUGMENTS and not is_timm_augment(text):
        known = ", ".join(AUTO_AUGMENTS)
        raise argparse.ArgumentTypeError(
            f"no augmentation {text!r}; known: {known}, or timm's, such as {TIMM_EXAMPLE} (m at "
            "most 10)"
        )
    return text


def frozen_part(text: str) -> str:
    """Checks --freeze, as an argparse type."""
    if not re.fullmatch(r"none|backbone|stages:\d{1,3}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not none, backbone or stages:N")
    return text


def network_name(text: str) -> str:
    """Checks --arch, as an argparse type."""
    if not is_of_library(text):
        return one_of(list(models.MODELS), "network")(text)
    try:
        check_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


@dataclass(frozen=True, kw_only=True)
class Recipe(BaseRecipe):
    """Holds the numbers that decide a classification run's results; each field is a flag."""

    # fmt: off
    arch: str = network_flag(
        "-a", "--arch", kind=network_name, metavar="NAME", first=True,
        help="network: ours, timm:NAME or torchvision:NAME"
    )
    batch_size: int = training_flag(
        "-b", "--batch-size", kind=positive_int, first=True, help="global batch, over all devices"
    )
    lr: float = training_flag(
        "--lr", "--learning-rate", kind=positive_float, first=True, trains=True, resume=ANY_TIME,
        help="learning rate"
    )
    schedule: str = training_flag(
        "--schedule", choices=SCHEDULES, trains=True, resume=ANY_TIME,
        help="how the learning rate falls: in steps, exponentially, or along a cosine"
    )
    lr_step: int = training_flag(
        "--lr-step", default=30, kind=positive_int, trains=True, resume=ANY_TIME,
        needs={"schedule": ("step",)}, help="schedule step: epochs between two decays"
    )
    lr_decay: float = training_flag(
        "--lr-decay", default=0.1, kind=share, trains=True, resume=ANY_TIME,
        needs={"schedule": ("step", "exp")}, help="schedules step and exp: factor of a decay"
    )
    warmup_epochs: float = training_flag(
        "--warmup-epochs", default=0.0, kind=non_negative_float, trains=True, resume=ANY_TIME,
        help="linear rise of the learning rate"
    )
    img_size: int = data_flag(
        "--img-size", default=224, kind=positive_int, metavar="S", help="pixels"
    )
    crop_pct: float = data_flag(
        "--crop-pct", default=0.875, kind=crop, resume=ANY_TIME,
        help="evaluation: share of the resized image that is kept"
    )
    interpolation: str = data_flag(
        "--interpolation", default="bilinear", choices=INTERPOLATIONS,
        help="how images are resized"
    )
    mean: tuple[float, ...] = data_flag(
        "--mean", default=IMAGENET_MEAN, kind=fraction, nargs="+",
        help="subtracted from pixels from 0 to 1: one number, or three for red, green and blue"
    )
    std: tuple[float, ...] = data_flag(
        "--std", default=IMAGENET_STD, kind=share, nargs="+",
        help="that pixels are divided by then: one number or three"
    )
    min_scale: float = data_flag(
        "--min-scale", default=0.08, kind=share, trains=True,
        help="training: smallest crop, as a share of the area"
    )
    val_split: float = own_data_flag(
        "--val-split", default=0.0, kind=below_one, metavar="SHARE", trains=True, resume=NEVER,
        help="of a DATA without train/ and val/: this share of each class is for validation, drawn "
        "by the files' names, so the same for every seed and for -e (0: DATA has both folders)"
    )
    vflip: float = own_data_flag(
        "--vflip", default=0.0, kind=fraction, metavar="P", trains=True,
        help="training: probability of an image upside down, where up means nothing"
    )
    colour: float = own_data_flag(
        "--colour", default=0.0, kind=non_negative_float, metavar="C", trains=True,
        help="training: multiply brightness, contrast and saturation, each by a number from 1 - C "
        "to 1 + C"
    )
    # Parts of the modern recipes, off unless asked for: a run saved before they existed is itself.
    label_smoothing: float = modern_flag(
        "--label-smoothing", default=0.0, kind=below_one, trains=True,
        help="share of each target that is spread over all classes"
    )
    mixup: float = modern_flag(
        "--mixup", default=0.0, kind=non_negative_float, metavar="ALPHA", trains=True,
        help="blend pairs of images; their shares are drawn from Beta(ALPHA, ALPHA)"
    )
    cutmix: float = modern_flag(
        "--cutmix", default=0.0, kind=non_negative_float, metavar="ALPHA", trains=True,
        help="paste a rectangle of one image into another; with --mixup, one of them per batch"
    )
    auto_augment: str = modern_flag(
        "--auto-augment", default="none", kind=auto_augment, metavar="NAME", trains=True,
        help=f"trivial or rand, torchvision's TrivialAugment or RandAugment; or timm's RandAugment "
        f"of magnitude m and its deviation, such as {TIMM_EXAMPLE}"
    )
    random_erasing: float = modern_flag(
        "--random-erasing", default=0.0, kind=fraction, metavar="P", trains=True,
        help="probability of a rectangle in the mean colour"
    )
    ema: float = modern_flag(
        "--ema", default=0.0, kind=below_one, metavar="DECAY", trains=True, resume=ANY_TIME,
        help="evaluate and save averaged weights; decay per step, lower in the first steps"
    )
    norm_decay: bool = modern_flag(
        "--norm-decay", default=True, kind=YES_NO, trains=True, resume=NEVER,
        help="weight decay on norms, biases and ECA kernels, too"
    )
    repeats: int = modern_flag(
        "--repeats", default=1, kind=positive_int, trains=True,
        help="repeated augmentation: each image of a batch N times, an epoch as long as ever"
    )
    train_size: int = modern_flag(
        "--train-size", default=0, kind=count, metavar="S", trains=True,
        help="pixels of training images (0: --img-size, which is then evaluation's alone)"
    )
    accumulate: int = modern_flag(
        "--accumulate", default=1, kind=positive_int, trains=True, resume=ANY_TIME,
        help="take each batch in N parts, for less memory"
    )
    clip_grad: float = modern_flag(
        "--clip-grad", default=0.0, kind=non_negative_float, metavar="NORM", trains=True,
        resume=ANY_TIME, help="the gradient's largest norm; 0: any"
    )
    sync_bn: bool = modern_flag(
        "--sync-bn", default=False, kind=YES_NO, trains=True, resume=ANY_TIME,
        help="BatchNorm over all processes' images (torchrun on GPUs)"
    )
    sampler: str = own_data_flag(
        "--sampler", default="shuffle", choices=SAMPLERS, trains=True,
        help="images of an epoch: shuffle, each once; or balanced, each class alike"
    )
    loss: str = modern_flag(
        "--loss", default="ce", choices=LOSSES, trains=True,
        help="ce: cross-entropy; bce: binary cross-entropy, each class by itself"
    )
    bce_threshold: float = modern_flag(
        "--bce-threshold", default=0.0, kind=below_one, trains=True, needs={"loss": ("bce",)},
        help="loss bce: shares of mixed or smoothed targets above F count as 1, others as 0 (0: "
        "shares as they are)"
    )
    drop_path: float = modern_flag(
        "--drop-path", default=0.0, kind=below_one, metavar="P", trains=True,
        help="stochastic depth: images skip blocks, the first never, the last with probability P"
    )
    optimizer: str = training_flag(
        "--optimizer", default="sgd", choices=OPTIMIZERS, trains=True, resume=NEVER,
        help="lamb is timm's, if installed; adamw and lamb need another --lr"
    )
    layer_decay: float = own_data_flag(
        "--layer-decay", default=1.0, kind=share, trains=True, resume=NEVER,
        help="multiply the learning rate by F from each block to the one before it"
    )
    freeze: str = own_data_flag(
        "--freeze", default="none", kind=frozen_part, metavar="PART", trains=True, resume=NEVER,
        help="do not train the first layers, and leave their BatchNorm as it is: backbone, all but "
        "the last layer; or stages:N, the stem and the first N stages"
    )
    early_stop: int = own_data_flag(
        "--early-stop", default=0, kind=count, trains=True, resume=ANY_TIME,
        help="end after N epochs without a better one, see --best-by; 0: never"
    )
    best_by: str = own_data_flag(
        "--best-by", default="top1", choices=("top1", "loss", "recall"), trains=True,
        resume=NEVER, help="what makes an epoch the best: top-1, the validation loss, or the mean "
        "of the classes' recalls, which counts each class alike"
    )
    # fmt: on

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """Returns the learning rate of one optimizer step; see `BaseRecipe.lr_at`.

        After a warm-up, a linear rise to `lr` step by step, "step" multiplies by `lr_decay` every
        `lr_step` epochs (the paper's ResNets: 0.1 every 30); "exp" by `lr_decay` every epoch (its
        MobileNetV2: 0.98); "cosine" goes to zero along half a period, moving at every step.
        """
        epoch = step // steps_per_epoch
        warmup_steps = round(self.warmup_epochs * steps_per_epoch)
        if step < warmup_steps:
            return self.lr * (step + 1) / warmup_steps
        if self.schedule == "step":
            return self.lr * self.lr_decay ** (epoch // self.lr_step)
        if self.schedule == "exp":
            return self.lr * self.lr_decay**epoch
        assert self.schedule == "cosine", self.schedule
        total = max(1, self.epochs * steps_per_epoch - warmup_steps)
        done = min(1.0, (step - warmup_steps) / total)
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))

    @property
    def preprocessing(self) -> Preprocessing:
        """Returns how evaluated images are prepared; a single mean or std is that of each colour.

        Raises:
            ValueError: neither one number nor three.
        """
        for name, values in (("--mean", self.mean), ("--std", self.std)):
            if len(values) not in (1, 3):
                raise ValueError(f"{name} takes one number, or three for red, green and blue")
        mean, std = (v if len(v) == 3 else v * 3 for v in (self.mean, self.std))
        return Preprocessing(self.img_size, self.crop_pct, self.interpolation, mean, std)

    @property
    def crop_size(self) -> int:
        """Returns the side of a training image in pixels; `img_size` is that of evaluation."""
        return self.train_size or self.img_size


@dataclass(frozen=True)
class DataSettings(LoaderSettings):
    """Holds where a classifier's images are, and how this machine reads them."""

    # fmt: off
    data_files: str | None = data_flag(
        "--data-files", default=None, metavar="DIR", saved=False,
        help="the original files of demo:fashion, demo:cifar10 or demo:cifar100 (default: where "
        "the system's package has them)"
    )
    download: bool = data_flag(
        "--download", default=False, kind=SWITCH, saved=False,
        help="let torchvision fetch the original files"
    )
    decoder: str = data_flag(
        "--decoder", default=DECODERS[0], kind=decoder_name, metavar="NAME",
        help="simplejpeg reads JPEGs, and Pillow the rest, into tensors; pil reads and resizes "
        "exactly as published evaluations did, more slowly"
    )
    skip_bad_images: bool = data_flag(
        "--skip-bad-images", default=False, kind=YES_NO, trains=True,
        help="training: replace images that cannot be read, and list them at the end"
    )
    class_weights: str | None = own_data_flag(
        "--class-weights", default=None, metavar="FILE", trains=True,
        help="weigh each image's loss by its class: balanced (images / (classes * images of the "
        "class)), or a CSV or JSON file of class names and weights (docs/FINE_TUNING.md)"
    )
    # fmt: on


@dataclass(frozen=True)
class NetworkSettings(ComputeSettings):
    """Holds a classifier's form and first weights, and how it runs on this machine."""

    # fmt: off
    attention: str | None = network_flag(
        "--attention", default=None, metavar="NAME",
        help="another attention in the same network: eca_ns, se_var1, … as in the paper's "
        "ablation, timm:NAME (cbam, gc, …), or FILE.py:CLASS, a layer of one's own "
        "(default: what the network's name says)"
    )
    num_classes: int | None = network_flag(
        "--num-classes", default=None, kind=positive_int,
        help="outputs (default: read from the data)"
    )
    pretrained: str | None = network_flag(
        "--pretrained", default=None, metavar="CKPT", first=True, saved=False,
        help="start from these weights: of a file; torchvision, those that it has published of the "
        "same network without attention; or timm:NAME. A name is downloaded, once"
    )
    identity_start: bool | None = network_flag(
        "--identity-start", default=None, kind=YES_NO, saved=False, trains=True,
        help="new ECA layers begin without effect: the network starts as the plain one of "
        "--pretrained (default: in networks of timm and torchvision)"
    )
    channels_last: bool = training_flag(
        "--channels-last", default=False, kind=YES_NO, needs={"fast": (False,)},
        help="NHWC memory format"
    )
    compile: bool = training_flag(
        "--compile", default=False, kind=YES_NO, help="torch.compile the network"
    )
    grad_checkpointing: bool = training_flag(
        "--grad-checkpointing", default=False, kind=YES_NO, trains=True,
        help="keep each block's input alone for backward and compute the rest again: less memory, "
        "more time, the same results"
    )
    fast: bool = run_flag(
        "--fast", default=False, kind=SWITCH, saved=False, needs={"evaluate": (True,)},
        help="with -e: BatchNorm folded, ECA's gate before the last convolution, --amp as weights; "
        "on a CPU a file of export.py --to openvino takes 0.8 of its time at batch 1, and starts "
        "in a fifth"
    )
    # fmt: on


@dataclass(frozen=True)
class ClassificationRun(RunSettings):
    """Holds what a start of main.py does, and where it writes."""

    # fmt: off
    recipe: str | None = training_flag(
        "--recipe", default=None, kind=recipe_name, metavar="NAME", first=True,
        resume=NEVER,
        help="paper (the default), another of docs/RECIPES.md, or a .json file such as a run's "
        "args.json: values for --crop-pct and the flags of optimisation, where none is typed; a "
        "demo keeps its sizes and schedule under a name"
    )
    start_epoch: int | None = training_flag(
        "--start-epoch", default=None, kind=count, saved=False, trains=True,
        help="begin after this many epochs (default: 0, or where the resumed run stopped; going "
        "back makes a new folder)"
    )
    list_models: str | None = run_flag(
        "--list-models", default=None, nargs="?", const="*", metavar="PATTERN", first=True,
        saved=False,
        help="show the networks, all or those of a pattern such as '*50', with parameters, FLOPs "
        "and published accuracy, and exit"
    )
    report: bool = run_flag(
        "--report", default=False, kind=YES_NO,
        help="write figures by class, confusions, calibration and the worst images to a folder "
        "report/: with -e of this evaluation, in --output or beside the run's checkpoint; else of "
        "the best epoch, after the last one (docs/REPORTS.md)"
    )
    present_classes: bool = run_flag(
        "--present-classes", default=False, kind=SWITCH, saved=False, needs={"evaluate": (True,)},
        help="with -e: compare only the outputs of classes that DATA has, as published for "
        "ImageNet-A and ImageNet-R"
    )
    class_names: str | None = run_flag(
        "--class-names", default=None, metavar="FILE", saved=False, needs={"evaluate": (True,)},
        help="with -e and weights without class names: the folder name of each output, one a line; "
        "or the folder of the training's classes, such as ImageNet's val"
    )
    real_labels: str | None = run_flag(
        "--real-labels", default=None, metavar="FILE", saved=False, needs={"evaluate": (True,)},
        help="with -e on ImageNet's validation images: accuracy by the ReaL labels, too, of their "
        "published real.json"
    )
    # fmt: on


@dataclass(frozen=True)
class Config(BaseConfig):
    """Holds a start of main.py: the recipe, and how it is run; see `BaseConfig`."""

    recipe: Recipe
    data: DataSettings
    network: NetworkSettings
    run: ClassificationRun
