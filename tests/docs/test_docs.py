"""Every command and every Python block of the documents runs, and prints what they show."""

import os
import socket
from pathlib import Path

import pytest
from helpers.documents import COMMAND, blocks, check, command_lines, pattern, run, within

ROOT = Path(__file__).resolve().parents[2]
SHORT = {"--epochs 6": "--epochs 1"}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


# A document, and what is written instead of its words so that it takes seconds. To add one: a line
# here, and in `workspace` whatever its commands find in a reader's folder.
DOCUMENTS = {
    "docs/START.md": {"--recipe finetune": "--recipe finetune --epochs 1"},
    "docs/PREDICT.md": {**SHORT, "[359]/0[0-2]*.png": "5/00*.png"},
    "docs/DEPLOYMENT.md": {
        "--epochs 3": "--epochs 1",
        "--int8 demo:digits": "--int8 demo:digits --max-drop 100",
        "python benchmarks/deployment.py --checkpoint runs/deployed/best.pth "
        "--images demo_data/digits/val --out rows.json": "",  # test_benchmarks.py
    },
    "docs/REPORTS.md": {"--epochs 2": "--epochs 1"},
    "docs/ECA_ANYWHERE.md": {
        **SHORT,
        **{
            f"python main.py {line}": ""  # these three: test_any_network.py
            for line in (
                "-a timm:resnext50_32x4d --attention eca --pretrained "
                "timm:resnext50_32x4d.a1_in1k DATA",
                "-a resnet18 --attention timm:cbam demo:digits",
                "-a eca_resnet18 --attention mine.py:MyGate demo:digits",
            )
        },
    },
    "docs/ECOSYSTEM.md": {
        "pip install .": "",  # test_wheel.py
        "python export.py runs/w/best.pth --to hf --output out": "",  # test_export_hf.py
    },
    "docs/FINE_TUNING.md": SHORT,
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


@pytest.mark.slow
@pytest.mark.parametrize("name", DOCUMENTS)
def test_runs_and_prints_what_it_shows(name, workspace):
    found = blocks((ROOT / name).read_text())
    assert found
    names = {"__name__": "document"}
    with within(workspace):
        for block in found:
            check(block, run(block, ROOT, names, DOCUMENTS[name]))


PAGES = (*DOCUMENTS, "README.md", "docs/EVIDENCE.md")


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
