"""Reads the command line of main.py: flags, the checkpoint to go on from, and what does not fit.

A value comes from, the later before the earlier: the script's recipe, the demo's, --recipe, the run
that goes on, the flag itself.
"""

import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from models import start as start_weights
from models.attention import is_file, typed_attention
from models.registry import check_forward, image_settings, is_of_library
from utils.command_line.parser import (
    Parser,
    parser_of,
    refuse_for_exported,
    saved_flags,
    saved_recipe,
    without_effect,
)
from utils.config.classification import Config, Recipe
from utils.config.flags import flags_of
from utils.config.recipes import PAPER, RECIPES
from utils.data import demo_sets
from utils.data.decoding import DECODERS, GONE_DECODERS
from utils.data.demo_sets import DEMOS, takes_files
from utils.data.transforms import INTERPOLATIONS, is_timm_augment
from utils.inspection.exported_network import ExportedNetwork, is_exported, load_classifier
from utils.runs import folder as runs
from utils.runs import resume
from utils.runs.checkpoint import Checkpoint
from utils.runs.named_weights import read_weights
from utils.runs.resume import AUTO, Start
from utils.system.distributed import Context, device_lines
from utils.system.errors import UserError, as_user_error, require
from utils.system.files import read_json
from utils.system.processes import default_workers
from utils.system.text import counted, did_you_mean, printable
from utils.training import classifier
from utils.training.classification_data import BALANCED

FAMILIES = {"resnet": "ResNets", "mobilenet": "MobileNetV2"}
SCRIPTS = {"resnet": "main.py", "mobilenet": "light_main.py"}
USUAL = {"adamw": 1e-3, "lamb": 5e-3}  # learning rates of published recipes
RECIPE_FILE = "a JSON object of a recipe's fields, as args.json of each run holds one"
FLAGS = flags_of(*Config.parts())


def read_command_line(
    recipe: Recipe, demos: Mapping[str, Mapping[str, object]], description: str
) -> tuple[Config, Start]:
    """Reads the flags, finds the checkpoint, merges the recipe, and refuses what does not fit.

    Args:
        recipe: the script's default, the paper's.
        demos: what each demo needs otherwise, whatever the --recipe.
        description: of the script, for its help.

    Raises:
        UserError: one line with the flag or file, and the remedy.
    """
    paper, typed = recipe, make_parser(recipe, description).typed()
    if "list_models" in typed:
        from utils.inspection.cost_tables import list_text  # no run counts

        print(list_text(typed["list_models"]))
        raise SystemExit(0)
    name = typed.get("recipe")
    recipe = with_image_settings(recipe, typed)
    recipe = named_recipe(recipe, name, demos.get(typed.get("data", ""), {}))
    saved, folder = find_checkpoint(typed, recipe)
    values, notes = dict[str, Any](), tuple[str, ...]()
    if saved is not None:
        source = str(typed.get("resume") or typed.get("pretrained"))
        with as_user_error():
            named = [typed.get(name) for name in ("arch", "ksize", "attention", "num_classes")]
            named[2] = typed_attention(named[2])
            start_weights.refuse_another(saved.contents, source, *named)
        if saved.run is not None:
            flags, notes = flags_of_today(saved.run.flags, typed)
            values = saved_flags(flags, FLAGS, source)
            if is_file(str(values.get("attention"))):  # a file is run only where it is typed
                del values["attention"]
            recipe = saved_recipe(Recipe, saved.run.recipe, source)
        else:
            recipe = recipe.override(**saved.prepared)
            values = saved.own_flags() if isinstance(saved, ExportedFile) else {}
    recipe = recipe.override(**{k: v for k, v in typed.items() if k in recipe.as_dict()})
    values |= {name: value for name, value in typed.items() if name not in recipe.as_dict()}
    config = make_config(recipe, values, typed)
    refuse_flags(config)
    pretrained = None
    if saved is None:
        file = config.network.pretrained
        pretrained = read_weights(file, config.recipe.arch) if file else None
        with torch.device("meta"):  # costs nothing, and finds what does not fit
            network, _ = classifier.first_network(recipe, config.network, pretrained)
            with as_user_error():
                check_forward(network, {recipe.crop_size, recipe.img_size})
    refuse_no_work(config)
    run = config.run
    other_numbers = demo_sets.is_demo(config.data.data) or run.recipe not in (None, PAPER)
    notes += notes_on(recipe, paper, other_numbers, config.data.class_weights)
    if saved is not None and saved.run is not None:
        resume.refuse_another_recipe(saved.run, name)
        notes += tuple(other_values(name, recipe, typed))
    notes = resume.where(saved, run, run.start_epoch) + notes
    return config, Start(saved, pretrained, folder, notes, run.seed, run.start_epoch)


