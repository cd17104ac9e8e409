"""paras_flops.py as a user runs it: the published tables, single networks, JSON, bad input."""

import json
import re

import pytest
from helpers.trees import ROOT

import paras_flops
from models import MODELS
from models.detection.detectors import DETECTORS
from utils.inspection import published
from utils.inspection.cost import count_parameters, format_params

# network: ksize, parameters, FLOPs and exact parameters as published and as ours must come out
PAPER = {
    "eca_resnet18": ("3577", "11.15M", "1.70G", "11,689,556"),
    "eca_resnet34": ("3357", "20.79M", "3.43G", "21,797,744"),
    "eca_resnet50": ("3557", "24.37M", "3.86G", "25,557,112"),
    "eca_resnet101": ("3357", "42.49M", "7.35G", "44,549,317"),
    "eca_resnet152": ("3357", "57.41M", "10.83G", "60,193,042"),
    "eca_mobilenetv2": ("13", "3.34M", "319.9M", "3,504,903"),
}
ATTENTION = {"eca_resnet50": "80", "eca_mobilenetv2": "31", "resnet50": "0"}
DISAGREE = {  # published and counted parameters
    "eca_resnet152": ("57.41M", "57.40M"),
    "se_resnet34": ("20.93M", "20.94M"),
    "se_mobilenetv2": ("3.40M", "3.37M"),
    "resnet34": ("20.78M", "20.79M"),
}
COCO = {
    ("faster_rcnn", "eca_resnet50"): ("5555", "41.53M", "207.18G", 41_531_877, 207_181_949_620),
    ("faster_rcnn", "eca_resnet101"): ("3357", "60.52M", "283.32G", 60_524_088, 283_324_635_316),
    ("mask_rcnn", "eca_resnet50"): ("3377", "44.18M", "275.69G", 44_175_424, 275_688_594_164),
    ("mask_rcnn", "eca_resnet101"): ("3357", "63.17M", "351.83G", 63_167_625, 351_831_260_916),
    ("retinanet", "eca_resnet50"): ("3377", "37.74M", "239.43G", 37_743_423, 239_429_234_984),
    ("retinanet", "eca_resnet101"): ("3357", "56.74M", "315.57G", 56_735_624, 315_571_901_736),
}


@pytest.fixture
def run(call):
    """Runs the script in this process: run("-a", "resnet18") → (exit code, stdout, stderr)."""

    def start(*words: str) -> tuple[int, str, str]:
        code, out, err = call(*words, entry=paras_flops.main)
        return code, "\n".join(out), "\n".join(err)

    return start


def cells(text: str, width: int) -> dict[str, list[str]]:
    """The table's rows of `width` cells by their first cell, the heading left out."""
    rows = [line.split() for line in text.split("\n\n")[1].splitlines()[2:]]
    assert all(len(row) == width for row in rows)
    return {row[0]: row for row in rows}


def test_all_networks_beside_the_published_figures(run):
    code, out, err = run("--all")
    assert (code, err) == (0, "")  # no warnings, no progress where no one looks
    assert max(map(len, out.splitlines())) <= 140
    rows = cells(out, 13)
    assert set(rows) == {build().arch for build in {*MODELS.values()}} == set(published.IMAGENET)
    for name, (ksize, params, flops, exact) in PAPER.items():
        row = rows[name]
        assert row[1:4] == [ksize, params, flops]
        counted = DISAGREE.get(name, ("", params))[1]
        assert row[4:8] == [counted, flops, "no" if name in DISAGREE else "yes", exact]
    for name, share in ATTENTION.items():
        assert rows[name][8] == share
    for name, (theirs, ours) in DISAGREE.items():
        assert (rows[name][2], rows[name][4], rows[name][6]) == (theirs, ours, "no")
        assert f"{name}: published {theirs} parameters, counted {ours}: " in out
    assert [name for name, row in rows.items() if row[6] == "no"] == list(DISAGREE)
    counts = ["335,449,024", "335,449,016", "328,064,224", "300,777,952"]
    assert rows["eca_mobilenetv2"][9:] == counts
    assert rows["eca_resnet50"][9:11] == ["4,147,732,480", "4,147,732,504"]  # printed, exact
    table = [line for line in (ROOT / "README.md").read_text().splitlines() if "| eca_" in line]
    for line in table:
        shown = [cell.strip() for cell in line.strip("|").split("|")]
        row = rows[shown[0]]
        assert shown[1:4] == row[1:4]
    assert len(table) == len(PAPER)


