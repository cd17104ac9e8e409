"""A run that is killed anywhere ends bit for bit as one that was not."""

import os
import signal
import subprocess
import sys

import pytest
from helpers.coco_trees import NETWORK
from helpers.kill_driver import same, state
from helpers.small_runs import all_gone
from helpers.trees import ROOT

from utils.runs import checkpoint

KILLS = int(os.environ.get("KILLS", 24))  # of the long test
PATIENCE = 15_000 + 1200 * KILLS  # seconds, for a hang: a kill takes some seconds

pytestmark = pytest.mark.timeout(PATIENCE + 600)


def kill_and_resume(tree, tmp_path, kills: int, script: str, *flags: object) -> list[str]:
    driver = ROOT / "tests" / "helpers" / "kill_driver.py"
    words = (sys.executable, driver, script, tree, tmp_path / "runs", kills, *flags)
    done = subprocess.run(
        [*map(str, words)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    log = tmp_path / "runs" / "moments.txt"
    assert done.returncode == 0, done.stderr + log.read_text()[-3000:]
    return done.stdout.splitlines()


FLAGS = ("--img-size", 32, "-b", 8, "--min-scale", 0.5, "--epochs", 2, "--seed", 1)
FLAGS += ("--save-every", 2, "--lr", 0.01, "-p", 1)


@pytest.mark.slow
def test_three_kills(tree, tmp_path, record_property):
    """MobileNetV2 has dropout, whose chance must be the same after a resumption, too."""
    lines = kill_and_resume(tree, tmp_path, 3, "light_main.py", *FLAGS)
    record_property("kills", len(lines))
    assert len(lines) == 3
    assert all(line.endswith("equal") for line in lines)


@pytest.mark.faults
def test_many_kills(tree, tmp_path, record_property):
    lines = kill_and_resume(tree, tmp_path, KILLS, "light_main.py", *FLAGS)
    record_property("kills", len(lines))
    assert len(lines) == KILLS > 0
    assert all(line.endswith("equal") for line in lines)


@pytest.mark.faults
def test_kills_of_a_fused_resnet_in_bf16(tree, tmp_path, record_property):
    flags = (*FLAGS, "-a", "eca_resnet18", "--amp", "bf16", "--channels-last")
    lines = kill_and_resume(tree, tmp_path, 3, "main.py", *flags)
    record_property("kills", len(lines))
    assert len(lines) == 3


@pytest.mark.faults
def test_kills_with_every_part_of_the_modern_recipe(tree, tmp_path, record_property):
    flags = ("--recipe", "modern", "--warmup-epochs", 1, "--train-size", 32, "--accumulate", 2)
    flags += ("--clip-grad", 1)
    lines = kill_and_resume(tree, tmp_path, 6, "light_main.py", *FLAGS, *flags)
    record_property("kills", len(lines))
    assert len(lines) == 6


@pytest.mark.faults
def test_kills_with_the_parts_for_data_of_one_s_own(tree, tmp_path, record_property):
    """And those of A1 to A3."""
    flags = ("-a", "eca_resnet18", "--recipe", "a1", "--warmup-epochs", 1, "--drop-path", 0.3)
    flags += ("--grad-checkpointing", "--class-weights", "balanced", "--sampler", "balanced")
    flags += ("--freeze", "stages:1", "--layer-decay", 0.8, "--early-stop", 5)
    lines = kill_and_resume(tree, tmp_path, 6, "main.py", *FLAGS, *flags)
    record_property("kills", len(lines))
    assert len(lines) == 6


@pytest.mark.faults
def test_kills_of_a_detector(shapes, tmp_path, record_property):
    flags = (*NETWORK, "--batch-size", 4, "--warmup-steps", 2, "--epochs", 2, "--seed", 1)
    flags = (*flags, "--save-every", 2, "--norm", "bn")
    lines = kill_and_resume(shapes, tmp_path, 4, "detect_main.py", *flags)
    record_property("kills", len(lines))
    assert len(lines) == 4


@pytest.mark.faults
def test_killed_torchrun_resumes_as_one_run(start, run, tree, tmp_path, record_property):
    """The launcher and both ranks are killed at once, in either epoch, as when power fails."""
    flags = ("-a", "eca_resnet18", *FLAGS, "-j", 1)
    assert run("main.py", *flags, "--output", "through", tree, ranks=2).returncode == 0
    wanted = state(tmp_path / "through")
    for kill, moment in enumerate(("epoch 1/2  step 2/3", "epoch 2/2  step 1/3")):
        again = (*flags, "--resume", "auto", "--output", f"cut-{kill}", tree)
        killed = start(*again, ranks=2)
        killed.wait_for(moment)
        ranks = killed.children()
        for pid in (*ranks, killed.process.pid):
            os.kill(pid, signal.SIGKILL)
        killed.process.wait()
        assert all_gone(ranks)
        done = run("main.py", *again, ranks=2)
        assert done.returncode == 0, done.stderr
        assert f"resuming cut-{kill}/last.pth" in done.stdout
        found = state(tmp_path / f"cut-{kill}")
        for part, content in wanted.items():
            assert same(content, found[part]), (kill, part)
    record_property("kills", 2)


@pytest.mark.faults
def test_three_ranks_resume_as_one_run(run, tree, tmp_path):
    """With three, unlike two, the order in which gradients are added up shows in the sum."""
    flags = ("-a", "eca_resnet18", "--img-size", 32, "-b", 12, "-j", 0, "--seed", 1, "--lr", 0.01)
    for output, epochs in (("through", 2), ("parts", 1), ("parts", 2)):
        again = ("--epochs", epochs, "--resume", "auto", "--output", output)
        done = run("main.py", *flags, tree, *again, ranks=3)
        assert done.returncode == 0, done.stderr
    assert "resuming parts/last.pth" in done.stdout
    through, parts = (checkpoint.load(tmp_path / n / "last.pth") for n in ("through", "parts"))
    for part in ("state_dict", "optimizer", "progress", "history"):
        assert same(through[part], parts[part]), part
