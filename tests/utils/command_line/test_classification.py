"""The command lines of the training scripts: what is typed, what a run has saved, and what would
do nothing.
"""

import contextlib
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.small_epochs import begin_state, train
from helpers.tiny_runs import tiny_run
from torch import nn

import detect_main
import main
import models
from utils.command_line import classification, detection
from utils.command_line.detection import notes_on
from utils.command_line.parser import Parser, parser_of
from utils.config.classification import NetworkSettings
from utils.config.detection import DetectionConfig, DetectionRecipe, DetectorSettings
from utils.data.loader import Batch
from utils.runs import resume
from utils.runs.checkpoint import Checkpoint
from utils.system import backends, distributed
from utils.system.errors import UserError
from utils.system.faults import of_outside
from utils.training import classifier, detector
from utils.training.detector import WARMUP
from utils.training.state import NonFiniteGuard

CPU = torch.device("cpu")


def classifiers() -> Parser:
    return classification.make_parser(main.RECIPE, "")


def detectors() -> Parser:
    return parser_of(DetectionConfig.parts(), detect_main.RECIPE, "")


def going_on_with(monkeypatch, contents):
    """Every --resume leads to this run."""
    saved = Checkpoint.of(Path("last.pth"), contents)
    for name in ("read", "read_detector"):
        monkeypatch.setattr(resume, name, lambda *_: (saved, None))


def settings_of(monkeypatch, script, *flags):
    """All flags with their values, as they are after the command line is read."""
    monkeypatch.setattr(sys, "argv", ["x", *flags])
    if script is main:
        config, _ = classification.read_command_line(main.RECIPE, main.DEMOS, "")
    else:
        config, _ = detection.read_command_line(detect_main.RECIPE, "")
    return config.values()


def saved_detector(**flags):
    recipe = DetectionRecipe()
    names = {"arch": recipe.arch, "backbone": recipe.backbone, "ksize": [3, 5, 5, 7]}
    return tiny_run(**names, recipe=recipe.as_dict(), args=flags)


def saved_classifier(**flags):
    return tiny_run(args=flags)


@pytest.mark.parametrize(
    ("script", "saved", "flags"),
    [
        (main, saved_classifier, "compile channels-last skip-bad-images fused report"),
        (detect_main, saved_detector, "drop-empty channels-last fused"),
    ],
    ids=["main", "detect_main"],
)
def test_what_a_saved_run_had_on_can_be_switched_off(monkeypatch, script, saved, flags):
    on = {flag.replace("-", "_"): True for flag in flags.split()}
    going_on_with(monkeypatch, saved(data="x", **on))
    as_saved = settings_of(monkeypatch, script, "--resume", "last.pth")
    assert all(as_saved[name] is True for name in on)
    switched = settings_of(
        monkeypatch, script, "--resume", "last.pth", *(f"--no-{flag}" for flag in flags.split())
    )
    assert all(switched[name] is False for name in on)


