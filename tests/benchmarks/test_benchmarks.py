"""Each benchmark runs, and writes rows of the agreed form; what they measure is not tested."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from utils.system.errors import UserError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
COLUMNS = {"benchmark", "variant", "baseline", "device", "dtype", "batch"}
COLUMNS |= {"ratio_min", "ratio_median", "ratio_max"}


def run(script, *flags):
    command = [sys.executable, str(BENCHMARKS / script), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["train_step", "inference", "tail", "memory", "data_loading"])
def test_smoke(name, tmp_path):
    to = tmp_path / "new" / "rows.json"
    done = run(f"{name}.py", "--smoke", "--device", "cpu", "--json", to)
    assert done.returncode == 0, done.stderr
    rows = json.loads(to.read_text())
    assert rows
    for row in rows:
        assert row.keys() >= COLUMNS
        assert row["benchmark"] == name
        assert row["batch"] == 2
        assert row["variant"] != row["baseline"] or name == "memory"
        assert 0 < row["ratio_min"] <= row["ratio_median"] <= row["ratio_max"] < math.inf
    assert any(("ours" if name == "data_loading" else "ECA") in row["variant"] for row in rows)
    assert rows[0]["variant"] in done.stdout


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--device", "cpu:x"), "--device cpu:x: not a device; try cpu, cuda,"),
        (("--device", "mps"), "--device mps is not cpu or cuda"),
        (("--json", "."), r"--json \.: Is a directory; give another file"),
        (("--json", f"{__file__}/x"), "test_benchmarks.py/x: File exists; give another file"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_measured(monkeypatch, flags, said):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import side_by_side as side

    parser = side.make_parser("", batch=(1, 1), rounds=1)
    with pytest.raises(UserError, match=said):
        side.settle(parser.parse_args(flags))


FAULTS = """
import resource, sys
from pathlib import Path
sys.path[:0] = {paths!r}
import torch

def faults_of_a_step(to):
    def step():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(20_000_000)
        to.write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))
    return step

if __name__ == "__main__":
    import side_by_side as side
    if not side.keeps_memory(torch.device("cpu")):
        sys.exit(77)
    here, there = Path("here"), Path("there")
    steps = faults_of_a_step(here), side.AsItIs(faults_of_a_step, there)
    for _ in range(10):
        for step in steps:
            step()
"""


def test_the_other_process_leaves_the_allocator_as_it_is(tmp_path):
    script = tmp_path / "faults.py"
    script.write_text(FAULTS.format(paths=[str(BENCHMARKS), str(BENCHMARKS.parent)]))
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("this allocator has no such settings")
    assert done.returncode == 0, done.stderr
    here, there = (int((tmp_path / name).read_text()) for name in ("here", "there"))
    assert there > 3 * max(here, 1000)


def test_textbook_networks_are_ours():
    """The same function under other names, or the comparison would not be of like with like."""
    import torch

    import models

    sys.path.insert(0, str(BENCHMARKS))
    try:
        import textbook
    finally:
        sys.path.remove(str(BENCHMARKS))
    x = torch.randn(2, 3, 64, 64)
    pairs = {
        "eca_resnet18": textbook.eca_resnet(18),
        "se_resnet18": textbook.se_resnet(18),
        "eca_mobilenetv2": textbook.eca_mobilenetv2(),
        "mobilenetv2": textbook.plain_mobilenetv2(),
    }
    for name, theirs in pairs.items():
        ours = models.create_model(name)
        state = dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True))
        ours.load_state_dict(state)
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    ours, theirs = models.create_model("eca_resnet18"), textbook.timm_eca_resnet(18)
    if theirs is not None:  # it chooses kernel sizes by the block's width: a few weights' odds
        count, timms = (sum(p.numel() for p in n.parameters()) for n in (ours, theirs))
        assert abs(count - timms) < 50


def test_deployment_compares_every_engine_with_the_textbook_form(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    to = tmp_path / "rows.json"
    done = run("deployment.py", "--smoke", "--out", to)
    assert done.returncode == 0, done.stderr
    rows = json.loads(to.read_text())
    base, plain = "textbook, eager", "plain network, OpenVINO float32"
    engines = ["onnxruntime float32", "onnxruntime int8", "OpenVINO float32", "OpenVINO int8"]
    pairs = [(name, base) for name in ("ours, --fast", *engines)]
    pairs += [(engines[1], engines[0]), (engines[3], engines[2]), (engines[2], plain)]
    for batch in (1, 2):
        found = [row for row in rows if row["batch"] == batch]
        assert [(row["variant"], row["baseline"]) for row in found] == pairs
    for row in rows:
        assert row.keys() >= COLUMNS
        assert row["dtype"] == ("int8" if row["variant"].endswith("int8") else "float32")
        assert row["dtype"] == "int8" or row["logits_off"] < 1e-4
        assert row["startup_seconds"] > 0
        assert 20 < row["peak_mebibytes"] < 10_000
    assert "int8: calibrated on 4 random images" in done.stdout
    assert "ECA over plain in OpenVINO's float32" in done.stdout
    assert "the figures mean nothing" in done.stdout


def test_deployment_leaves_out_what_is_not_installed(monkeypatch, tmp_path, capsys):
    from argparse import Namespace

    import models

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import deployment

    monkeypatch.setattr(deployment, "find_spec", lambda name: None)
    args = Namespace(no_compile=False, smoke=True, images=None)
    network = models.create_model("eca_mobilenetv2", num_classes=3).eval()
    made = deployment.prepare(network, 32, 0.875, args, tmp_path)
    assert list(made) == ["textbook, eager", "ours, --fast"]
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(
        "onnxruntime is left out: onnx, onnxscript, onnxruntime not installed"
    )
    assert said[1].startswith("openvino is left out: ")
    # No textbook form of other kernel sizes, or of another attention.
    for arch, others in (("eca_resnet18", {"ksize": "3333"}), ("se_resnet18", {})):
        network = models.create_model(arch, num_classes=3, **others)
        assert deployment.base_engine(network) == "eager"


def test_deployment_calibrates_on_a_users_images(monkeypatch, photos, capsys):
    from argparse import Namespace

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import deployment

    args = Namespace(smoke=True, images=str(photos / "cat"))
    (batch,) = deployment.calibration_images(args, 32, 0.875)
    assert batch.shape == (2, 3, 32, 32)
    assert capsys.readouterr().out.startswith("int8: calibrated on 2 images of ")
    args.images = str(photos)
    with pytest.raises(UserError, match=r"bad\.png: not an image"):
        deployment.calibration_images(args, 32, 0.875)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


def test_every_step_of_make_gpu_runs_on_a_cpu(tmp_path):
    """The kernels' tests, kills, two ranks, and every benchmark with its rows."""
    pytest.importorskip("triton")
    to = tmp_path / "gpu.json"
    done = run("gpu.py", "--device", "cpu", "--smoke", "--json", to)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(to.read_text())
    assert [step["failed"] for step in report["steps"]] == [None] * 9
    said = {step["step"]: " ".join(step["said"]) for step in report["steps"]}
    assert "passed" in said["tests"]
    assert "equal" in said["kill and resume"]
    assert "2 processes (DistributedDataParallel)" in said["DistributedDataParallel, 2 ranks"]
    names = {"train_step", "tail", "tail --table", "memory", "inference", "deployment"}
    assert {row["benchmark"] for row in report["rows"]} == names
    shown = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    for words in ("training step", "inference", "ends of ResNet-50's", "memory", "the slowest of"):
        assert any(words in line for line in shown), words
    assert all(line.count("|") == 5 for line in shown)
    assert done.stdout.endswith("all steps passed\n")


