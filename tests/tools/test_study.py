"""python -m tools.study: the small study of the Makefile, given twice; and changed plans."""

import csv
import shlex
import subprocess
import sys

import pytest
from helpers.study_plans import write_plan
from helpers.trees import ROOT
from PIL import Image

from tools import study
from utils.study.plan import read_plan
from utils.system.errors import UserError


def smoke_command() -> list[str]:
    """What `make evidence-smoke` runs after the interpreter."""
    lines = (ROOT / "Makefile").read_text().splitlines()
    rule = lines.index("evidence-smoke: $(READY)")
    return shlex.split(lines[rule + 1].replace("$(RUN)", ""))


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
        judged = [run for run in runs if run["variant"] == variant and run["test_top1"]]
        assert sorted(int(run["seed"]) for run in judged) == list(plan.seeds)
        assert len({run["rate"] for run in judged}) == 1
        assert {run["test_images"] for run in judged} == {"359"}
    needed = ("command", "commit", "device", "torch", "python", "platform", "seed")
    assert all(run[name] for run in runs for name in needed)
    assert (folder / "plan.json").read_bytes() == (
        ROOT / "tools" / "study_plans" / "smoke.json"
    ).read_bytes()
    for name in ("accuracy.png", "cost.png"):
        Image.open(folder / name).verify()
    text = (folder / "table.txt").read_text()
    assert "corrected for all 3 rows (Holm)" in text

    # Given again: nothing is trained or judged anew, and the same comes out.
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert again.returncode == 0, again.stderr
    assert "training: 0 of" in again.stdout
    assert "judging: 0 of" in again.stdout
    assert (folder / "table.txt").read_text() == text


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
    specs = study.judged(plan, rates)
    assert [spec[1] for spec in specs[:3]] == list(plan.variants)  # seed by seed
    assert len({study.run_name(spec) for spec in (*tried, *specs)}) == 6 + 9