def with_image_settings(recipe: Recipe, typed: Mapping[str, Any]) -> Recipe:
    """Returns a script's recipe with what a library says of its network's images.

    Raises:
        UserError: it says what cannot be done here, and no flag says otherwise.
    """
    arch = typed.get("arch", recipe.arch)
    if not is_of_library(arch):
        return recipe
    with as_user_error():
        settings = image_settings(arch)
    if settings["interpolation"] not in INTERPOLATIONS and "interpolation" not in typed:
        raise UserError(
            f"{arch} is for images resized by {settings['interpolation']}: give --interpolation "
            f"{' or '.join(INTERPOLATIONS)}"
        )
    return recipe.override(**settings)


def make_parser(recipe: Recipe, description: str) -> Parser:
    """Returns the parser; a recipe's values are the defaults that the help shows."""
    return parser_of(
        Config.parts(),
        recipe,
        description,
        epilog="DATA is a folder with train/ and val/, each of one folder per class or of tar "
        f"shards (docs/SCALING.md), the URL of such shards, or one of {DEMOS}.",
    )


def make_config(recipe: Recipe, values: Mapping[str, Any], typed: Mapping[str, Any]) -> Config:
    """Returns the configuration of a start; what `values` lacks takes its default."""
    values = dict(values)
    if values.get("workers") is None:  # a demo's images are so small that processes cost more
        values["workers"] = 0 if demo_sets.is_demo(values.get("data")) else default_workers()
    if values.get("fast"):
        values["channels_last"] = True  # how --fast rebuilds
    return Config.of(recipe, values, typed)


class ExportedFile(Checkpoint, frozen=True, kw_only=True):
    """Holds a file of export.py, as a checkpoint without a run whose network is made already.

    Args:
        engine: what runs the file.
    """

    engine: ExportedNetwork

    @classmethod
    def load(cls, file: Path) -> "ExportedFile":
        """Reads a file; see `load_classifier` for what it refuses."""
        engine = load_classifier(file)
        # `models.start.refuse_another` compares the flags with the first two.
        fields = {"ksize": None, "attention": None, **engine.metadata}
        fields["classes"] = fields["classes"] or None
        return cls.of_fields(file, fields, engine=engine)

    def how_it_runs(self, context: Context) -> list[str]:
        """Says on which device the file runs, and in which precision."""
        precision = str(self.contents.get("precision", "float32"))
        amp = "off" if precision == "float32" else precision
        return device_lines(context, amp, channels_last=False, compiled=False)

    def own_flags(self) -> dict[str, Any]:
        """Returns the flags that the file decides where they are not typed."""
        decoder = self.contents.get("decoder")
        return {"decoder": decoder if decoder in DECODERS else DECODERS[0], "device": "cpu"}


