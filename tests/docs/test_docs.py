"""Every command and every Python block of the documents runs, and prints what they show."""

import os
import shutil
import socket
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.documents import (
    COMMAND,
    Reached,
    begins,
    blocks,
    check,
    command_lines,
    pattern,
    printed,
    run,
    script_lines,
    stop_at,
    within,
)
from helpers.tiny_runs import RUN
from PIL import Image

import detect_main
import main
import models
from assembly import detector
from models import weights
from models.detection.detectors import create_detector, describe_detector
from tools import ablation
from utils.data import demo_digits, demo_sets
from utils.options.parser import Parser
from utils.runs import checkpoint
from utils.runs.resume import Start
from utils.system.distributed import Context

ROOT = Path(__file__).resolve().parents[2]
SHORT = {"--epochs 6": "--epochs 1"}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


# A document, and what is written instead of its words so that it takes seconds. To add one: a line
# here, and in `workspace` whatever its commands find in a reader's folder.
DOCUMENTS = {
    "docs/PREDICT.md": {**SHORT, "[359]/0[0-2]*.png": "5/00*.png"},
    "docs/DEPLOYMENT.md": {
        "--epochs 3": "--epochs 1",
        "--int8 demo:digits": "--int8 demo:digits --max-drop 100",
        "python benchmarks/deployment.py --checkpoint runs/eca_resnet18-1/best.pth "
        "--images demo_data/digits/val --out rows.json": "",  # test_benchmarks.py
    },
    "docs/REPORTS.md": {"--epochs 2": "--epochs 1"},
    "docs/ECA_ANYWHERE.md": SHORT,
    "docs/ECOSYSTEM.md": {},
    "docs/ROBUSTNESS.md": SHORT,
    "docs/FINE_TUNING.md": {
        **SHORT,
        "epochs: int = 10": "epochs: int = 1",
        "[fine_tune(lr_of, seed) for seed in (1, 2, 3)]": "[fine_tune(lr_of, 1)] * 3",
    },
    "docs/SCALING.md": {  # what takes several nodes: test_nodes.py
        **SHORT,
        **{
            f"torchrun --nnodes=2 --node-rank={rank} --master-addr=HEAD --master-port=29500 "
            "--nproc-per-node=8 main.py -a eca_resnet50 DATA": ""
            for rank in (0, 1)
        },
        "demo:digits --epochs 1": "DATA -a eca_resnet50",
        " DATA": " demo_data/digits",
        "s3://bucket/imagenet": "file://shards",
        "--nproc-per-node=8": "--nproc-per-node=1",  # two: the agents below, and test_torchrun.py
        "29511": free_port(),
        "-b 1024": "-b 16",
        "-j 16": "-j 2",
        "-a eca_resnet50": "-a eca_resnet18 --img-size 32 --epochs 1 -j 0 -b 32",
    },
}


@pytest.fixture(scope="module")
def few_digits(tmp_path_factory):
    """The demo's tree with a twentieth of its images: those whose names the documents have."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("home")
    demo_digits.write_digits(folder / "digits")
    for part in ("train", "val"):
        for place in (folder / "digits" / part).iterdir():
            files = sorted(place.iterdir())
            kept = [file for file in files if file.name < "03"] if part == "val" else files[:7]
            for file in set(files) - set(kept):
                file.unlink()
    return folder


@pytest.fixture
def workspace(tmp_path, few_digits, monkeypatch):
    """The folder that a reader is in: the repository, the demo's data, images and a detector."""
    for source in (*ROOT.glob("*.py"), ROOT / "Makefile", ROOT / "utils", ROOT / "models"):
        (tmp_path / source.name).symlink_to(source)
    shutil.copytree(few_digits, tmp_path / "demo_data")
    monkeypatch.setattr(demo_sets, "HOME", Path("demo_data"))
    photos = tmp_path / "demo_data" / "shapes" / "val2017"
    photos.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(pixels).resize((80, 60)).save(photos / "000001.png")

    torch.manual_seed(0)
    settings = {"min_size": 64, "max_size": 96, "box_score_thresh": 0.3}
    network = create_detector("mask_rcnn", "resnet18", num_classes=3, norm="bn", **settings)
    state = {**describe_detector(network), "classes": ["ant", "bee"], "category_ids": [1, 2]}
    path = tmp_path / "runs" / "mask_rcnn_eca_resnet18_demo-1" / "best.pth"
    path.parent.mkdir(parents=True)
    checkpoint.save(path, {**state, "state_dict": network.state_dict()})

    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)  # activated
    deterministic, precision = (
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
    )
    yield tmp_path
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_runs_and_prints_what_it_shows(name, workspace):
    found = blocks((ROOT / name).read_text())
    assert found
    names = {"__name__": "document"}
    with within(workspace):
        for block in found:
            check(block, run(block, ROOT, names, DOCUMENTS[name]))


def write_shapes_of(network, path, **fields):
    """A checkpoint of zeros."""
    tensors = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in network.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, {**weights.describe_network(network), **fields, "state_dict": tensors})


