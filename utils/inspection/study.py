"""A study by plan: what it compares, the statistics of its runs, and its tables and pictures.

`tools/study.py` trains and evaluates the runs.
"""

import hashlib
import math
import os
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from models.attention import ATTENTIONS, TIMM, find_attention, is_file
from models.registry import check_name, is_of_library
from utils.data import image_folder
from utils.data.image_folder import ImageFolder
from utils.system.errors import UserError
from utils.system.style import CURVES, GREY, MAIN, png, styled
from utils.system.text import (
    cell,
    columns,
    counted,
    csv_text,
    did_you_mean,
    paragraphs,
    printable,
    short,
)

NONE = "none"  # the variant that the others are compared with
# Name of a variant: the network's name with {} for the plain one's, and main.py's flags. K and a
# number stand for that kernel size in every stage. Any other layer is named as --attention does.
VARIANTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    NONE: ("{}", ()),
    "SE": ("se_{}", ()),
    **{f"SE-Var{n}": ("eca_{}", ("--attention", f"se_var{n}")) for n in (1, 2, 3)},
    "ECA-NS k=3": ("eca_{}", ("--attention", "eca_ns", "--ksize", "K3")),
    **{f"ECA k={k}": ("eca_{}", ("--ksize", f"K{k}")) for k in (1, 3, 5, 7, 9)},
    "ECA adaptive": ("eca_{}", ("--ksize", "adaptive")),
    "ECA published": ("eca_{}", ()),
    "ECA identity start": ("eca_{}", ("--identity-start",)),  # on weights of a plain network
    **{
        name: ("{}", ("--attention", f"timm:{layer}"))
        for name, layer in (("CBAM", "cbam"), ("GC", "gc"), ("coordinate", "coord"), ("ELA", "ela"))
    },
}
OURS = ("ECA published", "ECA identity start")  # in a library's network they are "ECA adaptive"
STAGES = {"resnet": 4, "mobilenet": 2, "timm:": 1, "torchvision:": 1}  # digits of --ksize
Count = Annotated[int, msgspec.Meta(ge=1)]
Seed = Annotated[int, msgspec.Meta(ge=0)]
Seeds = Annotated[tuple[Seed, ...], msgspec.Meta(min_length=1)]