def find_checkpoint(
    typed: Mapping[str, Any], recipe: Recipe
) -> tuple[Checkpoint | None, Path | None]:
    """Finds the checkpoint that a run goes on from, or the file that is evaluated.

    Returns:
        It and the run folder to go on in; each may be None.

    Raises:
        UserError: as in `resume.read` and `load_classifier`; or flags that an exported file has no
            use for.
    """
    arch, name = typed.get("arch", recipe.arch), None
    if {"data", "arch", "action"} & typed.keys():
        name = runs.run_name(arch, typed.get("action"))
    resumed, pretrained, output = (typed.get(k) for k in ("resume", "pretrained", "output"))
    evaluates = typed.get("evaluate", False)
    files = [file for file in (resumed, pretrained) if file is not None]
    exported = [file for file in files if is_exported(file)]
    if not exported:
        at_epoch = typed.get("start_epoch")
        return resume.read(resumed, pretrained, name, output, evaluates, at_epoch, arch)
    if not evaluates:
        raise UserError(
            f"{exported[0]}: a file of export.py is not trained: evaluate it with -e --resume "
            f"{exported[0]}, or give the checkpoint that it came from"
        )
    refuse_for_exported(typed, exported[0])
    if len(files) > 1:
        raise UserError(
            f"--resume {resumed} has weights of its own: leave --pretrained {pretrained} out"
        )
    resume.check_output(output, None, evaluates, exported[0])
    return ExportedFile.load(Path(exported[0])), None


