"""main.py and light_main.py as a user runs them."""

import csv
import json
import shlex
from pathlib import Path

import pytest
import torch
from helpers.trees import ROOT
from PIL import Image
from torchvision import transforms

import models
from main import DEMOS, RECIPE
from utils.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from utils.runs import checkpoint, writer

SMALL = ("-a", "resnet18", "--img-size", 32, "-b", 8, "--min-scale", 0.7, "-j", 0)
DRAW_CURVES = writer.draw_curves  # `call` puts another in its place


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.fixture
def succeed(call):
    """Runs main.py in this process and returns its lines on stdout."""

    def start(*arguments: object) -> list[str]:
        code, out, err = call(*arguments)
        assert code == 0, err
        return out

    return start


@pytest.mark.usefixtures("thin")
def test_trains_evaluates_and_starts_from_its_weights(succeed, tree, tmp_path, monkeypatch):
    """One run's life: folder, files, best checkpoint, evaluation, another head, more epochs."""
    monkeypatch.setattr(writer, "draw_curves", DRAW_CURVES)
    flags = ("--epochs", 4, "--lr", 0.02, "--seed", 1, "--action", "try", "-p", 2)
    lines = succeed(*SMALL, *flags, tree)
    assert lines[0].startswith("train: 24 images in 3 classes")
    assert lines[1].startswith("val: 15 images in 3 classes")
    assert lines[-1].endswith("--resume runs/resnet18_try-1/last.pth --epochs 8")
    network = lines[2]
    steps = [line for line in lines if "step" in line and "images/s  ETA" in line]
    assert [line.split()[3] for line in steps] == ["2/3", "3/3"] * 4

    folder = tmp_path / "runs" / "resnet18_try-1"
    names = {path.name for path in folder.iterdir()}
    assert {"args.json", "metrics.csv", "last.pth", "previous.pth", "best.pth"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    args = json.loads((folder / "args.json").read_text())
    assert args["recipe"]["lr"] == 0.02
    assert args["seed"] == 1
    assert {"torch", "torchvision", "commit", "command"} <= args["environment"].keys()
    with Image.open(folder / "curves.png") as picture:
        assert picture.size == (990, 726)

    rows = read_csv(folder / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert float(rows[-1]["train_top1"]) > 80  # three colours: chance is 33
    best = max(rows, key=lambda row: float(row["val_top1"]))  # the first of equal ones

    # The checkpoint alone rebuilds the network, and evaluates to the figures of its epoch.
    saved = checkpoint.load(folder / "best.pth")
    assert saved["arch"] == "resnet18"
    weights = [v for k, v in saved["state_dict"].items() if k.endswith(("weight", "bias"))]
    count = sum(weight.numel() for weight in weights)
    assert f"resnet18, {count:,} parameters, no ECA, 3 classes" in network
    assert saved["classes"] == ["a", "b", "c"]
    assert saved["img_size"] == 32
    assert saved["progress"]["best"]["epoch"] == int(best["epoch"]) - 1
    assert not any(key.startswith("module.") for key in saved["state_dict"])
    lines = succeed("-e", "--resume", "auto", "-a", "resnet18", "--action", "try")
    assert "evaluating runs/resnet18_try-1/best.pth" in lines[0]
    figures = lines[-1].split()
    assert figures[0] == "15"
    assert float(figures[3]) == pytest.approx(float(best["val_top1"]), abs=5e-4)
    assert float(figures[6]) == pytest.approx(float(best["val_loss"]), abs=5e-5)

    # Rebuilt for inference it says the same.
    fast = succeed("-e", "--fast", "--resume", folder / "best.pth", tree)
    assert any("BatchNorm folded" in line for line in fast)
    assert fast[-1].split()[:4] == lines[-1].split()[:4]
    assert float(fast[-1].split()[6]) == pytest.approx(float(figures[6]), rel=1e-3)

    # Weights for another data set: the head is new, and the run says so.
    (tmp_path / "two").mkdir()
    for part in ("train", "val"):
        (tmp_path / "two" / part).mkdir()
        for name in "abx":  # as many classes as before, but not the same
            (tmp_path / "two" / part / name).symlink_to(tree / part / name.replace("x", "c"))
    pretrained = ("--pretrained", folder / "best.pth")
    lines = succeed(*SMALL, "--epochs", 1, *pretrained, tmp_path / "two")
    assert "  Left fc as initialised: the weights' 3 classes have other names." in lines
    assert (tmp_path / "runs" / "resnet18-1" / "last.pth").exists()

    # Going on needs the checkpoint alone; the settings are the run's.
    lines = succeed("--resume", folder / "last.pth", "--epochs", 5)
    assert any(line.startswith("recipe: 5 epochs, batch 8, lr 0.02") for line in lines)
    rows = read_csv(folder / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4", "5"]


def test_light_main_is_a_recipe_of_the_same_trainer(run, tree, tmp_path):
    flags = ("--img-size", 32, "-b", 8, "-j", 1, "--epochs", 1, "--schedule", "cosine")
    flags += ("--warmup-epochs", 0.5, "--amp", "bf16", "--channels-last", "--decoder", "pil")
    flags += ("--ksize", "adaptive", "--no-fused", "--output", "here")
    done = run("light_main.py", *flags, tree)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any("eca_mobilenetv2" in line and "ksize 3,3,3,3,3,5,5" in line for line in lines)
    assert any("bf16, channels_last, block tails module by module" in line for line in lines)
    assert any(line.startswith("recipe: 1 epoch, batch 8, lr 0.045 cosine") for line in lines)
    assert "train on" not in lines[-1]  # along a second cosine the rate would jump
    script = shlex.quote(str(ROOT / "light_main.py"))
    assert any(f"{script} -e --resume here/best.pth" in line for line in lines)
    saved = checkpoint.load(tmp_path / "here" / "last.pth")
    assert saved["ksize"] == [3, 3, 3, 3, 3, 5, 5]
    assert saved["recipe"]["weight_decay"] == 4e-5


@pytest.mark.usefixtures("thin")
def test_released_checkpoints_evaluate_as_they_are(call, succeed, tree, tmp_path):
    """The authors' layout: wrapped names, a wrong arch, no class names, the old file format."""
    torch.manual_seed(0)
    network = models.create_model("eca_resnet18", ksize="3333", num_classes=3)
    state = {f"module.{key}": value for key, value in network.state_dict().items()}
    released = {
        "epoch": 100,
        "arch": "se_resnet50",
        "state_dict": state,
        "best_prec1": torch.tensor(70.0),
        "optimizer": {},
    }
    torch.save(released, tmp_path / "released.pth.tar", _use_new_zipfile_serialization=False)
    evaluate = ("-e", "--resume", "released.pth.tar", "--img-size", 32, "-j", 0)
    lines = succeed(*evaluate, "--output", "result", tree)
    assert any("eca_resnet18" in line and "ksize 3,3,3,3" in line for line in lines)
    result = json.loads((tmp_path / "result" / "evaluation.json").read_text())
    assert result["images"] == 15

    # The same figures from a plain loop over Pillow images.
    network.eval()
    transform = transforms.Compose(
        [
            transforms.Resize(37),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    losses = []
    for label, name in enumerate("abc"):
        for path in sorted((tree / "val" / name).iterdir()):
            image = transform(Image.open(path).convert("RGB"))[None]
            with torch.no_grad():
                logits = network(image)
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor([label])).item())
    assert result["loss"] == pytest.approx(sum(losses) / 15, rel=2e-3)

    code, _, err = call("--resume", "released.pth.tar", tree)
    assert (code, len(err)) == (2, 1)
    assert "--pretrained released.pth.tar" in err[0]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("-b", 25, "DATA"), "-b 25 is more than the 24 training images"),
        (("-a", "eca_resnet51", "DATA"), "no network 'eca_resnet51'; did you mean eca_resnet50"),
        (("--ksize", "3546", "DATA"), "'3546'"),
        (("-a", "resnet50", "--ksize", "3557", "DATA"), "no ECA layer: leave --ksize 3557 out"),
        (("-e", "DATA"), "--resume CKPT"),
        (("nowhere",), "train/ and val/"),
        ((), "no DATA given"),
        ((*SMALL, "--num-classes", 2, "DATA"), "--num-classes 2: the data has 3"),
        ((*SMALL, "--pretrained", "none.pth", "DATA"), "no such file"),
        (("demo:letters",), "no demo data 'demo:letters'"),
    ],
)
def test_bad_input_is_answered_in_one_line(call, tree, tmp_path, flags, said):
    code, _, err = call(*(tree if word == "DATA" else word for word in flags))
    assert (code, len(err)) == (2, 1)
    assert said in err[0]
    assert not (tmp_path / "runs").exists()  # nothing was begun


def test_recipes_are_the_papers():
    from light_main import RECIPE as LIGHT

    assert (RECIPE.epochs, RECIPE.batch_size) == (100, 256)
    assert (RECIPE.lr, RECIPE.weight_decay) == (0.1, 1e-4)
    assert (RECIPE.schedule, RECIPE.lr_step, RECIPE.lr_decay) == ("step", 30, 0.1)
    assert (LIGHT.epochs, LIGHT.batch_size, LIGHT.lr, LIGHT.weight_decay) == (400, 96, 0.045, 4e-5)
    assert (LIGHT.schedule, LIGHT.lr_decay) == ("exp", 0.98)
    assert DEMOS["demo:digits"]["arch"] == "eca_resnet18"