ROW = {"dtype": "bfloat16", "batch": 256, "ratio_median": 0.979, "network": "resnet50"}


def test_rows_for_the_page_say_what_was_met(gpu):
    step = {"benchmark": "train_step", "variant": "ours, ECA, bfloat16"}
    step |= {"baseline": "torchvision's plain, bfloat16", "images_per_second": 2345.6}
    memory = {"benchmark": "memory", "variant": "our ECA-ResNet-50", "what": "peak"}
    memory |= {"baseline": "torchvision's ResNet-50", "network": None}
    others = {**step, "baseline": "textbook ECA, float32 NCHW"}
    ends = [
        {"benchmark": "tail --table", "variant": "x", "baseline": "y", "ratio_median": r}
        for r in (1.2, 0.98)
    ]
    rows = [ROW | row for row in (step, others, memory, *ends)]
    assert gpu.performance_rows(rows, "GPU") == [
        "| GPU, bfloat16, resnet50, batch 256: training step, speed over torchvision's plain "
        "| ≥ 0.98 | 0.979, 2,346 images/s | missed |",
        "| GPU, bfloat16, peak, batch 256: memory of a step over torchvision's ResNet-50 "
        "| ≤ 1.005 | 0.979 | met |",
        "| GPU: the slowest of 2 ends of blocks over its modules | ≥ 0.98 | 0.980 | met |",
    ]


@pytest.mark.parametrize(
    ("code", "says", "limit", "failed"),
    [
        ("print('3 passed')", r"\d passed", 9, None),
        ("print('5 skipped')", r"\d passed", 9, r"exit code 0, but its output has nothing like"),
        ("import sys; sys.exit('no such thing')", "", 9, "exit code 1: no such thing"),
        ("print('done: 1'); raise SystemExit(3)", "done: .*", 9, "exit code 3: done: 1"),
        ("import time; time.sleep(60)", "", 1, "took more than 1 s"),
        ("", "", 0, "not run: the 10 minutes were over"),
    ],
)
def test_a_step_that_fails_says_why(gpu, tmp_path, code, says, limit, failed):
    done = gpu.run(gpu.Step("a", ("-c", code), says), limit, tmp_path)
    if failed is None:
        assert (done["failed"], done["said"]) == (None, ["3 passed"])
    else:
        assert done["failed"].startswith(failed)


def test_one_failed_step_ends_make_gpu_with_code_1_and_the_others_run(
    gpu, monkeypatch, tmp_path, capsys
):
    write = "from pathlib import Path; Path('rows.json').write_text('[]'); Path('no.json').touch()"
    steps = [gpu.Step("broken", ("-c", "1 / 0")), gpu.Step("whole", ("-c", write))]
    monkeypatch.setattr(gpu, "steps", lambda *_: steps)
    to = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--smoke", "--json", str(to)])
    assert gpu.main() == 1
    report = json.loads(to.read_text())
    assert [bool(step["failed"]) for step in report["steps"]] == [True, False]
    assert "ZeroDivisionError" in report["steps"][0]["log"]
    assert capsys.readouterr().out.endswith("failed: broken\n")


def test_without_a_gpu_make_gpu_says_what_there_is(gpu, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu"])
    with pytest.raises(UserError, match="no CUDA device; --device cpu --smoke runs every step"):
        gpu.main()
