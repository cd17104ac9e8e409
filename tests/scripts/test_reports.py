"""main.py --report: what it writes, where, and that its figures are the printed ones."""

import csv
import json
import shutil
import signal

import numpy as np
import pytest
import torch
from helpers.shard_sets import make
from helpers.small_runs import SMALL
from helpers.trees import write_tree
from PIL import Image

import models
from utils.data.image_folder import ImageFolder, scan
from utils.data.loader import ImageDataset
from utils.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from utils.inspection.report import EvaluatedImages, ReportMeter, write_report
from utils.runs import checkpoint
from utils.system.errors import EXIT_STOPPED
from utils.training import classification

FILES = {"classes.csv", "confusion.csv", "confusion.png", "confused_pairs.csv", "calibration.csv"}
FILES |= {"calibration.png", "worst_images.csv", "worst_images.png", "report.json"}


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def summary(folder):
    return json.loads((folder / "report.json").read_text())


def printed(lines):
    """The line of figures without the speed."""
    return next(line for line in lines if " images  top-1 " in line).rpartition("  ")[0]


def line_of(told):
    return f"{told['images']:,} images  top-1 {told['top1']:.3f} %  loss {told['loss']:.4f}"


@pytest.mark.usefixtures("thin")
def test_an_evaluation_s_report_beside_its_checkpoint(call, run_folder, tree):
    code, out, err = call("-e", "--resume", run_folder / "best.pth", tree, "--report")
    assert (code, err[:0]) == (0, [])
    folder = run_folder / "report"
    assert {path.name for path in folder.iterdir()} == FILES
    assert out[-2] == f"report written to {folder}: {', '.join(sorted(FILES))}"
    assert out[-1].endswith(f"-m tools.run_report {run_folder}")
    assert [line.split()[0] for line in out[-6:-2]] == ["class", "a", "b", "c"]
    told = summary(folder)
    assert printed(out) == line_of(told)
    assert_follows_from_the_network(folder, run_folder / "best.pth", tree / "val")
    for name in ("confusion.png", "calibration.png", "worst_images.png"):
        with Image.open(folder / name) as picture:
            picture.load()
    # Again: what is there stays.
    before = (folder / "report.json").read_bytes()
    assert call("-e", "--resume", run_folder / "best.pth", tree, "--report")[0] == 0
    assert (folder / "report.json").read_bytes() == before
    assert summary(run_folder / "report-2")["top1"] == told["top1"]


def assert_follows_from_the_network(folder, weights, val):
    """The report's figures, by a loop over the images in float64."""
    saved = checkpoint.load(weights)
    network = models.create_model(saved["arch"], num_classes=3, **saved["model_kwargs"])
    network.load_state_dict(saved["state_dict"])
    network.double().eval()
    images = scan(str(val))
    dataset = ImageDataset(images, Preprocessing(saved["img_size"], saved["crop_pct"]))
    matrix, losses, hits = np.zeros((3, 3), int), {}, 0
    with torch.inference_mode():
        for i in range(len(images)):
            pixels, label, _ = dataset[(0, i)]
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
            shares = network(((pixels.double() / 255 - mean) / std)[None]).softmax(1)[0]
            matrix[label, int(shares.argmax())] += 1
            losses[images.paths[i].decode()] = -shares[label].log().item()
            hits += int(shares.argmax()) == label
    assert summary(folder)["top1"] == 100 * hits / len(images)
    found = rows(folder / "confusion.csv")
    assert [[int(row[name]) for name in "abc"] for row in found] == matrix.tolist()
    for i, row in enumerate(rows(folder / "classes.csv")):
        assert (row["class"], int(row["support"])) == ("abc"[i], matrix[i].sum())
        assert float(row["recall"]) == pytest.approx(100 * matrix[i, i] / matrix[i].sum(), abs=1e-4)
    worst = rows(folder / "worst_images.csv")
    assert {row["path"] for row in worst} == losses.keys()
    for row in worst:
        assert float(row["loss"]) == pytest.approx(losses[row["path"]], rel=1e-3, abs=2e-4)
    in_order = [float(row["loss"]) for row in worst]
    assert in_order == sorted(in_order, reverse=True)


@pytest.mark.usefixtures("thin")
def test_a_report_goes_to_output_or_to_a_new_folder(call, run_folder, tree, tmp_path):
    """The second for weights that lie in no run's folder."""
    best = run_folder / "best.pth"
    assert call("-e", "--resume", best, tree, "--output", "out", "--report")[0] == 0
    told = summary(tmp_path / "out" / "report")
    figures = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    for name in ("top1", "top5", "loss", "images"):
        assert told[name] == figures[name]
    assert not (run_folder / "report").exists()
    (tmp_path / "downloads").mkdir()
    weights = shutil.copy(best, tmp_path / "downloads" / "weights.pth")
    assert call("-e", "--resume", weights, tree, "--report")[0] == 0
    assert [path.name for path in (tmp_path / "downloads").iterdir()] == ["weights.pth"]
    assert summary(tmp_path / "runs" / "mobilenetv2_report-1" / "report")["images"] == 15
    bare = {"state_dict": models.create_model("resnet18", num_classes=3).state_dict()}
    torch.save(bare, tmp_path / "downloads" / "bare.pth")
    assert call("-e", "--resume", "downloads/bare.pth", tree, "--report")[0] == 0
    told = summary(tmp_path / "runs" / "resnet18_report-1" / "report")
    assert told["arch"] == "resnet18"


