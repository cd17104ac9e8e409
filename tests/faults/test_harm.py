"""Harm done to running processes: each run ends with a line and leaves no process and no loss.

All of it is real: signals, kills, hung workers; full disks and the like are in test_harm_limits.py.
`make test-slow`.
"""

import json
import os
import re
import signal
import time

import pytest
from helpers.small_runs import LONG, PATIENCE, SMALL, Running, all_gone, progress
from helpers.trees import ROOT

from utils.runs import checkpoint

pytestmark = pytest.mark.faults


def assert_steps(lines: list[str], done: dict, epochs: int) -> None:
    """With -p 1: that a run of `epochs` begins behind `done`, and not anew."""
    shown = [
        tuple(map(int, re.match(r"epoch (\d+)/\d+  step (\d)/4", line).groups()))
        for line in lines
        if "  step " in line and " val  step " not in line
    ]
    every = [(epoch + 1, step + 1) for epoch in range(epochs) for step in range(4)]
    assert shown == every[4 * done["epoch"] + done["step"] :]


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGHUP, 143), (signal.SIGINT, 130)],
)
def test_a_signal_saves_at_the_next_step(start, tree, tmp_path, signum, code):
    """The whole process group gets it, workers included, as a scheduler or a terminal sends it."""
    running = start(*LONG, "-j", 1, "--output", "run", tree)
    running.wait_for("epoch 2/500  step 2/4")
    workers = running.children()
    assert workers
    os.killpg(running.process.pid, signum)
    ended, out, err = running.end()
    assert (ended, err) == (code, [])
    told = re.fullmatch(r"asked to stop: saved in epoch (\d+) after step (\d); go on with", out[-2])
    assert out[-1] == f"  python {ROOT / 'main.py'} --resume run/last.pth"
    saved = progress(tmp_path / "run")
    assert (saved["epoch"] + 1, saved["step"]) == tuple(map(int, told.groups()))
    assert all_gone(workers)

    # The line it printed goes on from there.
    epochs = int(told[1]) + 1
    again = start(*out[-1].split()[2:], "--epochs", epochs)
    ended, out, err = again.end()
    assert (ended, err) == (0, [])
    assert_steps(out, saved, epochs)
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == list(range(1, epochs + 1))


def test_a_folder_renamed_under_a_run_is_never_shared(start, tree, tmp_path):
    """A second run starts under the old name: each run's files stay of that run alone."""
    first = start(*LONG, "--output", "run", tree)
    first.wait_for("epoch 2/500  step 1/4")
    (tmp_path / "run").rename(tmp_path / "moved")
    second = start(*SMALL, "--seed", 2, "--epochs", 1, "--output", "run", tree)
    code, _, err = first.end()
    assert (code, len(err)) == (1, 1)
    assert err[0].startswith("error: run: is no longer the folder in which this run began (it was")
    assert second.end()[0] == 0
    for name, seed in (("moved", 1), ("run", 2)):
        folder = tmp_path / name
        held = [checkpoint.load(path)["seed"] for path in folder.glob("*.pth")]
        held.append(json.loads((folder / "args.json").read_text())["seed"])
        assert held == [seed] * len(held)
        assert len(held) == 4  # last, previous, best, args.json
        assert len(list(folder.glob("events*"))) == 1
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 2
    done = progress(tmp_path / "moved")["epoch"]
    again = start("--resume", "auto", "--output", "moved", "--epochs", done + 1)
    assert again.end()[0] == 0


def test_a_signal_during_evaluation_loses_no_epoch(start, tree, tmp_path):
    slow = start(
        *SMALL, "-b", 1, "--img-size", 64, "--epochs", 500, "-p", 8, "--output", "run", tree
    )
    slow.wait_for("epoch 1/500  step 24/24")  # evaluation of 15 images one by one comes now
    slow.process.send_signal(signal.SIGTERM)
    code, _, _ = slow.end()
    assert code == 143
    saved = progress(tmp_path / "run")
    assert (saved["epoch"], saved["step"]) in ((0, 24), (1, 1))  # in it, or just behind
    again = start("--resume", "auto", "--output", "run", "--epochs", 1)
    assert again.end()[0] == 0
    assert progress(tmp_path / "run")["epoch"] >= 1


def test_kill_9_and_resume_auto(start, tree, tmp_path):
    """The operating system's kill alone; test_kill_and_resume.py compares what comes of it."""
    running = start(*LONG, "-j", 2, "--save-every", 1, "--output", "run", tree)
    running.wait_for("epoch 2/500  step 2/4")
    workers = running.children()
    assert len(workers) >= 2
    running.process.kill()
    assert running.end()[0] == -signal.SIGKILL
    assert all_gone(workers)
    saved = progress(tmp_path / "run")
    again = start("--resume", "auto", "--output", "run")
    again.wait_for(f"epoch {saved['epoch'] + 1}/500  step {saved['step'] + 1}/4")
    out = again.out.read_text()
    assert out.startswith("resuming run/last.pth\n")
    assert "epoch 1/500  step" not in out