def test_networks_are_listed_with_the_published_accuracy(call):
    """README.md's table says the same; main.py has the flag, too."""
    code, lines, errors = call("--list-models", "eca_*[0-9]", entry=paras_flops.main)
    assert (code, errors) == (0, [])
    rows = {row.split()[0]: row.split() for row in lines[1 : lines.index("")]}
    table = [line for line in (ROOT / "README.md").read_text().splitlines() if "| eca_" in line]
    accuracy = {cells[1]: cells[5] for cells in ([c.strip() for c in x.split("|")] for x in table)}
    assert set(rows) == {*PAPER, "eca_mobilenet_v2"}
    for name, (ksize, _, flops, exact) in PAPER.items():
        assert rows[name][1:4] == [ksize, exact, flops]
        assert " ".join(rows[name][4:]) == accuracy[name]
    code, lines, _ = call("--list-models", "resnet50")
    assert (code, lines[1].split()) == (0, ["resnet50", "-", "25,557,032", "3.86G", "-"])
    assert len(lines[2:]) > 1
    for words in (["--list-models", "vgg*"], ["--list-models", "vgg*", "DATA"]):
        assert call(*words)[2] == [
            "error: no network matches vgg*; leave the pattern out to see all"
        ]


def test_one_network_as_the_original_was_called(run):
    code, out, err = run("-a", "eca_mobilenetv2")
    assert (code, err) == (0, "")
    assert out.startswith("eca_mobilenetv2, ksize 13. One image of 3x224x224, 1000 classes.")
    lines = {line[:13].strip(): line.split() for line in out.split("\n\n")[1].splitlines()}
    assert lines["parameters"][1:] == ["3,504,903", "31", "3.34M", "3.50M", "3.34M"]
    assert lines["thop mid-2019"][2:] == ["335,449,024", "577,504", "319.9M", "335.4M", "319.9M"]
    assert lines["exact sum"] == ["exact", "sum", "335,449,016"]
    assert lines["MACs"][1:3] == ["300,777,952", "3,680"]
    assert "Agrees with the README of the authors' released code." in out
    assert run("-a", "eca_mobilenet_v2") == (0, out, "")  # the other spelling


def test_options_change_what_is_counted(run):
    words = ["--ksize", "3,5,5,11", "--img-size", "64x96", "--num-classes", "10", "--json"]
    code, out, _ = run("-a", "eca_resnet50", *words)
    report = json.loads(out)
    assert code == 0
    assert report["ksize"] == [3, 5, 5, 11]
    assert report["input"] == [1, 3, 64, 96]
    assert report["attention"]["parameters"] == 80 + 3 * (11 - 7)
    assert report["parameters"] == 25_557_112 + 3 * (11 - 7) - 990 * 2049
    assert report["published"] is None  # printed for other settings
    assert report["agrees"] is None
    assert "layers" not in report