class Runs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Says how one network is trained."""

    # learning rates to choose from, each tried with every variant
    rates: Annotated[tuple[Annotated[float, msgspec.Meta(gt=0)], ...], msgspec.Meta(min_length=1)]
    flags: tuple[str, ...]  # for main.py


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Holds a study. Each field but `digest` stands in the file under the same name."""

    question: str  # what the study is to answer, in words
    data: str  # as main.py takes it; its val/ holds the test images
    # training images of each class; None for all that validation leaves
    train_per_class: Count | None
    validation_per_class: Count  # images of each class cut from train/, which choose rate and epoch
    split_seed: Seed  # of the cut
    # how each is trained, by the plain network's name
    networks: Annotated[dict[str, Runs], msgspec.Meta(min_length=1)]
    # names of `VARIANTS`, "timm:NAME" or "FILE.py:CLASS", `NONE` first
    variants: Annotated[tuple[str, ...], msgspec.Meta(min_length=2)]
    choosing_seeds: Seeds  # of the runs that choose the rates
    seeds: Seeds  # of the runs that are evaluated on the test images
    also_compare: tuple[tuple[str, str], ...]  # pairs of variants, besides each with `NONE`
    level: Annotated[float, msgspec.Meta(gt=0, lt=1)]  # of the intervals
    digest: str = ""  # SHA-256 of the file

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Returns the comparisons for each network, as (variant, the one it is compared with)."""
        return [(name, NONE) for name in self.variants[1:]] + list(self.also_compare)


def read_plan(file: Path) -> Plan:
    """Reads a plan.

    Raises:
        UserError: no such file, or it is no plan; names the field.
    """
    try:
        data = file.read_bytes()
        plan = msgspec.json.decode(data, type=Plan)
        _refuse_doubtful(plan)
    except OSError as error:
        raise UserError(f"{printable(file)}: {error.strerror}; give a plan's file") from None
    except ValueError as error:  # msgspec's own are, too
        raise UserError(
            f"{printable(file)}: {printable(str(error))}; docs/EVIDENCE.md has a plan's fields"
        ) from None
    return msgspec.structs.replace(plan, digest=hashlib.sha256(data).hexdigest())


def _refuse_doubtful(plan: Plan) -> None:
    """Raises ValueError for a plan that would compare a network with itself, or cannot be run."""
    for name in (*plan.variants, *(name for pair in plan.also_compare for name in pair)):
        if name.startswith(TIMM):
            find_attention(name)
        elif name not in VARIANTS and not is_file(name):
            hint = did_you_mean(name, list(VARIANTS)) or f"; there is {', '.join(VARIANTS)}"
            raise ValueError(f"no variant {name!r}{hint}")
    for field in ("variants", "seeds", "choosing_seeds"):
        values = getattr(plan, field)
        if len(set(values)) < len(values):
            raise ValueError(f"{field} is {list(values)}: give each once")
    if plan.variants[0] != NONE:
        raise ValueError(f"variants begin with {NONE!r}, and name at least one other")
    if any(not {*pair} <= {*plan.variants} or len({*pair}) < 2 for pair in plan.also_compare):
        raise ValueError("also_compare holds pairs of the plan's variants")
    if plan.digest:
        raise ValueError("digest is no field of a plan's file")
    for name, runs in plan.networks.items():
        if not name.startswith(tuple(STAGES)):
            raise ValueError(f"network {name!r}: give a plain one, such as resnet18 or mobilenetv2")
        if is_of_library(name):
            check_name(name)
            if ours := [variant for variant in plan.variants if variant in OURS]:
                raise ValueError(f"network {name}: {ours[0]} is for our networks")
        made = [arch_and_flags(name, variant) for variant in plan.variants]
        if twice := [v for v, how in zip(plan.variants, made, strict=True) if made.count(how) > 1]:
            raise ValueError(f"variants {' and '.join(twice)} are the same")
        if len(set(runs.rates)) < len(runs.rates):
            raise ValueError(f"network {name}: rates is {list(runs.rates)}: give each once")


def arch_and_flags(network: str, variant: str) -> tuple[str, list[str]]:
    """Returns main.py's name of a network's variant, and the flags that make it."""
    arch, flags = VARIANTS.get(variant, ("{}", ("--attention", variant)))
    stages = next(count for family, count in STAGES.items() if network.startswith(family))
    if is_of_library(network):
        own = arch.removesuffix("_{}")  # eca or se: its name has none
        if own in ATTENTIONS and "--attention" not in flags:
            flags = ("--attention", own, *flags)
        arch = "{}"
    return arch.format(network), [f[1] * stages if f[0] == "K" else f for f in flags]


ALIKE = 1e-9  # differences that are closer are the same, rounded otherwise


@dataclass(frozen=True)
class Difference:
    """Holds the mean of the differences of paired runs."""

    mean: float  # in the runs' own unit
    # The confidence interval of this one comparison, by Student's t; nan where the pairs have no
    # spread. Accuracy counts whole images, so that two or three seeds may differ by the same by
    # chance: it is no sign that another seed would, too.
    low: float
    high: float
    # The probability of such a mean or a larger one, of either sign, where there is no difference;
    # nan as the interval, but 1 where all pairs are equal.
    p: float
    pairs: int


def compare(ours: Sequence[float], theirs: Sequence[float], level: float = 0.95) -> Difference:
    """Compares runs in pairs: the same seed gives both the same images in the same order.

    Args:
        ours, theirs: one figure a seed, in the same order of seeds.

    Raises:
        ValueError: the lengths differ, or there are no runs.
    """
    each = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, pairs = statistics.fmean(each), len(each)
    if max(each) - min(each) <= ALIKE:
        p = 1.0 if pairs > 1 and abs(mean) <= ALIKE else math.nan
        return Difference(mean, math.nan, math.nan, p, pairs)
    from scipy.stats import ttest_1samp  # optional, see `tools.study`

    test = ttest_1samp(each, 0)
    low, high = test.confidence_interval(level)
    return Difference(mean, float(low), float(high), float(test.pvalue), pairs)


def holm(values: Sequence[float]) -> list[float]:
    """Returns p-values corrected for their number, in the same order (Holm, 1979).

    A corrected value below 0.05 keeps the chance of even one false positive among all of them below
    5 %. Values that are nan stay nan and still count as comparisons.
    """
    corrected, highest = list(values), 0.0
    known = [i for i, p in enumerate(values) if not math.isnan(p)]
    for rank, i in enumerate(sorted(known, key=values.__getitem__)):
        highest = max(highest, min(1.0, (len(values) - rank) * values[i]))
        corrected[i] = highest
    return corrected


def write_parts(
    root: Path, folder: Path, train_per_class: int | None, validation_per_class: int, seed: int
) -> None:
    """Makes folder/train and folder/val of the images of root/train; root/val is not touched.

    The images are hard links where the file system has them.

    Args:
        train_per_class: images of each class in folder/train; None for all that are left.
        validation_per_class: images of each class in folder/val.
        seed: of the draw; folder/val does not depend on `train_per_class`.

    Raises:
        UserError: a class has too few images, or root/train cannot be read.
    """
    images = image_folder.scan(str(root / "train"))
    chance = np.random.default_rng(seed)
    for label, name in enumerate(images.classes):
        drawn = chance.permutation(np.flatnonzero(images.labels == label))
        end = None if train_per_class is None else validation_per_class + train_per_class
        needed = validation_per_class + (train_per_class or 1)
        if len(drawn) < needed:
            raise UserError(
                f"{images.where}: class {name} has {counted(len(drawn), 'image')}, and the plan "
                f"takes {needed}; plan fewer"
            )
        _link(images, drawn[:validation_per_class], folder / "val" / name)
        _link(images, drawn[validation_per_class:end], folder / "train" / name)


def _link(images: ImageFolder, indices: np.ndarray, folder: Path) -> None:
    folder.mkdir(parents=True)
    for index in sorted(indices.tolist()):
        source = os.fsdecode(images.path(index))
        target = folder / f"{index:07d}{Path(source).suffix}"
        try:
            os.link(source, target)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, target)


Key = tuple[str, str]  # network, variant


@dataclass(frozen=True)
class RunResult:
    """Holds one run. Accuracies are top-1 in %; None where it saw no test images."""

    name: str
    network: str
    variant: str
    rate: float  # learning rate
    seed: int
    epochs: int
    best_epoch: int  # from 1, chosen by the validation part
    val_top1: float
    test_top1: float | None
    test_images: int | None
    train_images: int
    seconds_per_epoch: float  # of training alone, the median epoch
    parameters: int
    multiply_adds: int  # of one image, forward
    environment: Mapping[str, object]  # command, commit, device and versions, as args.json has them


@dataclass(frozen=True)
class Comparison:
    """Compares a variant of a network with another, on the test images."""

    network: str
    variant: str
    against: str
    difference: Difference
    p: float  # of the difference, corrected for the number of comparisons in the study


def choose_rates(plan: Plan, runs: Sequence[RunResult]) -> dict[Key, float]:
    """Returns each variant's rate: the highest mean top-1 of validation, the lower of equal ones.

    Args:
        runs: those of the choosing seeds with every rate.
    """
    chosen = {}
    for network, how in plan.networks.items():
        for variant in plan.variants:
            best = how.rates[0]
            if len(how.rates) > 1:
                means = validation_means(plan, runs, network, variant)
                best = max(sorted(how.rates), key=means.__getitem__)
            chosen[network, variant] = best
    return chosen


def validation_means(
    plan: Plan, runs: Sequence[RunResult], network: str, variant: str
) -> dict[float, float]:
    """Returns {rate: mean top-1 of validation over the choosing seeds}."""
    by_rate: dict[float, list[float]] = {}
    for run in runs:
        if (run.network, run.variant) == (network, variant) and run.seed in plan.choosing_seeds:
            by_rate.setdefault(run.rate, []).append(run.val_top1)
    return {rate: statistics.fmean(values) for rate, values in by_rate.items()}


def by_variant(plan: Plan, runs: Sequence[RunResult]) -> dict[Key, list[RunResult]]:
    """Returns the runs that were evaluated on the test images, in the order of the plan's networks
    and variants and of the seeds.
    """
    tested = sorted((run for run in runs if run.test_top1 is not None), key=lambda run: run.seed)
    return {
        (network, variant): [r for r in tested if (r.network, r.variant) == (network, variant)]
        for network in plan.networks
        for variant in plan.variants
    }


def compare_all(plan: Plan, runs: Sequence[RunResult]) -> list[Comparison]:
    """Makes the plan's comparisons, and corrects them together for their number."""
    tested = by_variant(plan, runs)
    made = []
    for network in plan.networks:
        for variant, against in plan.pairs:
            ours, theirs = (_top1(tested[network, name]) for name in (variant, against))
            difference = compare(ours, theirs, plan.level)
            made.append(Comparison(network, variant, against, difference, difference.p))
    corrected = holm([comparison.p for comparison in made])
    return [replace(each, p=p) for each, p in zip(made, corrected, strict=True)]