@pytest.mark.usefixtures("thin")
def test_training_ends_with_the_report_of_its_best_epoch(call, tree, tmp_path):
    code, out, _ = call(*SMALL, "--epochs", 1, "--output", "run", tree, "--report")
    assert code == 0
    saved = checkpoint.load(tmp_path / "run" / "last.pth")
    best = saved["progress"]["best"]
    told = summary(tmp_path / "run" / "report")
    assert told["checkpoint"] == "run/best.pth"
    assert {k: told[k] for k in ("top1", "top5", "loss")} == {
        k: best[f"val_{k}"] for k in ("top1", "top5", "loss")
    }
    assert printed(out) == line_of(told)
    # The run keeps the flag where it goes on, but no evaluation of it does.
    assert call("-e", "--resume", tmp_path / "run" / "best.pth")[0] == 0
    assert not (tmp_path / "run" / "report-2").exists()
    code, out, _ = call("--resume", tmp_path / "run" / "last.pth", "--epochs", 2)
    assert code == 0
    assert (tmp_path / "run" / "report-2" / "report.json").exists()


@pytest.mark.usefixtures("thin")
def test_a_report_that_is_asked_to_stop_leaves_a_saved_run(call, tree, tmp_path, monkeypatch):
    evaluate = classification.evaluate

    def stopping(*arguments):
        if isinstance(arguments[2], ReportMeter):
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments)

    monkeypatch.setattr(classification, "evaluate", stopping)
    code, out, _ = call(*SMALL, "--epochs", 1, "--output", "run", tree, "--report")
    assert code == EXIT_STOPPED
    assert "its report is not written" in out[-2]
    assert out[-1].endswith(f"-e --resume run/best.pth {tree} --report")
    assert not (tmp_path / "run" / "report").exists()
    assert checkpoint.load(tmp_path / "run" / "last.pth")["progress"]["epoch"] == 1


def test_more_than_a_thousand_classes_have_pairs_and_no_matrix(tmp_path):
    n = 1001
    true, sure = np.arange(n), np.full(n, 0.5)
    images = EvaluatedImages(true, (true + 1) % n, sure > 1, sure, sure / 2, 1 - sure, n)
    paths = np.array([f"{i}.png".encode() for i in range(n)])
    folder = ImageFolder(str(tmp_path), tuple(f"c{i}" for i in range(n)), paths, true)
    told = {"images": n, "top1": 0.0, "top5": 0.0, "loss": 1.0, "data": "D", "checkpoint": "C"}
    folder = write_report(tmp_path, images, folder, "eca_resnet18", told)
    assert {path.name for path in folder.iterdir()} == FILES - {"confusion.csv"}
    assert len(rows(folder / "confused_pairs.csv")) == n
    assert len(rows(folder / "worst_images.csv")) == 1000


@pytest.mark.slow
def test_a_run_of_two_ranks_ends_with_one_report_of_every_image(run, call, tree, tmp_path):
    done = run("main.py", *SMALL, "--epochs", 1, "--output", "run", tree, "--report", ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report written to") == 1
    best = tmp_path / "run" / "best.pth"
    assert call("-e", "--resume", best, "--output", "one", "--report")[0] == 0
    one, two = tmp_path / "one" / "report", tmp_path / "run" / "report"
    for name in ("classes.csv", "confusion.csv", "confused_pairs.csv"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    a, b = rows(one / "worst_images.csv"), rows(two / "worst_images.csv")
    assert len(b) == 15
    assert {row["path"]: row["true"] for row in a} == {row["path"]: row["true"] for row in b}


@pytest.mark.usefixtures("thin")
def test_paths_are_names_inside_the_shards(call, run_folder, tree, tmp_path, monkeypatch):
    shards = make(monkeypatch, tree, tmp_path / "shards", "-j", 1)
    for name, data in (("files", tree), ("tars", shards)):
        flags = ("--resume", run_folder / "best.pth", data, "--output", name, "--report")
        assert call("-e", *flags)[0] == 0
    files, tars = (tmp_path / name / "report" for name in ("files", "tars"))
    for name in FILES - {"report.json", "confusion.png", "calibration.png", "worst_images.png"}:
        assert (files / name).read_bytes() == (tars / name).read_bytes()
    assert {row["path"].split("/")[0] for row in rows(tars / "worst_images.csv")} == set("abc")


@pytest.mark.usefixtures("thin")
def test_classes_and_files_with_hostile_names(call, tmp_path):
    names = ("=1+1", "-lead", "猫", "a\nb", "$x$ \\frac{", "<script>")
    data = tmp_path / "data"
    write_tree(data, train=2, val=2, classes="abcdef")
    for part in ("train", "val"):
        for old, new in zip("abcdef", names, strict=True):
            (data / part / old).rename(data / part / new)
    code, _, err = call(*SMALL, "--epochs", 1, "--output", "run", data, "--report")
    assert code == 0, err
    found = rows(tmp_path / "run" / "report" / "classes.csv")
    assert {row["class"] for row in found} >= {"'=1+1", "'-lead", "猫", "a\\x0ab"}
