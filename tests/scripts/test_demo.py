"""The demo of the README, shortened: it learns, and the fast forms of its network say the same."""

import re

import pytest

EPOCHS = 4  # of its 8
EVALUATED = re.compile(r"(\d+) images  top-1 ([\d.]+) %  top-5 [\d.]+ %  loss ([\d.]+)")


def evaluate(run, *flags):
    """Top-1 in percent and the loss on the demo's validation images."""
    which = ("-a", "eca_resnet18", "--resume", "auto", "--action", "demo")
    done = run("main.py", "-e", *which, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    images, top1, loss = EVALUATED.match(done.stdout.splitlines()[-1]).groups()
    assert images == "359"
    return float(top1), float(loss)


@pytest.mark.slow
def test_learns_digits_and_evaluates_to_the_same_in_bfloat16(run):
    flags = ("--action", "demo", "--seed", 0, "--epochs", EPOCHS)
    done = run("main.py", "demo:digits", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    top1, loss = evaluate(run)
    assert top1 > 90
    fast = evaluate(run, "--fast", "--amp", "off")
    assert abs(fast[0] - top1) < 0.2
    assert abs(fast[1] - loss) <= 2e-4
    half = evaluate(run, "--fast", "--amp", "bf16")
    assert abs(half[0] - top1) < 0.2  # no image more or less: one of 359 is 0.28
    assert abs(half[1] - loss) <= 0.01
