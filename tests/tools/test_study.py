"""python -m tools.study: the small study of the Makefile, given twice; and changed plans."""

import csv
import hashlib
import shlex
import subprocess
import sys
import time

import pytest
from helpers.small_runs import all_gone, children
from helpers.study_plans import write_plan
from helpers.trees import ROOT
from PIL import Image

from tools import study
from utils.inspection.study import read_plan
from utils.system.errors import UserError


def smoke_command() -> list[str]:
    """What `make evidence-smoke` runs after the interpreter."""
    lines = (ROOT / "Makefile").read_text().splitlines()
    rule = lines.index("evidence-smoke: $(READY)")
    return shlex.split(lines[rule + 1].replace("$(RUN)", ""))


@pytest.mark.slow
def test_the_small_study_and_again(tmp_path):
    pytest.importorskip("sklearn")
    command = [sys.executable, *smoke_command(), "--output", str(tmp_path / "study")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "study" / "results"
    with open(folder / "runs.csv", newline="") as file:
        runs = list(csv.DictReader(file))
    plan = read_plan(ROOT / "tools" / "study_plans" / "smoke.json")
    (network,) = plan.networks
    by_name = {(run["variant"], float(run["rate"]), int(run["seed"])): run for run in runs}
    assert len(by_name) == len(runs)
    rates = {variant: {rate for v, rate, _ in by_name if v == variant} for variant in plan.variants}
    assert set(map(tuple, map(sorted, rates.values()))) == {plan.networks[network].rates}
    for variant in plan.variants:
        tested = [run for run in runs if run["variant"] == variant and run["test_top1"]]
        assert sorted(int(run["seed"]) for run in tested) == list(plan.seeds)
        assert len({run["rate"] for run in tested}) == 1
        assert {run["test_images"] for run in tested} == {"359"}
    needed = ("command", "commit", "device", "torch", "python", "platform", "seed")
    assert all(run[name] for run in runs for name in needed)
    assert (folder / "plan.json").read_bytes() == (
        ROOT / "tools" / "study_plans" / "smoke.json"
    ).read_bytes()
    for name in ("accuracy.png", "cost.png"):
        Image.open(folder / name).verify()
    text = (folder / "table.txt").read_text()
    assert "corrected for all 3 rows (Holm)" in text

    # Given again: nothing is trained or evaluated anew, and the same comes out.
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert again.returncode == 0, again.stderr
    assert "training: 0 of" in again.stdout
    assert "evaluating: 0 of" in again.stdout
    assert (folder / "table.txt").read_text() == text


@pytest.mark.slow
def test_a_librarys_network_with_a_users_own_layer(tmp_path, tree, monkeypatch, capsys):
    layer, out = f"{tmp_path / 'mine.py'}:Gate", tmp_path / "out"
    text = "from torch import nn\n\nclass Gate(nn.Module):\n    def __init__(self, channels):\n"
    text += "        super().__init__()\n\n    def forward(self, x):\n        return x * x\n"
    (tmp_path / "mine.py").write_text(text)
    flags = ["--epochs", "1", "-b", "4", "--img-size", "32", "--crop-pct", "1"]
    plan = write_plan(
        tmp_path / "plan.json",
        data=str(tree),
        networks={"timm:test_resnet": {"rates": [0.01], "flags": flags}},
        variants=["none", layer],
        seeds=[0],
        also_compare=[],
    )
    command = ["study", str(plan), "--output", str(out), "--attention", layer]
    monkeypatch.setattr(sys, "argv", command)
    assert study.main() == 0
    rows = csv.DictReader((out / "results" / "runs.csv").read_text().splitlines())
    hashes = {row["variant"]: row["attention_sha256"] for row in rows}
    assert hashes == {"none": "", layer: hashlib.sha256(text.encode()).hexdigest()}
    (tmp_path / "mine.py").write_text(f"{text}\n# changed")
    with pytest.raises(UserError, match=r"mine\.py:Gate has changed since .*seed0 was trained"):
        study.main()


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ([], r"m\.py:Gate is run only where it is typed"),
        (["o.py:G", "m.py:Gate"], "no such variant"),
    ],
)
def test_a_plan_runs_no_file_that_was_not_typed(tmp_path, typed, words):
    plan = write_plan(tmp_path / "a.json", variants=["none", "m.py:Gate"], also_compare=[])
    with pytest.raises(UserError, match=words):
        study.open_study(plan, str(tmp_path / "out"), typed)
    assert not (tmp_path / "out").exists()


