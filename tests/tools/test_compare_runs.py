"""Comparing runs: the right row of each, what differs, and one-line answers to what is no run."""

import csv
import json
import os

import pytest
from PIL import Image

from tools import compare_runs
from tools.compare_runs import PANELS, differences, read_run, repeat_lines, result_rows
from utils.system.errors import UserError

TOP1 = {"a": (50.0, 90.0, 90.0), "b": (40.0, float("nan"), 80.5), "c": (10.0, 94.0, 20.0)}


def write_run(folder, top1, seed=1, arch="eca_resnet18", ksize=(3, 5, 7, 7), command="", **recipe):
    """A run folder as main.py leaves it, with these accuracies."""
    folder.mkdir(parents=True)
    with open(folder / "metrics.csv", "w") as file:
        writer = csv.writer(file)
        parts = [f"{part}_{name}" for part in ("train", "val") for name in ("loss", "top1", "top5")]
        writer.writerow(["epoch", "lr", *parts])
        for i, value in enumerate(top1):
            writer.writerow([i + 1, 0.1, 1.5, 80, 99, 2 - i / 10, value, 99.5])
    saved = {
        "arch": arch,
        "attention": "eca",
        "ksize": list(ksize) if ksize else None,
        "seed": seed,
        "recipe": {"arch": arch, "epochs": 4, "lr": 0.1, **recipe},
        "args": {"data": "demo:digits", "print_freq": seed, "amp": "off"},
        "environment": {"commit": str(seed), "command": command},
        "train_images": 100,
        "classes": ["x"],
    }
    (folder / "args.json").write_text(json.dumps(saved))
    return folder


def write_detection(folder, masks):
    folder.mkdir()
    kinds = ("box", "mask") if masks else ("box",)
    names = [f"{kind}_{name}" for kind in kinds for name in ("AP", "AP50", "AP75")]
    lines = [["epoch", "lr", "train_loss", *names]]
    lines += [[i + 1, 0.1, 1.0, *[10 + i * (5 - 4 * i)] * len(names)] for i in range(3)]
    (folder / "metrics.csv").write_text("\n".join(",".join(map(str, line)) for line in lines))
    saved = {"arch": "mask_rcnn", "backbone": "resnet18", "recipe": {"epochs": 3}, "args": {}}
    (folder / "args.json").write_text(json.dumps(saved))
    return folder


@pytest.fixture
def cli(call):
    """Runs the module's main in an empty folder: (exit code, all that it printed)."""

    def start(*arguments):
        code, out, err = call(*arguments, entry=compare_runs.main)
        return code, "\n".join([*out, *err])

    return start


def test_the_best_epoch_is_the_first_highest_finite_one(tmp_path):
    best = {n: read_run(write_run(tmp_path / n, top1)).best["epoch"] for n, top1 in TOP1.items()}
    assert best == {"a": 2, "b": 3, "c": 2}
    # As in training, an epoch whose loss is not finite is none.
    metrics = tmp_path / "c" / "metrics.csv"
    metrics.write_text(metrics.read_text().replace("1.9,94.0", "inf,94.0"))
    assert read_run(tmp_path / "c").best["epoch"] == 3


def test_a_run_that_counted_from_0_is_read_alike(tmp_path):
    new = read_run(write_run(tmp_path / "a", TOP1["a"]))
    metrics = tmp_path / "a" / "metrics.csv"
    text = metrics.read_text()
    for epoch in (1, 2, 3):
        assert f"\n{epoch},0.1" in text
        text = text.replace(f"\n{epoch},0.1", f"\n{epoch - 1},0.1")
    metrics.write_text(text)
    assert read_run(tmp_path / "a").history == new.history


def test_a_run_without_a_named_recipe_is_the_papers(tmp_path):
    folders = [write_run(tmp_path / name, TOP1["a"]) for name in "ab"]
    for folder, recipe in zip(folders, (None, "modern"), strict=True):
        saved = json.loads((folder / "args.json").read_text())
        saved["args"]["recipe"] = recipe
        (folder / "args.json").write_text(json.dumps(saved))
    assert differences([read_run(f) for f in folders]) == {"recipe": ["paper", "modern"]}


def test_settings_that_differ_and_seeds_that_repeat(tmp_path):
    runs = [
        read_run(write_run(tmp_path / "a", TOP1["a"])),
        read_run(write_run(tmp_path / "b", TOP1["b"], seed=2)),
        read_run(write_run(tmp_path / "c", TOP1["c"], lr=0.5)),
        read_run(write_run(tmp_path / "d", TOP1["a"], arch="resnet18", ksize=None)),
    ]
    assert differences(runs) == {"lr": ["0.1", "0.1", "0.5", "0.1"], "seed": ["1", "2", "1", "1"]}
    assert differences(runs[:1]) == {}
    assert repeat_lines(runs) == ["eca_resnet18 3577: top-1 85.25 ± 6.72 over 2 seeds (a, b)"]
    again = read_run(write_run(tmp_path / "e", TOP1["c"]))  # with the seed of a
    (line,) = repeat_lines([*runs, again])
    assert line.endswith("over 3 runs (a, b, e)")
    rows = result_rows(runs)
    assert rows[0][:4] == ["run", "network", "ksize", "epochs"]
    assert rows[0][-2:] == ["lr", "seed"]
    assert rows[2][:8] == ["b", "eca_resnet18", "3577", "3/4", "80.50", "99.50", "1.8000", "3"]
    assert rows[4][2] == "-"
    # Equal last names do not tell runs apart.
    twins = [read_run(write_run(tmp_path / part / "run-1", TOP1["a"])) for part in ("x", "y")]
    assert [row[0] for row in result_rows(twins)[1:]] == [str(twin.folder) for twin in twins]


