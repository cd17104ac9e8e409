"""Says what a flag of a training script is, and declares those that both scripts share.

A field of `utils.config.classification` or `utils.config.detection` has its name, type, default,
range, help, group and rules here in one call of `flag`. The parser, the refusals, the recipes and
the checks of a checkpoint's own settings are made from these declarations.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any, TypeVar

from utils.system.text import did_you_mean

DATA, NETWORK, OPTIMISATION, MODERN, OWN_DATA, RUN = GROUPS = (
    "data",
    "network",
    "optimisation",
    "parts of the modern recipes, off in the paper's",
    "data of one's own: few images, uneven classes",
    "run",
)
SWITCH, YES_NO = "switch", "yes or no"  # kinds of flags without a value: --x; --x and --no-x
ANY_TIME, BETWEEN_EPOCHS, NEVER = "at any time", "between epochs", "never"


@dataclass(frozen=True)
class Flag:
    """Describes one flag.

    Args:
        names: as typed; a single name without dashes is a positional argument.
        group: of the help, one of GROUPS.
        help: without the default, which is added.
        kind: an argparse type; SWITCH or YES_NO for a flag without a value; str for any text.
        choices: the values, where they are few.
        metavar: of the value in the help; by default N or F, as `kind` is of whole numbers or not.
        nargs: as in argparse.
        const: the value of a flag that is typed without one, with nargs "?".
        first: shown by `-h`; the others by `-h all`.
        saved: a checkpoint keeps it, and a resumed run takes it from there.
        resume: when a resumed run may have another value of a recipe's field: ANY_TIME, where it
            changes how far a step goes, how the same batch is shared out, or what comes after the
            epoch; BETWEEN_EPOCHS, because the epoch's recorded loss would mean two things; NEVER,
            because the saved state cannot follow.
        trains: it does nothing with -e.
        needs: {name of another field: the values with which this one does something}.
    """

    names: tuple[str, ...]
    group: str
    help: str
    kind: Any = str
    choices: tuple[str, ...] | None = None
    metavar: str | None = None
    nargs: str | None = None
    const: str | None = None
    first: bool = False
    saved: bool = True
    resume: str = BETWEEN_EPOCHS
    trains: bool = False
    needs: Mapping[str, tuple[Any, ...]] | None = None

    @property
    def name(self) -> str:
        """Returns the name for messages: the first long one."""
        return next((n for n in self.names if n.startswith("--")), self.names[0])

    def typed(self, value: object) -> str:
        """Returns the flag with a value as they are typed: `--no-fused`, `--lr 0.1`."""
        if isinstance(value, bool):
            return self.name if value else f"--no-{self.name[2:]}"
        if isinstance(value, list | tuple):
            return f"{self.name} {' '.join(map(str, value))}"
        return f"{self.name} {value:.12g}" if isinstance(value, float) else f"{self.name} {value}"

    def takes(self, value: object) -> bool:
        """Returns whether a value, as a file holds it, is one that the flag itself would give."""
        if self.kind in (SWITCH, YES_NO):
            return isinstance(value, bool)
        if self.nargs == "+":
            if not isinstance(value, list | tuple) or not value:
                return False
            return all(map(self._takes_one, value))
        return self._takes_one(value)

    def _takes_one(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            return False
        if self.choices is not None:
            return value in self.choices
        if self.kind is str:
            return isinstance(value, str) and "\0" not in value  # no name of a file holds one
        try:
            return bool(self.kind(str(value)) == value)
        except (argparse.ArgumentTypeError, ValueError, OverflowError):
            return False

    def add_to(self, group: argparse._ArgumentGroup, dest: str, default: object) -> None:
        """Adds the flag to a parser. What is not typed is absent from the parsed namespace."""
        text = self.help
        if default not in (None, MISSING):
            text += f" (default: {_default_text(default)})"
        words: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
        if not self.names[0].startswith("-"):
            group.add_argument(dest, metavar=self.metavar, nargs="?", **words)
        elif self.kind == SWITCH:
            group.add_argument(*self.names, dest=dest, action="store_true", **words)
        elif self.kind == YES_NO:
            action = argparse.BooleanOptionalAction
            group.add_argument(*self.names, dest=dest, action=action, **words)
        else:
            kind = None if self.kind is str else self.kind
            metavar = self.metavar or getattr(self.kind, "metavar", None)
            value: dict[str, Any] = {"type": kind, "choices": self.choices, "metavar": metavar}
            value |= {"nargs": self.nargs, "const": self.const}
            group.add_argument(*self.names, dest=dest, **value, **words)


def flag(*names: str, default: Any = MISSING, **words: Any) -> Any:
    """Declares a field of a frozen dataclass as a flag; see `Flag` for the words."""
    return field(default=default, metadata={"flag": Flag(names, **words)})


data_flag = partial(flag, group=DATA)
network_flag = partial(flag, group=NETWORK)
training_flag = partial(flag, group=OPTIMISATION)
modern_flag = partial(flag, group=MODERN)
own_data_flag = partial(flag, group=OWN_DATA)
run_flag = partial(flag, group=RUN)


def flags_of(*parts: type) -> dict[str, Flag]:
    """Returns the flags that frozen values declare, by the names of their fields.

    A field that a subclass gives another default keeps the flag of its base.
    """
    classes = [base for kind in parts for base in kind.__mro__ if is_dataclass(base)]
    declared = [item for kind in classes for item in fields(kind) if "flag" in item.metadata]
    return {item.name: item.metadata["flag"] for item in declared}


def _default_text(default: object) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    if isinstance(default, float):
        return f"{default:g}"
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


LARGEST = {int: 2**31 - 1, float: 3e38}  # what the tensors of PyTorch can count and hold
SMALLEST = 1e-12  # what is nearer to 0 overflows where something is divided by it
MOST_DIGITS = 40  # of a number in a message


def number(
    kind: type,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
) -> Callable[[str], float]:
    """Returns an argparse type: a finite `kind` (int or float) in [low, high].

    `above` and `below` leave out the lower and the upper end. Without an upper end it is at most
    LARGEST, and no number other than 0 is nearer to 0 than SMALLEST.
    """
    if math.isinf(high):
        limits = f"{'above' if above else 'at least'} {low:g}"
    else:
        ends = [f"{low:g}", str(high) if kind is int else f"{high:g}"]
        excluded = [end for end, is_out in zip(ends, (above, below), strict=True) if is_out]
        limits = f"between {' and '.join(ends)}"
        if excluded:
            limits += f", {' and '.join(excluded)} excluded"
    noun = "a whole number" if kind is int else "a number"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        low_ok = value > low if above else value >= low
        high_ok = value < high if below else value <= high
        shown = repr(text if len(text) <= MOST_DIGITS else f"{text[:MOST_DIGITS]}…")
        if not (abs(value) < math.inf and low_ok and high_ok):
            raise argparse.ArgumentTypeError(f"{shown} is not {noun} {limits}")
        if math.isinf(high) and value > LARGEST[kind]:
            raise argparse.ArgumentTypeError(f"{shown} is not {noun} of at most {LARGEST[kind]}")
        if 0 < abs(value) < SMALLEST:
            raise argparse.ArgumentTypeError(f"{shown} is too near to 0: give 0, or {SMALLEST:g}")
        return value

    parse.metavar = "N" if kind is int else "F"  # type: ignore[attr-defined]  # of the help
    return parse


positive_int = number(int, 1)
count = number(int, 0)
positive_float = number(float, 0, above=True)
non_negative_float = number(float, 0)
fraction = number(float, 0, 1)
seconds = number(float, 0, 1e6)  # twelve days; a system's own clocks end somewhere above
crop = number(float, 0.05, 1)  # a share of the side of an image that is scaled to its inverse
below_one = number(float, 0, 1, below=True)
share = number(float, 0, 1, above=True)  # more than nothing, at most all


def one_of(names: Sequence[str], what: str) -> Callable[[str], str]:
    """Returns an argparse type: one of many names; another is answered with the nearest."""

    def parse(text: str) -> str:
        if text not in names:
            hint = did_you_mean(text, names) or f"; known: {', '.join(names)}"
            raise argparse.ArgumentTypeError(f"no {what} {text!r}{hint}")
        return text

    return parse


AMP = ("off", "bf16", "fp16")
TRACKERS = ("wandb", "mlflow")
Own = TypeVar("Own", bound="BaseRecipe")
AnyConfig = TypeVar("AnyConfig", bound="BaseConfig")


@dataclass(frozen=True, kw_only=True)
class BaseRecipe:
    """Holds the numbers that the recipes of classifiers and detectors share.

    Epochs count from 0; the batch is the global one, whatever the number of devices.
    """

    # fmt: off
    epochs: int = training_flag(
        "--epochs", kind=positive_int, first=True, trains=True, resume=ANY_TIME, help="of the run"
    )
    momentum: float = training_flag(
        "--momentum", kind=below_one, trains=True, resume=ANY_TIME, needs={"optimizer": ("sgd",)},
        help="of sgd"
    )
    weight_decay: float = training_flag(
        "--weight-decay", "--wd", kind=non_negative_float, trains=True, resume=ANY_TIME,
        help="factor of the penalty on large weights"
    )
    hflip: float = data_flag(
        "--hflip", default=0.5, kind=fraction, metavar="P", trains=True,
        help="training: probability of a mirrored image"
    )
    # fmt: on

    def override(self: Own, **values: Any) -> Own:
        """Returns a recipe with other values; None leaves a field as it is."""
        return replace(self, **{k: _plain(v) for k, v in values.items() if v is not None})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """Returns the learning rate of one optimizer step.

        Args:
            step: steps done so far in the whole run.
            steps_per_epoch: to turn steps into epochs.
        """
        raise NotImplementedError

    @classmethod
    def from_dict(cls: type[Own], values: Mapping[str, Any]) -> Own:
        """Returns the recipe saved with a run; a field that the file lacks takes its default."""
        known = {f.name: f.default for f in fields(cls)}
        several = {k for k, default in known.items() if isinstance(default, tuple)}
        return cls(**{k: _plain(v, k in several) for k, v in values.items() if k in known})


def _plain(value: Any, several: bool = False) -> Any:
    """Returns a value as recipes hold it: what argparse and JSON give as a list is a tuple, and so
    is the one number of a flag that takes several since.
    """
    if isinstance(value, list):
        return tuple(value)
    return (value,) if several and isinstance(value, int | float) else value


@dataclass(frozen=True)
class LoaderSettings:
    """Holds where the data is, and how this machine reads it."""

    # fmt: off
    data: str | None = data_flag(
        "data", default=None, metavar="DATA", first=True,
        help="data folder (when resuming: the run's own)"
    )
    workers: int | None = data_flag(
        "-j", "--workers", default=None, kind=count, first=True,
        help="loader processes of each rank (default: 4, or its share of the processors; demos: 0)"
    )
    worker_timeout: float = data_flag(
        "--worker-timeout", default=600.0, kind=seconds, metavar="S",
        help="seconds without a batch after which loader workers count as hung"
    )
    check_val: bool = data_flag(
        "--check-val", default=False, kind=SWITCH, saved=False, trains=True,
        help="read every validation image before training, and stop at a broken one"
    )
    # fmt: on


@dataclass(frozen=True)
class ComputeSettings:
    """Holds on which device, and in which form, a network runs."""

    # fmt: off
    ksize: str | None = network_flag(
        "--ksize", default=None, metavar="K", first=True,
        help="ECA's kernel sizes: 3557, 3,5,5,11 or adaptive; 13 for MobileNetV2 (default: those "
        "published)"
    )
    amp: str = training_flag(
        "--amp", default="off", choices=AMP, first=True, help="automatic mixed precision"
    )
    fused: bool = training_flag(
        "--fused", default=True, kind=YES_NO,
        help="run BatchNorm, ECA, addition and ReLU as one operation"
    )
    device: str = run_flag(
        "--device", default="auto", first=True, saved=False, help="auto, cpu, cuda, cuda:N or mps"
    )
    gpu: int | None = run_flag(
        "--gpu", default=None, kind=count, saved=False, help="use this GPU alone"
    )
    # fmt: on


@dataclass(frozen=True)
class RunSettings:
    """Holds what a start does, and where it writes."""

    # fmt: off
    evaluate: bool = run_flag(
        "-e", "--evaluate", default=False, kind=SWITCH, first=True, saved=False,
        help="evaluate the checkpoint of --resume, and do not train; with --output DIR the figures "
        "are written to DIR/evaluation.json, too"
    )
    resume: str | None = run_flag(
        "--resume", default=None, metavar="CKPT", first=True, saved=False,
        help="go on from this checkpoint with its run's own settings; auto: the newest good one of "
        "--output or of the newest run"
    )
    output: str | None = run_flag(
        "--output", default=None, metavar="DIR", first=True, saved=False,
        help="run folder (default: runs/NETWORK[_ACTION]-N, a new one); with -e a new folder for "
        "the figures, but with -e --resume auto that of the run, and nothing is written"
    )
    action: str | None = run_flag(
        "--action", default=None, metavar="TEXT", help="a word for the run folder's name"
    )
    print_freq: int = run_flag(
        "-p", "--print-freq", default=10, kind=positive_int,
        help="steps between two lines of progress"
    )
    save_every: int | None = run_flag(
        "--save-every", default=None, kind=positive_int, metavar="STEPS", trains=True,
        help="checkpoint inside the epoch, too (default: at its end)"
    )
    save_minutes: float | None = run_flag(
        "--save-minutes", default=None, kind=positive_float, metavar="M", trains=True,
        help="the same, by the clock"
    )
    eval_every: int = run_flag(
        "--eval-every", default=1, kind=positive_int, metavar="N", trains=True,
        help="evaluate after each Nth epoch, and after the last"
    )
    log: str | None = run_flag(
        "--log", default=None, choices=TRACKERS, trains=True,
        help="send the columns of metrics.csv there, too; offline, into the run folder, where "
        "WANDB_MODE or MLFLOW_TRACKING_URI does not say otherwise"
    )
    seed: int | None = run_flag(
        "--seed", default=None, kind=number(int, 0, 2**63 - 1), first=True, trains=True,
        resume=NEVER,
        help="repeatable run: bit for bit on the CPU; on CUDA as far as its deterministic, slower "
        "kernels allow"
    )
    # fmt: on


@dataclass(frozen=True)
class BaseConfig:
    """Holds a start of a training script: the recipe, and how it is run.

    Args:
        typed: the fields that the command line named, with their values.
    """

    recipe: BaseRecipe
    data: LoaderSettings
    network: ComputeSettings
    run: RunSettings
    typed: Mapping[str, Any]

    @classmethod
    def parts(cls) -> list[Any]:
        """Returns the classes of the four parts, whose fields are the script's flags."""
        return [item.type for item in fields(cls)[:4]]

    @classmethod
    def of(
        cls: type[AnyConfig],
        recipe: BaseRecipe,
        values: Mapping[str, Any],
        typed: Mapping[str, Any],
    ) -> AnyConfig:
        """Returns the configuration of a start; what `values` lacks takes its default."""
        data, network, run = (
            kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values})
            for kind in cls.parts()[1:]
        )
        return cls(recipe, data, network, run, typed)

    @property
    def saved_flags(self) -> dict[str, Any]:
        """Returns the flags that a checkpoint keeps beside the recipe."""
        saved = [name for name, its in flags_of(*self.parts()[1:]).items() if its.saved]
        return {name: value for name, value in self.values().items() if name in saved}

    def record(self, seed: int, train_images: int, train_digest: str) -> dict[str, Any]:
        """Returns what a checkpoint holds of it, beside what the run began with."""
        return {
            "recipe": self.recipe.as_dict(),
            "args": self.saved_flags,
            "seed": seed,
            "train_digest": train_digest,
            "train_images": train_images,
        }

    def values(self) -> dict[str, Any]:
        """Returns every flag with its value in this start, by the fields' names."""
        return {**vars(self.recipe), **vars(self.data), **vars(self.network), **vars(self.run)}
