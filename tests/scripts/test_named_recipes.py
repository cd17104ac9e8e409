"""The named recipes: their values, and runs with all of their parts as a user starts them."""

import json
import shutil
import sys
from dataclasses import fields

import pytest
import torch
from helpers.cut_runs import cut_twice
from helpers.kill_driver import STATE, same
from helpers.small_runs import thin_networks
from helpers.trees import ROOT

import main as script
from light_main import DEMOS as LIGHT_DEMOS
from light_main import RECIPE as LIGHT
from main import DEMOS, RECIPE
from models import weights
from utils.command_line.classification import named_recipe
from utils.config.classification import Recipe
from utils.config.recipes import MODERN, RECIPES
from utils.runs import checkpoint
from utils.training.classifier import recipe_lines

pytestmark = pytest.mark.usefixtures("thin")

SMALL = ("-a", "eca_mobilenetv2", "--img-size", 32, "-b", 8, "--lr", 0.01, "-j", 0, "--seed", 1)
PARTS = ("--label-smoothing", 0.1, "--mixup", 0.2, "--cutmix", 1, "--auto-augment", "trivial")
PARTS += ("--random-erasing", 0.5, "--ema", 0.99, "--no-norm-decay", "--repeats", 2)
PARTS += ("--accumulate", 2, "--clip-grad", 1, "--min-scale", 0.5)
# The fields of a recipe, before there was another than the paper's.
OLD_FIELDS = {"arch", "epochs", "batch_size", "lr", "momentum", "weight_decay", "schedule"}
OLD_FIELDS |= {"lr_step", "lr_decay", "warmup_epochs", "img_size", "crop_pct", "min_scale", "hflip"}


def test_the_modern_recipes_are_what_the_document_says():
    """Each number of docs/RECIPES.md's table, read from it."""
    text = (ROOT / "docs" / "RECIPES.md").read_text()
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `--")]
    table = {row[0].split("`")[1].removeprefix("--").replace("-", "_"): row[1:] for row in rows}
    recipes = [RECIPE.override(**values) for values in RECIPES.values()]
    words = {"no": 0, "yes": 1, "as evaluation": 0}
    for field, cells in table.items():
        for recipe, cell in zip(recipes, map(str.strip, cells), strict=True):
            value = getattr(recipe, field)
            if isinstance(value, str):
                assert value == cell
            else:
                assert value == pytest.approx(float(words.get(cell, cell)), rel=1e-3), field
    apart = {"arch", "lr_step", "lr_decay", "hflip", "min_scale"}  # the same in all of them
    apart |= {"interpolation", "mean", "std"}  # of the published networks
    apart |= {"sampler", "early_stop", "freeze", "layer_decay", "best_by"}  # for data of one's own
    apart |= {"val_split", "vflip", "colour"}
    assert table.keys() == {f.name for f in fields(Recipe)} - apart
    assert all(getattr(r, name) == getattr(RECIPE, name) for r in recipes for name in apart)


def test_the_paper_s_recipe_has_nothing_of_the_others():
    for recipe in (RECIPE, LIGHT):
        assert recipe.override(**RECIPES["paper"]) == recipe
        assert len(recipe_lines(recipe, "paper", False)) == 1
        modern = recipe.override(**MODERN)
        assert modern.arch == recipe.arch
        first, second = recipe_lines(modern, "modern", False)
        assert first.startswith("recipe modern: 600 epochs, batch 1024, lr 0.5 cosine, warm-up 5 e")
        assert first.endswith("176 pixels (evaluation 224)")
        assert second == (
            "  label smoothing 0.1, mixup 0.2, cutmix 1, random erasing 0.1, EMA 0.99997, "
            "TrivialAugment, no decay on norms, biases and ECA kernels, each image 4 times a batch"
        )


@pytest.mark.parametrize("name", ["modern", "a1"])
@pytest.mark.parametrize(
    ("recipe", "demo"), [(RECIPE, DEMOS["demo:digits"]), (LIGHT, LIGHT_DEMOS["demo:digits"])]
)
def test_a_demo_keeps_its_sizes_under_every_recipe(recipe, demo, name):
    found = named_recipe(recipe, name, demo)
    rates = {} if found.optimizer == "sgd" else {"lr", "weight_decay"}  # a demo's are for SGD
    kept = demo.keys() - rates
    assert {key: getattr(found, key) for key in kept} == {key: demo[key] for key in kept}
    assert all(getattr(found, key) == RECIPES[name][key] for key in rates)
    assert (found.batch_size, found.hflip) == (32, 0.0)
    assert (found.auto_augment, found.repeats, found.crop_size) == ("none", 1, found.img_size)
    assert found.mixup > 0
    assert (found.ema > 0) == name.startswith("modern")
    assert not found.norm_decay


def test_a1_is_named_by_its_numbers():
    first, second = recipe_lines(RECIPE.override(**RECIPES["a1"]), "a1", False)
    assert first == (
        "recipe a1: 600 epochs, batch 2048, lamb lr 0.005 cosine, warm-up 5 epochs, "
        "weight decay 0.01, 224 pixels"
    )
    assert second == (
        "  label smoothing 0.1, target threshold 0.2, stochastic depth 0.05, mixup 0.2, cutmix 1, "
        "binary cross-entropy, timm's rand-m7-mstd0.5-inc1, no decay on norms, biases and ECA "
        "kernels, each image 3 times a batch"
    )


