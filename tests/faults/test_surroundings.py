"""Surroundings that a script does not choose: locale, limits, Python's flags, names of files."""

import json
import os
import shutil

import pytest
from helpers.small_runs import SMALL, shell
from helpers.trees import ROOT

from utils.runs import checkpoint

pytestmark = pytest.mark.faults

TRAIN = f"$PY main.py {' '.join(map(str, SMALL))} --epochs 1 --output run"


@pytest.mark.parametrize(("limit", "workers"), [(10, 0), (20, 2), (30, 2)])
def test_few_open_files(tree, tmp_path, limit, workers):
    done = shell(tmp_path, f"ulimit -n {limit}; {TRAIN} -j {workers} {tree}")
    if done.returncode == 0:  # enough
        assert done.stderr == ""
        return
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "raise the limit (ulimit -n)" in done.stderr


def test_a_low_soft_limit_is_raised(tree, tmp_path):
    done = shell(tmp_path, f"ulimit -Sn 20; {TRAIN} -j 2 {tree}")
    assert (done.returncode, done.stderr) == (0, "")


def test_optimised_python(run_folder, tree, tmp_path):
    """Docstrings are gone, and with them the assertions."""
    for line in ("main.py -h", "light_main.py -h", "detect_main.py -h", "predict.py -h"):
        assert shell(tmp_path, f"$PY {line}", PYTHONOPTIMIZE="2").returncode == 0
    done = shell(tmp_path, f"{TRAIN.replace('run', 'new')} {tree}", PYTHONOPTIMIZE="2")
    assert (done.returncode, done.stderr) == (0, "")
    for line in ("paras_flops.py -a eca_resnet18", f"predict.py new/best.pth {tree}/val"):
        plain, optimised = (shell(tmp_path, f"$PY {line}", PYTHONOPTIMIZE=o) for o in ("", "2"))
        assert (optimised.returncode, optimised.stdout) == (0, plain.stdout)
    names = ("make_shards", "check_images", "compare_runs", "study")
    for name in names:
        done = shell(ROOT, f"{os.sys.executable} -OO -m tools.{name} -h")
        assert done.returncode == 0


def test_a_locale_of_ascii(tree, tmp_path):
    data = shutil.copytree(tree, tmp_path / "data")
    for part in ("train", "val"):
        (data / part / "a").rename(data / part / "Käfer-虫")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    done = shell(tmp_path, f"{TRAIN} data", **ascii_only)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Käfer-虫" in checkpoint.load(tmp_path / "run" / "best.pth")["classes"]
    line = "$PY predict.py run/best.pth data/val --output seen"
    done = shell(tmp_path, line, **ascii_only)
    assert done.returncode == 0
    assert r"K\xe4fer-\u866b" in done.stdout
    done = shell(tmp_path, "$PY main.py -e --resume run/best.pth --output judged data")
    assert (done.returncode, done.stderr) == (0, "")  # the class has the same name elsewhere
    assert json.loads((tmp_path / "judged" / "evaluation.json").read_text(encoding="utf-8"))
    assert "Käfer-虫" in (tmp_path / "seen" / "predictions.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize("backend", ["TkAgg", "nonsense"])
def test_any_backend_of_matplotlib(tree, tmp_path, backend):
    train = TRAIN.replace("mobilenetv2", "eca_mobilenetv2")
    for line in (
        f"{train} {tree}",
        f"$PY predict.py run/best.pth {tree}/val --output seen",
        f"$PY visualize_attention.py run/best.pth {tree}/val --output attention",
    ):
        done = shell(tmp_path, line, MPLBACKEND=backend)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "curves.png").exists()
    assert list((tmp_path / "attention").glob("*.png"))