@pytest.mark.parametrize(
    ("script", "flags", "said"),
    [
        (main, "--schedule cosine --lr-step 5", "--lr-step does nothing with --schedule cosine: l"),
        (main, "--schedule exp --lr-decay 0.9", None),
        (main, "--recipe modern --lr-decay 0.5", "--lr-decay does nothing with --schedule cosi"),
        (main, "-e --lr 0.1 --skip-bad-images", "--lr, --skip-bad-images do nothing with -e, "),
        (main, "-e -b 8 --crop-pct 1 --amp bf16 --ksize 3357", None),
        (main, "-e --fast --channels-last", "--channels-last does nothing with --fast: leave it"),
        (main, "-e --fast --no-fused", "--no-fused does nothing with --fast: leave it out"),
        (main, "--loss ce --bce-threshold 0.2", "--bce-threshold does nothing with --loss ce: l"),
        (main, "--loss bce --bce-threshold 0.2", None),
        (main, "--fast", "--fast does nothing without -e: leave it out"),
        (main, "-e --fast --fused --amp bf16 --compile", None),
        (
            detect_main,
            "--optimizer adamw --momentum 0.8",
            "--momentum does nothing with --optimizer ad",
        ),
        (detect_main, "-e --batch-size 8", "--batch-size does nothing with -e, which does not tra"),
        (detect_main, "-e --min-size 400", None),
        (detect_main, "--picture x.png", "--picture does nothing without -e: leave it out"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(monkeypatch, script, flags, said):
    for name in ("evaluate_checkpoint", "train"):
        monkeypatch.setattr(script, name, lambda *_: 0)
    for name in ("read", "read_detector"):
        monkeypatch.setattr(resume, name, lambda *_: (None, None))
    monkeypatch.setattr(sys, "argv", ["x", *flags.split(), "--device", "cpu", "DATA"])
    if said is None:
        assert script.main() == 0
    else:
        with pytest.raises(UserError, match=said):
            script.main()


def test_flags_that_a_run_has_saved_may_do_nothing(monkeypatch):
    """Such as the rule of a schedule that another one has followed."""
    run = saved_classifier(data="x", channels_last=True, skip_bad_images=True)
    run["recipe"]["lr_step"] = 5
    going_on_with(monkeypatch, run)
    resumed = "--resume", "last.pth"
    settings = settings_of(monkeypatch, main, *resumed, "--schedule", "cosine")
    assert (settings["schedule"], settings["lr_step"]) == ("cosine", 5)
    settings = settings_of(monkeypatch, main, *resumed, "-e", "--fast")
    assert settings["skip_bad_images"]


def test_fast_evaluation_reads_in_the_layout_it_works_in(monkeypatch):
    monkeypatch.setattr(resume, "read", lambda *_: (None, None))
    layouts = [
        settings_of(monkeypatch, main, *flags, "DATA")["channels_last"]
        for flags in (["-e"], ["-e", "--fast"])
    ]
    assert layouts == [False, True]


def test_a_value_comes_from_the_flag_the_run_the_recipe_or_the_default(monkeypatch, tmp_path):
    """Each before the one behind it; a file's JSON holds a whole number for 1.0, too."""
    (tmp_path / "own.json").write_text('{"lr": 1, "mixup": 0.2, "epochs": 7, "crop_pct": 0.9}')
    typed = ["--recipe", str(tmp_path / "own.json"), "--epochs", "9", "demo:digits"]
    settings = settings_of(monkeypatch, main, *typed)
    demo = main.DEMOS["demo:digits"]
    assert (settings["epochs"], settings["lr"], settings["mixup"]) == (9, 1.0, 0.2)
    assert isinstance(settings["lr"], float)
    assert (settings["img_size"], settings["arch"]) == (demo["img_size"], demo["arch"])
    assert (settings["crop_pct"], settings["momentum"]) == (0.9, main.RECIPE.momentum)
    assert (settings["workers"], settings["recipe"]) == (0, str(tmp_path / "own.json"))

    going_on_with(monkeypatch, saved_classifier(data="x", save_every=3, workers=77, amp=None))
    settings = settings_of(monkeypatch, main, "--resume", "last.pth", "--lr", "0.02")
    assert (settings["arch"], settings["epochs"], settings["lr"]) == ("mobilenetv2", 3, 0.02)
    assert (settings["save_every"], settings["amp"]) == (3, "off")
    assert settings["workers"] != 77  # a matter of the machine


@pytest.mark.parametrize("name", ["lr", "mixup", "early_stop"])
def test_a_saved_recipe_with_an_empty_field_is_refused(monkeypatch, name):
    run = saved_classifier(data="x")
    run["recipe"][name] = None
    going_on_with(monkeypatch, run)
    with pytest.raises(UserError, match=f"last.pth: the saved recipe lacks {name}; give a check"):
        settings_of(monkeypatch, main, "--resume", "last.pth")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--fused --no-compile --amp off --device cpu --no-channels-last", None),
        ("--no-fused", "--no-fused: an exported network has no blocks to take apart; leave it out"),
        ("--amp bf16", "--amp: an exported network has a precision of its own; leave it out, or"),
        ("--device cuda", "--device cuda: best.onnx is run on the CPU; leave it out, or give the"),
    ],
)
def test_flags_that_an_exported_file_has_no_use_for(flags, said):
    """Those that ask for what it does anyway may stand there."""
    typed = classifiers().typed(["-e", "--resume", "best.onnx", *flags.split()])
    with pytest.raises(UserError, match=said) if said else contextlib.nullcontext():
        classification.refuse_for_exported(typed, "best.onnx")


def test_a_flag_that_is_gone_says_what_to_use(monkeypatch, capsys):
    for script in (main, detect_main):
        with pytest.raises(SystemExit) as stopped:
            settings_of(monkeypatch, script, "--bce", "DATA")
        assert stopped.value.code == 2
        assert capsys.readouterr().err == "x: error: --bce is gone: use --loss bce\n"


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_the_report_of_block_tails_is_for_the_run_s_precision(monkeypatch, amp):
    asked = []
    monkeypatch.setattr(
        models, "describe_tails", lambda net, device, fused, dtype, *_: asked.append(dtype) or "so"
    )
    context = distributed.Context(CPU)
    for kind, settings in ((classifier, NetworkSettings), (detector, DetectorSettings)):
        lines = kind.how_it_runs(nn.Identity(), settings(amp=amp), context)
        assert lines[0].endswith("so")
    assert asked == [backends.DTYPES[amp]] * 2


def test_fp16_scales_the_loss_and_steps_as_float32_does(monkeypatch):
    """On the CPU, whose convolutions in fp16 are too slow to train a whole network here."""
    stepped = []
    for flags in ([], ["--amp", "fp16"]):
        amp = settings_of(monkeypatch, main, *flags, "DATA")["amp"]
        torch.manual_seed(0)
        network = nn.Linear(5, 3)
        state = begin_state(network, main.RECIPE, amp)
        batch = Batch(torch.randn(6, 5), torch.arange(6) % 3, ())
        autocast = partial(backends.autocast, CPU, amp)
        train(network, [batch], state=state, autocast=autocast)
        stepped.append(network.weight.detach())
        with autocast():
            assert network(batch.images).dtype == backends.DTYPES[amp]
        assert (state.scaler.get_scale() > 1) == (amp == "fp16")
    assert not torch.equal(*stepped)
    torch.testing.assert_close(*stepped, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("script", "parser"),
    [(main, classifiers()), (detect_main, detectors())],
    ids=["main", "detect"],
)
def test_remedies_are_flags_of_the_script(script, parser):
    assert "--amp" in named(script.SMALLER)
    for signal in ("Killed", "Bus error"):
        error = RuntimeError(f"DataLoader worker (pid 7) is killed by signal: {signal}.")
        said = str(of_outside(error, ""))
        assert "-j" in said
        assert named(said) <= flags_of(parser)
    assert named(script.SMALLER) <= flags_of(parser)


def test_the_remedy_for_a_loss_that_is_not_finite(monkeypatch):
    for guard, parser in (
        (NonFiniteGuard(CPU), classifiers()),
        (NonFiniteGuard(CPU, warmup_flag=WARMUP), detectors()),
    ):
        guard.first_bad = torch.tensor(3)
        with pytest.raises(UserError) as caught:
            guard.check()
        flags = named(str(caught.value))
        assert {"--lr", "--amp"} < flags <= flags_of(parser)


def named(message: str) -> set[str]:
    """The flags in a message, but for docker's."""
    return set(re.findall(r"(?<!\S)\(?(-{1,2}[a-z][a-z-]*)", message)) - {"--shm-size"}


def flags_of(parser: Parser) -> set[str]:
    return set(parser._option_string_actions)


def test_a_detector_of_small_images_hints_at_min_size():
    recipe, steps = DetectionRecipe(epochs=100), np.array([[640, 480]] * 100)
    assert notes_on(recipe, steps) == []
    small = np.array([[128, 512], [160, 128], [128, 130], [900, 900]] * 25)
    (line,) = notes_on(recipe, small)
    assert line.startswith(
        "! images with a shorter side of 128 pixels are scaled to 800: --min-size 256"
    )
    assert notes_on(recipe.override(min_size=(256, 300)), small) == []
    (line,) = notes_on(recipe.override(epochs=1), steps)
    assert line.startswith("! the warm-up takes 500 steps and the run has 12")