def test_runs_that_began_elsewhere_are_no_repetition(tmp_path):
    """A run that does not say what weights it began with tells it by its command."""
    commands = (
        "main.py data",
        "main.py --pretrained=x.pth data",
        "main.py --pretrained x.pth it's",
    )
    runs = [
        read_run(write_run(tmp_path / str(i), TOP1["a"], seed=i, command=command))
        for i, command in enumerate(commands)
    ]
    assert differences(runs)["pretrained"] == ["-", "x.pth", "x.pth"]
    (line,) = repeat_lines(runs)
    assert line.endswith("over 2 seeds (1, 2)")


@pytest.mark.parametrize("masks", [False, True])
def test_detection_runs_go_by_their_ap(tmp_path, cli, masks):
    run = read_run(write_detection(tmp_path / "det", masks))
    assert (run.arch, run.ksize) == ("mask_rcnn/resnet18", None)
    assert run.decides == ("mask_AP" if masks else "box_AP")
    assert run.best["epoch"] == 2
    code, text = cli("det")
    assert (code, "mask AP50" in text) == (0, masks)


def test_curves_are_drawn_run_by_run(tmp_path, figures):
    names = "abcdefghi"
    runs = [read_run(write_run(tmp_path / n, TOP1.get(n, TOP1["a"]))) for n in names]
    compare_runs.draw(runs)
    panels = dict(zip(PANELS["val_top1"], figures[0].axes, strict=True))
    for axis in panels.values():
        assert [line.get_label() for line in axis.lines] == list(names)
    drawn = {line.get_label(): line.get_xydata().tolist() for line in panels["val_top1"].lines}
    assert drawn["a"] == [[1, 50], [2, 90], [3, 90]]
    assert drawn["b"] == [[1, 40], [3, 80.5]]  # without the epoch that was not finite
    assert panels["val_loss"].lines[0].get_ydata().tolist() == [2, 1.9, 1.8]
    styles = [(line.get_color(), line.get_linestyle()) for line in panels["val_top1"].lines]
    assert len(set(styles)) == len(names)  # more than there are colours


def test_every_run_is_in_the_legend_under_its_name(tmp_path, figures):
    """matplotlib leaves out what begins with "_", and takes $…$ for a formula."""
    runs = [read_run(write_run(tmp_path / n, TOP1["a"])) for n in ("_u", "$p$q", "c")]
    compare_runs.draw(runs)
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["\u200b_u", r"\$p\$q", "c"]


def test_command(tmp_path, cli):
    for i, name in enumerate("abc"):
        write_run(tmp_path / "runs" / name, TOP1[name], seed=i)
    (tmp_path / "runs" / "predict-1").mkdir()
    code, text = cli("runs/a", "runs/b", "runs/c", "runs/predict-1", "runs/a")
    assert code == 0
    lines = text.splitlines()
    assert lines[0] == "! runs/predict-1: has no metrics.csv; passed over"
    assert [line.split()[0] for line in lines[1:5]] == ["run", "a", "b", "c"]
    assert [line.split() for line in lines[6:8]] == [["setting", "a", "b", "c"], ["seed", *"012"]]
    assert "over 3 seeds (a, b, c)" in text
    assert "training images" not in text
    other = json.loads((write_run(tmp_path / "other", TOP1["a"]) / "args.json").read_text())
    (tmp_path / "other" / "args.json").write_text(json.dumps({**other, "train_digest": "1"}))
    assert "! the runs differ in their training images, too" in cli("runs/a", "other")[1]
    folder = tmp_path / "runs" / "comparison-1"
    with open(folder / "comparison.csv") as file:
        assert [row["top-1"] for row in csv.DictReader(file)] == ["90.00", "80.50", "94.00"]
    assert Image.open(folder / "comparison.png").size[0] > 800
    code, _ = cli("runs/a", "--output", "kept")
    assert code == 0
    code, text = cli("runs/a", "--output", "kept")
    assert (code, "kept: is in use; choose a new --output" in text) == (2, True)

    write_detection(tmp_path / "det", True)
    write_run(tmp_path / "empty", [])
    (write_run(tmp_path / "torn", TOP1["a"]) / "metrics.csv").write_text("epoch,val_top1\n0,x\n")
    for arguments, message in [
        (("runs/a", "det"), "measure different things (mask_AP, val_top1)"),
        (("runs/predict-1",), "no run to compare"),
        (("nowhere",), "nowhere/metrics.csv: No such file or directory"),
        (("empty",), "empty: no epoch is finished yet"),
        (("torn",), "torn: metrics.csv or args.json is not what a run writes"),
    ]:
        code, text = cli(*arguments)
        assert (code, message in text) == (2, True), text
        assert "Traceback" not in text


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("args.json", None, "args.json: no usable JSON"),  # a pipe: not waited for
        ("metrics.csv", "epoch\n" + "9" * 200_000, "is not what a run writes"),
    ],
)
def test_odd_files_of_a_run_are_one_line(tmp_path, file, text, said):
    odd = write_run(tmp_path / "a", TOP1["a"]) / file
    odd.unlink()
    if text is None:
        os.mkfifo(odd)
    else:
        odd.write_text(text)
    with pytest.raises(UserError, match=said):
        read_run(tmp_path / "a")


def test_reads_what_main_writes(run_folder):
    """The columns and fields of a real run."""
    found = read_run(run_folder)
    assert (found.arch, found.ksize, found.epochs) == ("mobilenetv2", None, 2)
    assert 0 <= found.best["val_top1"] <= 100
    assert found.settings["batch_size"] == "6"