def runs_csv(runs: Sequence[RunResult]) -> bytes:
    """Returns a CSV file with one row a run, and what its figures depend on."""
    rows = [{**asdict(run), **run.environment} for run in runs]
    return csv_of([{k: v for k, v in row.items() if k != "environment"} for row in rows])


def csv_of(rows: Sequence[Mapping[str, object]]) -> bytes:
    """Returns a CSV file; what a row lacks is left empty, and text is never a formula."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    values = [[row.get(name, "") for name in names] for row in rows]
    numbers = (int, float, type(None))
    lines = [[v if isinstance(v, numbers) else cell(v) for v in row] for row in values]
    return csv_text([names, *lines]).encode()


SIGNIFICANT = 0.05


def variant_rows(
    plan: Plan, runs: Sequence[RunResult], rates: Mapping[Key, float]
) -> list[list[str]]:
    """Returns one row a variant: its rate, its accuracy over the seeds, and what it costs."""
    head = "network,attention,rate,top-1,± std,runs,parameters,MMACs,s/epoch"
    rows = [head.split(",")]
    for key, tested in by_variant(plan, runs).items():
        top1 = _top1(tested)
        std = f"{statistics.stdev(top1):.2f}" if len(top1) > 1 else "-"
        row = [*key, f"{rates[key]:g}", f"{statistics.fmean(top1):.2f}", std, str(len(top1))]
        row += [f"{tested[0].parameters:,}", f"{tested[0].multiply_adds / 1e6:.2f}"]
        rows.append([*row, f"{_median(tested, 'seconds_per_epoch'):.1f}"])
    return rows


def comparison_rows(plan: Plan, comparisons: Sequence[Comparison]) -> list[list[str]]:
    """Returns one row a comparison: points of top-1, interval, corrected p, and what it says."""
    rows = [["network", "attention", "against", "points", f"{plan.level:.0%} interval", "p", ""]]
    for c in comparisons:
        mean, low, high = c.difference.mean, c.difference.low, c.difference.high
        interval = "-" if math.isnan(low) else f"{low:+.2f} to {high:+.2f}"
        p = "-" if math.isnan(c.p) else f"{c.p:.3f}"
        rows.append([c.network, c.variant, c.against, f"{mean:+.2f}", interval, p, verdict(c)])
    return rows


def verdict(comparison: Comparison) -> str:
    """Returns in words what the corrected p allows to say."""
    if math.isnan(comparison.p):
        alone = comparison.difference.pairs == 1
        return "one seed says nothing" if alone else "no spread: says nothing"
    if comparison.p >= SIGNIFICANT:
        return "no difference shown"
    return "higher" if comparison.difference.mean > 0 else "lower"


def choice_rows(
    plan: Plan, runs: Sequence[RunResult], rates: Mapping[Key, float]
) -> list[list[str]]:
    """Returns one row a variant and rate: mean top-1 of validation, and which rate was taken."""
    rows = [["network", "attention", "rate", "validation top-1", "chosen"]]
    for network in plan.networks:
        for variant in plan.variants:
            means = validation_means(plan, runs, network, variant)
            for rate in sorted(means):
                chosen = "yes" if rate == rates[network, variant] else ""
                rows.append([network, variant, f"{rate:g}", f"{means[rate]:.2f}", chosen])
    return rows


def report(
    plan: Plan,
    runs: Sequence[RunResult],
    rates: Mapping[Key, float],
    comparisons: Sequence[Comparison],
) -> str:
    """Returns the whole text: the question, the tables, and how to read them."""
    tested = [run for run in runs if run.test_top1 is not None]
    images = f"{tested[0].train_images:,} training images, {tested[0].test_images:,} test images"
    notes = (
        "rate and epoch: chosen by validation images cut from train/; top-1: of test images\n"
        "points: mean difference in top-1 of runs with the same seed; interval: of this row\n"
        f"alone; p: corrected for all {len(comparisons)} rows (Holm)\n"
        "MMACs: millions of multiply-adds of one image; s/epoch: training, the median run"
    )
    return paragraphs(
        f"{plan.question}\n{plan.data}, {images}, plan {plan.digest[:12]}",
        columns(variant_rows(plan, runs, rates), left=2),
        columns(comparison_rows(plan, comparisons), left=3),
        notes,
    )


COSTS = (  # attribute of a run, and the words under its axis
    ("seconds_per_epoch", "Training time"),
    ("parameters", "Parameters"),
    ("multiply_adds", "Multiply-adds"),
)


def draw_accuracy(plan: Plan, runs: Sequence[RunResult], made: Sequence[Comparison]) -> bytes:
    """Draws for each network every run, and the differences to no attention with their intervals.

    Returns:
        A PNG.
    """
    tested = by_variant(plan, runs)
    height = max(2.4, 0.36 * len(plan.variants) + 1.3) * len(plan.networks)
    with _panels(plan, 2, height) as (figure, axes):
        for (left, right), network in zip(axes, plan.networks, strict=True):
            for i, variant in enumerate(plan.variants):
                top1 = _top1(tested[network, variant])
                left.plot(top1, [i] * len(top1), "o", color=GREY, markersize=5, alpha=0.7)
                left.plot(statistics.fmean(top1), i, "D", color=MAIN)
            left.set(xlabel="Test top-1 (%)", title=f"{network}: ● one run   ◆ mean")
            right.axvline(0, color=GREY, linewidth=1)
            for c in made:
                if (c.network, c.against) != (network, NONE):
                    continue
                i, mean = plan.variants.index(c.variant), c.difference.mean
                reach = None if math.isnan(c.difference.low) else c.difference.high - mean
                right.errorbar(mean, i, xerr=reach, fmt="D", color=MAIN, capsize=4)
            title = f"difference to none, {plan.level:.0%} interval"
            right.set(xlabel="Points of test top-1", title=title)
            for axis in (left, right):
                axis.set_yticks(range(len(plan.variants)), [short(v) for v in plan.variants])
                axis.set_ylim(len(plan.variants) - 0.4, -0.6)
        return png(figure)


def draw_costs(plan: Plan, runs: Sequence[RunResult]) -> bytes:
    """Draws for each network top-1 over what a variant costs more than no attention does.

    Returns:
        A PNG.
    """
    tested = by_variant(plan, runs)
    height = 2.7 * len(plan.networks) + 0.5
    with _panels(plan, len(COSTS), height, sharey="row") as (figure, axes):
        for row, network in zip(axes, plan.networks, strict=True):
            for axis, (attribute, label) in zip(row, COSTS, strict=True):
                plain = _median(tested[network, NONE], attribute)
                for i, variant in enumerate(plan.variants):
                    of_variant = tested[network, variant]
                    more = 100 * (_median(of_variant, attribute) / plain - 1)
                    top1 = statistics.fmean(_top1(of_variant))
                    colour, marker = CURVES[i % len(CURVES)], "oDs^vP"[i % 6]
                    axis.plot(more, top1, marker, color=colour, label=short(variant), ls="")
                axis.set_xlabel(f"{label}: % above none")
            row[0].set_ylabel("Test top-1 (%)")
            row[1].set_title(network)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)))
        return png(figure)


@contextmanager
def _panels(plan: Plan, across: int, height: float, **shared: str) -> Iterator[tuple[Any, Any]]:
    """Opens a figure with a row of `across` axes for each network."""
    size = {"figsize": (9.2, height), "squeeze": False}
    with styled() as plt:
        yield plt.subplots(len(plan.networks), across, **size, **shared)


def _median(runs: Sequence[RunResult], attribute: str) -> float:
    return float(statistics.median(getattr(run, attribute) for run in runs))


def _top1(runs: Sequence[RunResult]) -> list[float]:
    """Returns top-1 of those that were evaluated on the test images."""
    return [run.test_top1 for run in runs if run.test_top1 is not None]