def test_a_changed_plan_is_another_study(tmp_path):
    plan, folder = study.open_study(write_plan(tmp_path / "a.json"), str(tmp_path / "out"))
    assert study.open_study(tmp_path / "a.json", str(tmp_path / "out")) == (plan, folder)
    changed = write_plan(tmp_path / "b.json", seeds=[0, 1])
    with pytest.raises(UserError, match=r"b\.json: is not the plan that .*out was begun with"):
        study.open_study(changed, str(tmp_path / "out"))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(UserError, match="is in use"):
        study.open_study(changed, str(tmp_path / "used"))


def test_every_rate_is_tried_with_every_variant(tmp_path):
    plan = read_plan(write_plan(tmp_path / "plan.json"))
    tried = study.choosing(plan)
    assert len(set(tried)) == len(tried) == 2 * 3
    rates = {("mobilenetv2", variant): 0.05 for variant in plan.variants}
    specs = study.tested(plan, rates)
    assert [spec[1] for spec in specs[:3]] == list(plan.variants)  # seed by seed
    assert len({study.run_name(spec) for spec in (*tried, *specs)}) == 6 + 9


def test_a_failed_run_ends_the_rest_with_its_last_line(tmp_path):
    say = "import sys; print('first'); sys.exit('error: no such data')"
    commands = {tmp_path / "bad": [say], tmp_path / "long": ["import time; time.sleep(600)"]}
    with pytest.raises(UserError, match=r"bad failed \(.*bad.log\): error: no such data"):
        study.run_all(commands, 2, (sys.executable, "-c"))


def test_a_finished_run_has_a_line_without_a_terminal(tmp_path, capfd):
    study.run_all({tmp_path / "a": ["pass"], tmp_path / "b": ["pass"]}, 1, (sys.executable, "-c"))
    assert capfd.readouterr().out.splitlines() == ["1/2 a", "2/2 b"]


def test_runs_end_with_a_study_that_is_killed(tmp_path):
    """`kill -9` leaves the study no time to stop them."""
    sleep = "import time; print('on', flush=True); time.sleep(600)"
    code = (
        "import sys; from pathlib import Path; from tools.study import run_all\n"
        f"run_all({{Path({str(tmp_path / 'run')!r}): [{sleep!r}]}}, 1, (sys.executable, '-c'))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    log, end = tmp_path / "run.log", time.monotonic() + 600
    while not (log.exists() and log.read_text()) and time.monotonic() < end:
        time.sleep(0.1)
    trained = children(process.pid)
    assert trained
    process.kill()
    process.wait()
    assert all_gone(trained)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["-aeca_mobilenetv2"], "--arch"),
        (["--arch=resnet34"], "--arch"),
        (["--seed", "3"], "--seed"),
        (["--lr=1"], "--lr"),
        (["--learning-rate", "1"], "--lr"),
        (["--attention", "se_var1"], "--attention"),
        (["--ksize=3333"], "--ksize"),
        (["--no-fused", "--num-classes", "7"], "--num-classes"),
        (["-j4"], "--workers"),
        (["--", "elsewhere"], "DATA"),
    ],
)
def test_flags_with_which_a_network_would_be_compared_with_itself(tmp_path, flags, named):
    networks = {"mobilenetv2": {"rates": [0.05], "flags": ["--epochs", "1", *flags]}}
    plan = write_plan(tmp_path / "plan.json", networks=networks)
    with pytest.raises(UserError, match=f"network mobilenetv2: {named} is the study's own"):
        study.open_study(plan, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_rates_that_are_near_have_folders_of_their_own(tmp_path):
    networks = {"mobilenetv2": {"rates": [0.01, 0.0100000001], "flags": []}}
    plan = read_plan(write_plan(tmp_path / "plan.json", networks=networks))
    tried = study.choosing(plan)
    assert len({study.run_name(spec) for spec in tried}) == len(tried) == 2 * 3


def test_one_rate_is_no_choice(tmp_path):
    networks = {"mobilenetv2": {"rates": [0.01], "flags": []}}
    assert study.choosing(read_plan(write_plan(tmp_path / "plan.json", networks=networks))) == []