def test_killed_and_stopped_by_a1_s_parts_a_run_ends_bit_for_bit(call, tree, tmp_path, monkeypatch):
    """With stochastic depth, whose chance is each step's, and a batch cut short of three copies."""
    flags = ("--recipe", "a1", *SMALL, "-a", "eca_resnet18", "--drop-path", 0.5, tree)
    saved = cut_twice(call, tmp_path, monkeypatch, *flags)
    assert saved["recipe"]["loss"] == "bce"
    assert saved["recipe"]["repeats"] == 3
    assert saved["recipe"]["auto_augment"] == "rand-m7-mstd0.5-inc1"
    assert saved["optimizer"]["param_groups"][0]["step"] == 6
    assert {"exp_avg", "exp_avg_sq"} <= saved["optimizer"]["state"][0].keys()  # lamb's


def test_killed_and_stopped_with_all_parts_a_run_ends_bit_for_bit(
    call, tree, tmp_path, monkeypatch
):
    saved = cut_twice(call, tmp_path, monkeypatch, *SMALL, *PARTS, tree)
    assert saved.keys() >= set(STATE)


@pytest.fixture(scope="module")
def finished(tree, tmp_path_factory):
    """The folder of a run of one epoch with every part. Read only: copy its files."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch, thin_networks():
        words = ("main.py", *SMALL, *PARTS, "--epochs", 1, "--output", folder, tree)
        patch.setattr(sys, "argv", list(map(str, words)))
        assert script.main() == 0
    torch.use_deterministic_algorithms(False)
    return folder


def test_what_is_saved_is_what_was_evaluated(call, finished, tree, tmp_path):
    saved = checkpoint.load(finished / "last.pth")
    assert saved["recipe"]["ema"] == 0.99
    assert saved["averaged_steps"] == 3
    assert not same(saved["state_dict"], saved["raw_state_dict"])
    code, _, err = call("-e", "--resume", finished / "last.pth", "--output", tmp_path / "result")
    assert (code, err) == (0, [])
    result = json.loads((tmp_path / "result" / "evaluation.json").read_text())
    row = saved["history"][-1]
    assert result["loss"] == pytest.approx(row["val_loss"], rel=1e-6)
    assert result["top1"] == row["val_top1"]
    network = weights.network_from_checkpoint(saved)  # as predict.py and export.py read it
    assert same(dict(network.state_dict()), saved["state_dict"])
    # Weights to start from are the averaged ones, too.
    flags = (*SMALL, "--epochs", 1, "--lr", 1e-12, "--momentum", 0, "--output", tmp_path / "next")
    code, _, err = call(*flags, "--pretrained", finished / "last.pth", tree)
    assert not err, err[0][-900:]
    assert code == 0
    found = checkpoint.load(tmp_path / "next" / "last.pth")["state_dict"]
    key = "features.0.0.weight"
    torch.testing.assert_close(found[key], saved["state_dict"][key])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--recipe", "modern"), "the run's recipe is paper: leave --recipe modern out"),
        (("--norm-decay",), "the run trains with --no-norm-decay: leave --norm-decay out"),
        (("--repeats", 4), "batches with --repeats 2: leave --repeats 4 out"),
    ],
)
def test_what_a_resumption_cannot_take_up_is_refused(call, finished, tmp_path, flags, message):
    saved = checkpoint.load(finished / "last.pth")
    saved["progress"].update(epoch=0, step=2)
    (tmp_path / "run").mkdir()
    checkpoint.save(tmp_path / "run" / "last.pth", saved)
    code, _, err = call("--resume", tmp_path / "run" / "last.pth", *flags)
    assert code == 2
    assert len(err) == 1
    assert message in err[0]


def test_a_checkpoint_from_before_the_recipes_goes_on(call, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    saved = checkpoint.load(finished / "last.pth")
    del saved["args"]["recipe"], saved["raw_state_dict"], saved["averaged_steps"]
    for part in saved["recipe"].keys() - OLD_FIELDS:
        del saved["recipe"][part]
    saved["args"] |= dict.fromkeys(OLD_FIELDS)  # flags that were not typed stood there as None
    # Its optimizer had one group, in the network's order.
    network = weights.network_from_checkpoint(saved)
    momenta = [{"momentum_buffer": torch.zeros_like(p)} for p in network.parameters()]
    saved["optimizer"]["state"] = dict(enumerate(momenta))
    checkpoint.save(tmp_path / "run" / "last.pth", saved)
    code, out, err = call("--resume", tmp_path / "run" / "last.pth", "--epochs", 2)
    assert (code, err) == (0, [])
    assert any(line.startswith("recipe: 2 epochs, batch 8") for line in out)
    after = checkpoint.load(tmp_path / "run" / "last.pth")
    assert "raw_state_dict" not in after
    assert len(after["history"]) == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--recipe", "modem"), "no recipe 'modem'; did you mean modern"),
        (("--auto-augment", "wide"), "no augmentation 'wide'; known: none, trivial, rand, or"),
        (("--auto-augment", "rand-m11-mstd0.5-inc1"), "no augmentation 'rand-m11-mstd0.5-inc1'"),
        (("--bce-threshold", 0.2), "--bce-threshold does nothing with --loss ce: leave it out"),
        (("--bce",), "--bce is gone: use --loss bce"),
        (("--repeats", 9), "--repeats 9 is more than the batch, -b 8: give at most that"),
        (("--accumulate", 5), "-b 8 on 1 device does not divide into --accumulate 5 parts"),
        (("--accumulate", 8), "leaves one image at a time per device"),
        (("--sync-bn",), "--sync-bn is for several processes on GPUs: start them with torchrun"),
    ],
)
def test_bad_values_are_answered_in_one_line(call, tree, tmp_path, flags, words):
    code, _, err = call(*SMALL, *flags, tree)
    assert code == 2
    assert len(err) == 1
    assert words in err[0]
    assert not (tmp_path / "runs").exists()