def flags_of_today(
    flags: Mapping[str, Any], typed: Mapping[str, Any]
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Returns a run's saved flags with today's values for those that are gone, and lines on it."""
    former = flags.get("decoder")
    if not isinstance(former, str) or former not in GONE_DECODERS:
        return flags, ()
    flags = {**flags, "decoder": DECODERS[0]}
    if "decoder" in typed:
        return flags, ()
    line = f"the run's decoder {former} is gone: going on by {DECODERS[0]}, {GONE_DECODERS[former]}"
    return flags, (line,)


def refuse_flags(config: Config) -> None:
    """Refuses flags that contradict each other, or would do nothing.

    Raises:
        UserError: one line with the flags.
    """
    recipe, run, network = config.recipe, config.run, config.network
    without_effect(config.typed, config.values(), FLAGS)
    with as_user_error():
        _ = recipe.preprocessing
    if config.run.log and not config.run.evaluate:
        require((config.run.log,), f"--log {config.run.log}", config.run.log)
    if network.fast and config.typed.get("fused") is False:
        raise UserError("--no-fused does nothing with --fast: leave it out")
    if network.identity_start and run.resume not in (None, AUTO):
        raise UserError(
            f"--identity-start is for new attention, and --resume {run.resume} goes on with a run: "
            "leave it out"
        )
    if run.real_labels and run.present_classes:
        raise UserError(
            "--real-labels compares all outputs, and --present-classes some: give one of them"
        )
    if not run.evaluate:
        if is_timm_augment(recipe.auto_augment):
            require(("timm",), f"--auto-augment {recipe.auto_augment}", "timm")
        if recipe.optimizer == "lamb":
            require(("timm",), "--optimizer lamb", "timm")


def refuse_no_work(config: Config) -> None:
    """Refuses a start with no epoch left by --start-epoch, without DATA, or with idle files for it.

    Raises:
        UserError: one line with the remedy.
    """
    begin, data = config.run.start_epoch, config.data
    if not config.run.evaluate and (begin or 0) >= config.recipe.epochs:
        raise UserError(
            f"--start-epoch {begin}: the run has {counted(config.recipe.epochs, 'epoch')}; give a "
            "smaller one, or more --epochs"
        )
    if data.data is None:
        raise UserError(f"no DATA given: a folder with train/ and val/, or one of {DEMOS}")
    if (data.data_files or data.download) and not takes_files(data.data):
        flag = "--download" if data.download else "--data-files"
        raise UserError(f"{flag} does nothing with {printable(data.data)}: leave it out")
    if data.data_files and data.download:
        raise UserError("--data-files and --download are two ways to the same: give one of them")


def notes_on(
    recipe: Recipe, paper: Recipe, other_numbers: bool, class_weights: str | None = None
) -> tuple[str, ...]:
    """Returns lines on a recipe that can be meant, but hardly is.

    Args:
        recipe: of the run.
        paper: what the script proposes for its own family of networks.
        other_numbers: the numbers are not the script's, but those of a --recipe or of demo data.
    """
    notes = []
    if class_weights == recipe.sampler == BALANCED:
        notes.append(
            "! --class-weights balanced and --sampler balanced correct the same thing twice: use "
            "one of them"
        )
    family = _family(recipe.arch)
    of_ours = not is_of_library(recipe.arch)
    if of_ours and not other_numbers and family != _family(paper.arch):
        notes.append(
            f"! {recipe.arch} trains by the paper's numbers for {FAMILIES[_family(paper.arch)]}; "
            f"those for {FAMILIES[family]} come with {SCRIPTS[family]}"
        )
    usual = USUAL.get(recipe.optimizer, math.inf)
    if recipe.lr >= 10 * usual:
        notes.append(
            f"! a learning rate of {recipe.lr:g} is one for SGD: for {recipe.optimizer} rates near "
            f"{usual:g} are usual; give --lr"
        )
    if recipe.schedule == "step" and recipe.lr_step >= recipe.epochs:
        notes.append(
            f"! the learning rate falls every {counted(recipe.lr_step, 'epoch')} and the run has "
            f"{recipe.epochs}: it never falls; give --lr-step, or --schedule cosine"
        )
    if recipe.warmup_epochs > recipe.epochs:
        notes.append(
            f"! the warm-up takes {counted(recipe.warmup_epochs, 'epoch', 'g')} and the run has "
            f"{recipe.epochs}: the learning rate never reaches {recipe.lr:g}"
        )
    return tuple(notes)


def _family(arch: str) -> str:
    return "mobilenet" if "mobilenet" in arch else "resnet"


def named_recipe(recipe: Recipe, name: str | None, demo: Mapping[str, Any]) -> Recipe:
    """Returns a script's recipe with the values of the one that --recipe names.

    Args:
        recipe: the script's.
        name: as `recipe_name` returns it; None for the paper's.
        demo: what demo data needs otherwise; the values of a file go before these.

    Raises:
        UserError: see `read_recipe`.
    """
    if name is None or name in RECIPES:
        values = RECIPES[name or PAPER]
        if values.get("optimizer", "sgd") != "sgd":  # a demo's rates are SGD's
            demo = {k: v for k, v in demo.items() if k not in ("lr", "weight_decay")}
        return recipe.override(**values).override(**demo)
    return recipe.override(**demo).override(**read_recipe(name))


def read_recipe(file: str) -> dict[str, Any]:
    """Returns the fields of a recipe that a JSON file holds, or of the one in a run's args.json.

    Raises:
        UserError: no such file, no recipe in it, an unknown field, or a value that the field's flag
            would refuse.
    """
    values = read_json(file, RECIPE_FILE)
    if isinstance(values, dict) and isinstance(values.get("recipe"), dict):
        values = values["recipe"]
    if not isinstance(values, dict) or not values:
        raise UserError(f"{printable(file)}: holds no recipe; give {RECIPE_FILE}")
    flags = flags_of(Recipe)
    for name, value in values.items():
        if name not in flags:
            hint = did_you_mean(name, list(flags)) or f"; give {RECIPE_FILE}"
            raise UserError(
                f"{printable(file)}: a recipe has no field {printable(name)}{printable(hint)}"
            )
        if not flags[name].takes(value):
            raise UserError(
                f"{printable(file)}: {name} is {printable(repr(value))[:60]}, which "
                f"{flags[name].name} does not take"
            )
    kinds = {item.name: item.type for item in fields(Recipe)}
    return {name: float(v) if kinds[name] is float else v for name, v in values.items()}


def other_values(name: str | None, recipe: Recipe, typed: Mapping[str, Any]) -> list[str]:
    """Returns a line on values of a recipe's file that a resumed run does not take.

    Args:
        name: --recipe.
        recipe: with which the run goes on: its own, with the flags that were typed.

    Raises:
        UserError: see `read_recipe`.
    """
    if name is None or name in RECIPES:
        return []
    now = read_recipe(name)
    other = [k for k in now if getattr(recipe, k) != now[k] and k not in typed]
    if not other:
        return []
    theirs = ", ".join(f"{k} {now[k]}" for k in other)
    own = ", ".join(f"{k} {getattr(recipe, k)}" for k in other)
    return [
        f"! {printable(name)} holds {printable(theirs)}, and the run goes on with its own {own}: "
        "give flags to change single values"
    ]