def test_a_killed_worker(start, tree, tmp_path):
    running = start(*LONG, "-j", 2, "--save-every", 1, "--output", "run", tree)
    running.wait_for("epoch 2/500  step 1/4")
    workers = running.children()
    os.kill(workers[0], signal.SIGKILL)
    code, _, err = running.end()
    assert code == 1
    assert err == [
        "error: a loader worker was killed by SIGKILL (out of memory?): use fewer "
        "workers (-j) or a smaller batch; start again (a run: with --resume auto)"
    ]
    assert all_gone(workers)
    assert progress(tmp_path / "run")["epoch"] >= 1


# A disk that stops answering: from the moment that the file exists, every read waits for ever.
HANGING = """
import os, sys, time
sys.path.insert(0, {root!r})
sys.argv = ["main.py", *sys.argv[1:]]
from utils.data import loader as data
read = data.read_image
def read_image(*arguments):
    while os.path.exists({mark!r}):
        time.sleep(0.1)
    return read(*arguments)
data.read_image = read_image
import main
main.run_script(main.main, main.SMALLER)
"""


def start_hanging(tree, tmp_path, *flags) -> tuple[Running, list[int]]:
    """A run whose workers all hang, and their process ids."""
    code = HANGING.format(root=str(ROOT), mark=str(tmp_path / "hang"))
    running = Running(tmp_path, "-c", code, *LONG, *flags, "--output", "run", tree)
    running.wait_for("epoch 2/500  step 1/4")
    workers = running.children()
    assert len(workers) == 4  # two read for training, two for validation
    (tmp_path / "hang").touch()
    return running, workers


def test_hung_workers(tree, tmp_path):
    running, workers = start_hanging(tree, tmp_path, "-j", 2, "--worker-timeout", 20)
    code, _, err = running.end()
    assert code == 1
    assert err == [
        "error: no batch from the loader workers for 20 s: they hang (slow or stuck "
        "storage?); raise --worker-timeout or use fewer workers (-j)"
    ]
    assert all_gone(workers)


def test_hung_workers_go_with_a_killed_run(tree, tmp_path):
    running, workers = start_hanging(tree, tmp_path, "-j", 2)
    running.process.kill()
    running.end()
    assert all_gone(workers)


def test_torchrun_asked_to_stop_saves_once(start, tree, tmp_path):
    """The launcher passes SIGTERM on; its own lines and exit code (1) are not ours to choose."""
    running = start(*LONG, "--output", "run", tree, ranks=2)
    running.wait_for("epoch 2/500  step 2/4")
    ranks = running.children()
    running.process.send_signal(signal.SIGTERM)
    _, out, _ = running.end()
    told = re.fullmatch(r"asked to stop: saved in epoch (\d+) after step (\d); go on with", out[-2])
    assert out[-1] == f"  torchrun --nproc-per-node=2 {ROOT / 'main.py'} --resume run/last.pth"
    saved = progress(tmp_path / "run")
    assert (saved["epoch"] + 1, saved["step"]) == tuple(map(int, told.groups()))
    assert all_gone(ranks)
    again = start(*out[-1].split()[3:], "--epochs", int(told[1]) + 1, ranks=2)
    code, out, err = again.end()
    assert code == 0, err
    epochs = int(told[1]) + 1
    assert_steps(out, saved, epochs)
    assert any(line.startswith(f"epoch {epochs}/{epochs}  train loss") for line in out)


def test_every_rank_exits_143_on_sigusr1(start, tree):
    """Sent to the ranks: the launcher itself does not know SIGUSR1 unless it is told to."""
    running = start(*LONG, "--output", "run", tree, ranks=2)
    running.wait_for("epoch 2/500  step 2/4")
    for rank in running.children():
        os.kill(rank, signal.SIGUSR1)
    _, out, err = running.end()
    assert out[-1] == f"  torchrun --nproc-per-node=2 {ROOT / 'main.py'} --resume run/last.pth"
    assert any("exitcode: 143" in line for line in err)


def test_a_killed_rank(start, tree, tmp_path):
    running = start(*LONG, "--save-every", 1, "--output", "run", tree, ranks=2)
    running.wait_for("epoch 2/500  step 2/4")
    ranks = running.children()
    os.kill(ranks[1], signal.SIGKILL)
    code, _, err = running.end()
    assert code == 1
    assert (
        "error (rank 0): another process of this run ended or hangs (its own lines say why); "
        "nothing saved is lost: start again (a run: with --resume auto)"
    ) in err
    assert all_gone(ranks)
    saved = progress(tmp_path / "run")
    assert (saved["epoch"], saved["step"]) >= (1, 0)


@pytest.mark.parametrize("seconds", [0, 2, 4, 6, 8])
def test_ranks_end_with_a_launcher_killed_in_the_first_seconds(start, tree, seconds):
    """They would wait for each other for 30 minutes: the store that they meet in is gone."""
    running = start(*LONG, "--output", "run", tree, ranks=2)
    end = time.monotonic() + PATIENCE
    while len(ranks := running.children()) < 2:
        assert time.monotonic() < end
        time.sleep(0.02)
    time.sleep(seconds)
    running.process.kill()
    running.process.wait(PATIENCE)
    assert all_gone(ranks, within=PATIENCE)