def test_readme_s_commands_are_understood(workspace, monkeypatch):
    """Each by its own script, up to where it would begin to work; the tools' pages run them."""
    monkeypatch.setattr(Parser, "parse_args", record := Record(Parser.parse_args))
    stop_at(monkeypatch, "utils.system.distributed.setup", "utils.cost.classifier_cost.count_cost")
    with torch.device("meta"):
        networks = {
            n: models.create_model(n, num_classes=10) for n in ("eca_resnet18", "eca_resnet50")
        }
    for name, network in networks.items():
        write_shapes_of(network, workspace / f"{name}.pth")
    recipe = main.RECIPE.override(**main.DEMOS["demo:digits"]).as_dict()
    run_fields = {name: RUN[name] for name in checkpoint.RUN}
    state = run_fields | {
        "recipe": recipe,
        "args": {"data": "demo:digits"},
        "img_size": 32,
        "crop_pct": 1.0,
        "progress": {**RUN["progress"], "epoch": 8},
        "classes": list("0123456789"),
    }
    run = workspace / "runs" / "eca_resnet18_demo-1"
    for name in ("last.pth", "best.pth"):
        write_shapes_of(networks["eca_resnet18"], run / name, **state)
    (run / "args.json").write_text("{}")
    detectors = workspace / "runs"
    (detectors / "mask_rcnn_eca_resnet50-1").symlink_to("mask_rcnn_eca_resnet18_demo-1")

    targets = (ROOT / "Makefile").read_text().split(".PHONY:")[1].splitlines()[0].split()
    lines = script_lines((ROOT / "README.md").read_text())
    assert len(lines) > 10
    with within(workspace):
        for words in lines:
            if words[0] == "make":
                assert words[1] in targets, words
                continue
            name = next((w for w in words if w.startswith("eca_resnet")), "eca_resnet18")
            words = [f"{name}.pth" if word == "CKPT" else word for word in words]
            with printed() as page:
                begun = begins(words, ROOT)
            assert begun, f"{words} ended with\n{page()}"
            if "--backbone-weights" in words:  # read after the data
                given = record.last
                settings = {k: getattr(given, k) for k in ("arch", "backbone")}
                here = Context(torch.device("cpu"))
                first = detector.read_first_weights(given, {})
                with torch.device("meta"), warnings.catch_warnings(action="ignore"):
                    recipe = detect_main.RECIPE.override(**settings)
                    _, notes = detector.build_network(
                        given, recipe, Start(None, first, None), ["a"] * 90, here
                    )
                assert "Loaded" in notes[1]


def test_the_ablation_s_commands_are_understood(tmp_path, monkeypatch):
    """Those of its page, and each of main.py that they start."""
    started = []
    monkeypatch.setattr(ablation, "run_all", lambda commands, *_: started.extend(commands.values()))
    monkeypatch.setattr(ablation, "collect", lambda folders: [])
    monkeypatch.setattr(ablation, "draw", lambda *_: b"")
    stop_at(monkeypatch, "utils.system.distributed.setup")
    lines = script_lines((ROOT / "docs" / "ABLATION.md").read_text())
    with within(tmp_path), printed():
        for words in lines:
            if words[:2] == ["-m", "tools.ablation"]:
                monkeypatch.setattr(sys, "argv", words[1:])
                assert ablation.main() == 0
        assert len(started) == 27 + 7 + 6
        for command in started:
            monkeypatch.setattr(sys, "argv", command[1:])
            with pytest.raises(Reached):
                main.main()


class Record:
    """Calls a method of argparse, and keeps what it returned."""

    def __init__(self, method):
        self.method, self.last = method, None

    def __get__(self, parser, _):
        def call(*arguments):
            self.last = self.method(parser, *arguments)
            return self.last

        return call


PAGES = (*DOCUMENTS, "README.md", "docs/ABLATION.md", "docs/EVIDENCE.md")


@pytest.mark.parametrize("name", PAGES)
def test_pictures_and_links_are_there_and_lines_fit(name):
    text = (ROOT / name).read_text()
    for part in text.split("](")[1:]:
        target = part.split(")")[0].split("#")[0]
        if target and "://" not in target:
            file = (ROOT / name).parent / target
            assert file.exists(), target
            assert file.stat().st_size < 300_000
    in_block = False
    for line in text.splitlines():
        in_block ^= line.startswith("```")
        assert in_block or line.startswith(("|", "![")) or len(line) <= 120, line


def test_every_document_of_these_tools_is_checked_for_machine_paths():
    for name in PAGES:
        text = (ROOT / name).read_text()
        for word in ("/tmp/", "/home/", "/root/", os.sep + "work" + os.sep):
            assert word not in text, f"{name}: {word}"


# The reader of documents itself.

PAGE = """
Text, with `python x.py` in it.

```
python main.py a  # a comment
find . | \\
  python predict.py x
```

```text
run 1: 3.5 %
…
done (5e-07)
```

```python
print(1)
```

Not shown by the last block:

| a table |

```
train: 5 images
python in a line of output
```
"""


def test_blocks_are_found():
    first, second = blocks(PAGE)
    assert (first.kind, first.line, second.kind, second.text) == (
        "commands",
        5,
        "python",
        "print(1)\n",
    )
    assert command_lines(first.text) == ["python main.py a", "find . |    python predict.py x"]
    assert first.shown.startswith("run 1")
    assert second.shown.startswith("train")
    assert COMMAND.match("CUDA_VISIBLE_DEVICES=0,1 python main.py DATA")
    assert not COMMAND.match("train: 5 images")


@pytest.mark.parametrize(
    ("output", "fits"),
    [
        ("run 2:   99 %\ndone (1e-06)\n", True),
        ("run 2: 99 %\nand\nmuch more\ndone (0e+00)\n", True),
        ("run 2: nan %\ndone (1e-06)\n", False),
        ("run 2: 99 %\n", False),
        ("run 2: 99 %\ndone (1e-06)\nTraceback\n", False),
    ],
)
def test_outputs_may_differ_in_numbers_alone(output, fits):
    first, _ = blocks(PAGE)
    assert bool(pattern(first.shown).fullmatch(output)) is fits
    if not fits:
        with pytest.raises(AssertionError, match="line 5 shows"):
            check(first, output)
