"""The flags of the training scripts."""

import argparse
import re
import sys
from functools import partial

import pytest
import torch
from torch import nn

import detect_main
import main
import models
from assembly import classifier, detector
from models.detection.detectors import DETECTORS
from models.detection.norms import NORMS
from utils.classification.engine import StepRule, train_epoch
from utils.classification.state import first_state
from utils.data.loading import Batch
from utils.detection.state import WARMUP
from utils.options import classification, detection
from utils.options.parser import Parser
from utils.runs import resume
from utils.system import backends, distributed
from utils.system.errors import UserError
from utils.training.finite_guard import NonFiniteGuard

CPU = torch.device("cpu")


def classifiers() -> Parser:
    return classification.build_parser(main.RECIPE, models.MODELS, "")


def detectors() -> Parser:
    recipe, backbones = detect_main.RECIPE, detect_main.BACKBONES
    return detection.build_parser(recipe, list(DETECTORS), backbones, NORMS, "")


@pytest.mark.parametrize(
    ("parser", "flags"),
    [
        (classifiers(), ("compile", "channels-last", "skip-bad-images", "fused")),
        (detectors(), ("drop-empty", "channels-last", "fused")),
    ],
    ids=["main", "detect_main"],
)
def test_what_a_saved_run_had_on_can_be_switched_off(parser, flags):
    parser.set_defaults(**{flag.replace("-", "_"): True for flag in flags})
    args = parser.parse_args([f"--no-{flag}" for flag in flags])
    assert not any(getattr(args, flag.replace("-", "_")) for flag in flags)


@pytest.mark.parametrize(
    ("script", "flags", "said"),
    [
        (main, "--schedule cosine --lr-step 5", "--lr-step does nothing with the schedule cosine"),
        (main, "--schedule exp --lr-step 5", "--lr-step does nothing with the schedule exp"),
        (main, "--schedule exp --lr-decay 0.9", None),
        (main, "--recipe modern --lr-decay 0.5", "--lr-decay does nothing with the schedule cos"),
        (main, "-e --lr 0.1 --skip-bad-images", "--lr, --skip-bad-images do nothing with -e, "),
        (main, "-e --class-weights balanced --early-stop 3", "--class-weights, --early-stop do no"),
        (main, "-e -b 8 --crop-pct 1 --amp bf16 --ksize 3357", None),
        (main, "-e --fast --no-fused --channels-last", "--channels-last, --no-fused do nothing wi"),
        (main, "-e --fast --fused --amp bf16 --compile", None),
        (detect_main, "--optimizer adamw --momentum 0.8", "--momentum does nothing with adamw"),
        (detect_main, "-e --batch-size 8", "--batch-size does nothing with -e, which does not tra"),
        (detect_main, "-e --min-size 400", None),
    ],
)
def test_flags_that_would_do_nothing_are_refused(monkeypatch, script, flags, said):
    """But not those that a run has saved: these come as the parser's defaults."""
    for name in ("evaluate", "train"):
        monkeypatch.setattr(script, name, lambda *_: 0)
    for name in ("read", "read_detector"):
        monkeypatch.setattr(resume, name, lambda *_: (None, None))
    monkeypatch.setattr(sys, "argv", ["x", *flags.split(), "--device", "cpu", "DATA"])
    if said is None:
        assert script.main() == 0
    else:
        with pytest.raises(UserError, match=said):
            script.main()


def test_fast_evaluation_reads_in_the_layout_it_works_in(monkeypatch):
    given = []
    monkeypatch.setattr(main, "evaluate", lambda args, *_: given.append(args.channels_last) or 0)
    monkeypatch.setattr(resume, "read", lambda *_: (None, None))
    for flags in ("-e", "-e --fast"):
        monkeypatch.setattr(sys, "argv", ["x", *flags.split(), "--device", "cpu", "DATA"])
        assert main.main() == 0
    assert given == [False, True]


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_the_report_of_block_tails_is_for_the_run_s_precision(monkeypatch, amp):
    asked = []
    monkeypatch.setattr(
        models, "describe_tails", lambda net, device, fused, dtype, *_: asked.append(dtype) or "so"
    )
    flags = {"amp": amp, "fused": True, "compile": False, "channels_last": False, "fast": False}
    settings, context = argparse.Namespace(**flags), distributed.Context(CPU)
    for kind in (classifier, detector):
        assert kind.how_it_runs(nn.Identity(), settings, context)[0].endswith("so")
    assert asked == [backends.DTYPES[amp]] * 2


def test_fp16_scales_the_loss_and_steps_as_float32_does():
    """On the CPU, whose convolutions in fp16 are too slow to train a whole network here."""
    stepped = []
    for flags in ([], ["--amp", "fp16"]):
        amp = classifiers().parse_args(flags).amp
        torch.manual_seed(0)
        network = nn.Linear(5, 3)
        state = first_state(network, main.RECIPE, CPU, fp16=amp == "fp16")
        rule = StepRule(lambda step: 0.1, 7, partial(backends.autocast, CPU, amp))
        batch = Batch(torch.randn(6, 5), torch.arange(6) % 3, ())
        list(
            train_epoch(
                network, [batch], state.optimizer, state.scaler, state.meter, state.guard, rule, 0
            )
        )
        stepped.append(network.weight.detach())
        with rule.autocast():
            assert network(batch.images).dtype == backends.DTYPES[amp]
        assert (state.scaler.get_scale() > 1) == (amp == "fp16")
    assert not torch.equal(*stepped)
    torch.testing.assert_close(*stepped, rtol=1e-3, atol=1e-4)


KILLED = "DataLoader worker (pid 7) is killed by signal: Killed."
SHARED = "DataLoader worker (pid 7) is killed by signal: Bus error."
PEER = "[gloo] Connection closed by peer"


@pytest.mark.parametrize(
    ("script", "parser", "asked", "evaluating"),
    [
        (main, classifiers(), "-b 7:", "-b 7:"),
        (detect_main, detectors(), "--batch-size 7:", "one image at a time:"),
    ],
    ids=["main", "detect_main"],
)
@pytest.mark.parametrize("how", ["train", "evaluate"])
@pytest.mark.parametrize(
    "fault", [torch.OutOfMemoryError(), *map(RuntimeError, (KILLED, SHARED, PEER))], ids=str
)
def test_remedies_are_flags_of_the_script(
    monkeypatch, script, parser, asked, evaluating, how, fault
):
    def fail(*_):
        raise fault

    monkeypatch.setattr(script, how, fail)
    monkeypatch.setattr(resume, "read", lambda *_: (None, None))
    monkeypatch.setattr(resume, "read_detector", lambda *_: (None, None))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "tear_down", lambda: None)
    mode = ["-e"] if how == "evaluate" else []
    batch = ["--batch-size=7"] if "7" in (evaluating if mode else asked) else []
    monkeypatch.setattr(sys, "argv", ["x", *batch, "--device=cpu", *mode, "DATA"])
    with pytest.raises(UserError) as caught:
        script.main()
    said = str(caught.value)
    if isinstance(fault, torch.OutOfMemoryError):
        assert f"out of memory with {evaluating if mode else asked}" in said
    assert ("--resume auto" in said) == (not mode and "out of memory with" not in said)
    assert named(said) <= flags_of(parser)


def test_the_remedy_for_a_loss_that_is_not_finite(monkeypatch):
    for guard, parser in (
        (NonFiniteGuard(CPU), classifiers()),
        (NonFiniteGuard(CPU, WARMUP), detectors()),
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