# attention of ResNet-50: parameters by its formula for C channels, and those published
BY_FORMULA = {
    "se": (lambda c: 2 * c * (c // 16), "26.77M"),
    "se_var2": (lambda c: c, None),
    "se_var3": (lambda c: c * c, None),
    "eca_ns": (lambda c: 3 * c, None),
    # A reduction of 16 for means and maxima alike; 7 x 7 of two maps; a BatchNorm of one channel.
    "timm:cbam": (lambda c: 2 * c * (c // 16) + 2 * 49 + 2, "26.77M"),
    # A map of positions, two convolutions with biases, reduction 8, a LayerNorm between them.
    "timm:gc": (lambda c: c + 1 + 2 * c * (c // 8) + c // 8 + c + 2 * (c // 8), "28.08M"),
}


@pytest.mark.parametrize("kind", BY_FORMULA)
def test_another_attention(run, kind):
    if kind.startswith("timm:"):
        pytest.importorskip("timm")
    formula, theirs = BY_FORMULA[kind]
    ksize = ["--ksize", "3333"] if kind == "eca_ns" else []
    code, out, _ = run("-a", "eca_resnet50", "--attention", kind, "--json", *ksize)
    report = json.loads(out)
    expected = sum(n * formula(c) for c, n in ((256, 3), (512, 4), (1024, 6), (2048, 3)))
    assert (code, report["attention"]["name"]) == (0, kind)
    assert report["attention"]["parameters"] == expected == report["parameters"] - 25_557_032
    assert (report["published"] or {}).get("params") == theirs
    assert report["agrees"] is (theirs and theirs != "28.08M")
    _, out, _ = run("-a", "mask_rcnn", "--attention", kind, *ksize)
    assert out.startswith(f"mask_rcnn on eca_resnet50 with attention {kind}")
    assert f"{expected:,}" in out


def test_gcnet_s_published_parameters():
    """10^6, of blocks with a reduction of 16 in the last three stages, as EVIDENCE.md says."""
    layers = pytest.importorskip("timm.layers")
    parameters = 25_557_032
    for channels, blocks in ((512, 4), (1024, 6), (2048, 3)):
        block = layers.GlobalContext(channels, rd_ratio=1 / 16)
        parameters += blocks * count_parameters(block)
    assert (parameters, format_params(parameters, base=1000)) == (28_078_773, "28.08M")


OWN = """import torch

class Gate(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x):
        return x * self.w
"""


def test_networks_of_libraries_and_attention_of_ones_own(run, tmp_path):
    timm = pytest.importorskip("timm")
    code, out, _ = run("-a", "timm:resnet18", "--attention", "eca", "--json")
    report = json.loads(out)
    theirs = sum(p.numel() for p in timm.create_model("resnet18").parameters())
    assert (code, report["parameters"], report["published"]) == (0, theirs + 36, None)
    share = report["attention"]
    macs = 2 * (64 * 3 + (128 + 256 + 512) * 5)
    assert (share["parameters"], share["multiply_adds"]) == (36, macs)
    (tmp_path / "mine.py").write_text(OWN)
    code, out, _ = run("-a", "resnet18", "--attention", f"{tmp_path}/mine.py:Gate", "--json")
    report = json.loads(out)
    assert (code, report["attention"]["name"]) == (0, "mine.py:Gate")
    assert report["attention"]["parameters"] == 2 * (64 + 128 + 256 + 512)


@pytest.mark.parametrize(
    ("words", "own"),
    [
        (["--ksize", "3577"], True),
        (["--ksize", "3333"], False),
        (["--img-size", "192"], False),
        (["--num-classes", "999"], False),
    ],
)
def test_published_figures_stand_only_beside_their_own_settings(run, words, own):
    _, out, _ = run("-a", "eca_resnet18", *words)
    assert ("Agrees" in out) == own
    assert out.split("\n\n")[1].splitlines()[1].endswith("  -") != own


def test_layers_add_up(run):
    _, out, _ = run("-a", "eca_resnet18", "--per-layer", "--img-size", "64")
    layers, *single = out.split("\n\n")
    heading, *rows, total = layers.splitlines()
    assert heading.split()[:5] == ["layer", "kind", "output", "calls", "parameters"]
    assert rows[0].split()[:5] == ["conv1", "Conv2d", "1x64x32x32", "1", "9,408"]
    assert any(row.startswith("layer4.1.eca.conv ") for row in rows)
    sums = [sum(int(row.split()[i].replace(",", "")) for row in rows) for i in range(-4, 0)]
    assert total.split() == ["exact", "sum", *(f"{n:,}" for n in sums)]
    for name, number in zip(("parameters", "exact sum", "thop 0.", "MACs"), sums, strict=True):
        assert re.search(rf"^{name}.* {number:,}( |$)", single[1], re.M), name

    _, out, _ = run("-a", "eca_resnet18", "--per-layer", "--img-size", "64", "--json")
    report = json.loads(out)
    assert len(report["layers"]) == len(rows)
    assert sum(layer["multiply_adds"] for layer in report["layers"]) == sums[-1]


def test_all_detectors_beside_the_published_figures(run):
    code, out, err = run("--all", "--detectors")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 140
    rows = [line.split() for line in out.split("\n\n")[1].splitlines()[2:]]
    assert len(rows) == len(COCO)
    for row in rows:
        ksize, params, flops, exact_params, exact_flops = COCO[row[0], row[1]]
        assert row[2:9] == [ksize, params, flops, params, flops, "yes", f"{exact_params:,}"]
        assert row[10] == f"{exact_flops:,}"
    assert "do not agree" not in out
    assert set(published.COCO) == set(COCO)
    assert set(paras_flops.DETECTORS) == set(DETECTORS)


def test_a_detector_of_another_kind(run):
    words = ["-b", "se_resnet18", "--num-classes", "3", "--img-size", "64x96", "--json"]
    code, out, _ = run("-a", "retinanet", *words)
    report = json.loads(out)
    assert code == 0
    assert (report["ksize"], report["published"], report["input"]) == (None, None, [1, 3, 64, 96])
    assert report["attention"]["parameters"] == 87_040
    assert report["parameters"] > report["trainable_parameters"] > 19_000_000


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "give a network, such as -a eca_resnet50, or --all"),
        ("--all -a resnet18", "exclude each other"),
        ("-a eca_resnet5", "unknown network 'eca_resnet5'; did you mean eca_resnet50"),
        ("-a mask_rcn", "did you mean mask_rcnn"),
        ("-a eca_resnet50 --ksize 355", "3557"),
        ("-a eca_mobilenetv2 --ksize 3557", "13"),
        ("-a resnet50 --ksize 3557", "no ECA layer"),
        ("-a resnet50 --img-size 0", "between 1 and 8192"),
        ("-a resnet50 --img-size 64x", "224 or 800x1280"),
        ("-a resnet50 --num-classes 0", "--num-classes"),
        ("--all --ksize 3333", "give -a NAME instead of --all"),
        ("-a resnet18 --attention sa", "unknown attention 'sa'"),
        ("-a timm:resnet17", "timm has no classifier 'resnet17'"),
        ("--detectors", "goes with --all"),
        ("-a resnet18 -b resnet50", "-b is for a detector"),
        ("-a mask_rcnn -b mobilenetv2", "such as eca_resnet50"),
        ("-a mask_rcnn --num-classes 1", "81"),
        ("-a mask_rcnn --per-layer", "--per-layer"),
    ],
)
def test_bad_input_is_one_line(run, words, said):
    code, out, err = run(*words.split())
    assert (code, out) == (2, "")
    assert "error: " in err
    assert "\n" not in err
    assert said in err
