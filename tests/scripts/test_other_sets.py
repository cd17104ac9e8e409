"""`main.py -e` on sets like ImageNet-V2, -A, -R and by ReaL labels, against loops in float64."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.shard_sets import make
from PIL import Image

import models
from models import weights
from utils.runs import checkpoint

OUTPUTS = 12  # more than ten: as strings, 10 and 11 come before 2
WNIDS = [f"n{1000 * k + 7:08}" for k in range(OUTPUTS)]
SHUFFLED = [WNIDS[(5 * k + 3) % OUTPUTS] for k in range(OUTPUTS)]
SIZE = ("--img-size", 32, "--crop-pct", 1, "-j", 0, "-b", 7)
FIGURES = re.compile(r"(\d+) images  top-1 ([\d.]+) %  top-5 ([\d.]+) %  loss ([\d.]+)")
REAL = re.compile(r"ReaL labels: (\d+) images with labels  top-1 ([\d.]+) %")
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def write_images(root: Path, folders: list[str], each: int = 3, name: str = "{}.png") -> Path:
    """root/FOLDER/NAME: images of 32 pixels, which evaluation at that size leaves as they are."""
    chance, count = np.random.default_rng(1), 0
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for _ in range(each):
            count += 1
            pixels = chance.integers(0, 256, (4, 4, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
            Image.fromarray(pixels).save(root / folder / name.format(count))
    return root


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    """A network of twelve outputs whose predictions differ from image to image."""
    torch.manual_seed(3)
    made = models.create_model("mobilenetv2", num_classes=OUTPUTS, width_mult=0.25)
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the mean of what it sees
    with torch.no_grad():
        made.train()(torch.randn(64, 3, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3))
        made.classifier[-1].weight.mul_(30)
    return made.eval()


@pytest.fixture
def nameless(network, tmp_path) -> Path:
    torch.save(network.state_dict(), tmp_path / "nameless.pth")
    return tmp_path / "nameless.pth"


@pytest.fixture
def named(network, tmp_path) -> Path:
    """Its classes stand in another order than the sorted one."""
    fields = {**weights.describe_network(network), "classes": SHUFFLED}
    fields |= {"img_size": 32, "crop_pct": 1.0, "state_dict": network.state_dict()}
    checkpoint.save(tmp_path / "named.pth", fields)
    return tmp_path / "named.pth"


def logits_of(network, root: Path) -> tuple[np.ndarray, list[Path]]:
    """Logits (n, 12) in float64 of every image below `root`, and their files."""
    import copy

    files = sorted(root.glob("*/*.png"))
    pixels = np.stack([np.asarray(Image.open(file), np.float64) / 255 for file in files])
    batch = torch.from_numpy(((pixels - MEAN) / STD).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        return copy.deepcopy(network).double()(batch).numpy(), files


def reference(logits: np.ndarray, labels: list[int], compared: list[int]) -> list[float]:
    """top-1, top-5 and loss, by a loop, over the outputs `compared`."""
    first = fifth = loss = 0.0
    for row, label in zip(logits, labels, strict=True):
        scores = {output: row[output] for output in compared}
        order = sorted(scores, key=scores.__getitem__, reverse=True)
        first += order[0] == label
        fifth += label in order[:5]
        top = max(scores.values())
        loss += np.log(sum(np.exp(s - top) for s in scores.values())) + top - scores[label]
    n = len(labels)
    return [100 * first / n, 100 * fifth / n, loss / n]


def measured(lines: list[str]) -> list[float]:
    found = [FIGURES.match(line) for line in lines]
    (found,) = filter(None, found)
    return [float(text) for text in found.groups()[1:]]


def evaluated(call, ckpt: Path, *arguments) -> list[str]:
    code, out, err = call("-e", "--resume", ckpt, *SIZE, *arguments)
    assert code == 0, err
    return out


def refused(call, *arguments) -> str:
    code, _, err = call("-e", *SIZE, *arguments)
    assert code != 0
    assert len(err) == 1, err
    return err[0]


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> Path:
    """ImageNet-V2's form."""
    return write_images(tmp_path_factory.mktemp("v2"), [str(k) for k in range(OUTPUTS)])


@pytest.fixture(scope="module")
def five(tmp_path_factory) -> Path:
    """The form of ImageNet-A and -R: some of the classes, below val/."""
    root = tmp_path_factory.mktemp("rendition")
    write_images(root / "val", [WNIDS[k] for k in (1, 4, 6, 7, 11)], 6)
    (root / "val" / "README.txt").write_text("of the authors")
    return root


@pytest.mark.parametrize("kind", ["nameless", "named"])
def test_numbers_are_outputs_and_not_strings(call, network, numbered, request, kind):
    logits, files = logits_of(network, numbered)
    labels = [int(file.parent.name) for file in files]
    as_strings = sorted(map(str, range(OUTPUTS)))
    wrong = [as_strings.index(file.parent.name) for file in files]
    want = reference(logits, labels, list(range(OUTPUTS)))
    assert want != reference(logits, wrong, list(range(OUTPUTS)))
    out = evaluated(call, request.getfixturevalue(kind), numbered)
    assert measured(out) == pytest.approx(want, abs=1e-3)
    said = next(line for line in out if "the class folders are numbers, 0 to 11" in line)
    assert kind == "nameless" or f"0 is {SHUFFLED[0]}" in said


def test_shards_of_numbered_folders_give_the_same(call, named, numbered, tmp_path, monkeypatch):
    """The names of the classes come from the shards' classes.txt."""
    for part in ("train", "val"):
        (tmp_path / "tree" / part).parent.mkdir(exist_ok=True)
        (tmp_path / "tree" / part).symlink_to(numbered)
    shards = make(monkeypatch, tmp_path / "tree", tmp_path / "shards")
    assert measured(evaluated(call, named, shards)) == measured(evaluated(call, named, numbered))


@pytest.mark.parametrize("fast", [(), ("--fast",)])
def test_only_present_classes_are_compared_where_asked(call, network, named, five, tmp_path, fast):
    logits, files = logits_of(network, five / "val")
    labels = [SHUFFLED.index(file.parent.name) for file in files]
    compared = sorted(set(labels))
    want = reference(logits, labels, compared)
    assert want[0] != reference(logits, labels, list(range(OUTPUTS)))[0]
    result = tmp_path / f"result{len(fast)}"
    out = evaluated(call, named, "--present-classes", *fast, "--output", result, five)
    assert measured(out) == pytest.approx(want, abs=2e-3)
    assert "  5 of the network's 12 classes: only their outputs are compared" in out
    assert "val: 30 images in 5 classes" in "\n".join(out)
    assert json.loads((result / "evaluation.json").read_text())["compared_classes"] == 5


def test_all_outputs_are_compared_where_not_asked_and_this_is_said(call, network, named, five):
    logits, files = logits_of(network, five / "val")
    labels = [SHUFFLED.index(file.parent.name) for file in files]
    out = evaluated(call, named, five / "val")
    want = reference(logits, labels, list(range(OUTPUTS)))
    assert measured(out) == pytest.approx(want, abs=1e-3)
    assert any("all 12 outputs are compared; --present-classes compares" in line for line in out)


def test_names_for_weights_without_them(call, network, nameless, five, tmp_path):
    """As plain lines, as ImageNet's list of names, and as a folder of class folders."""
    plain, mapping = tmp_path / "wnids.txt", tmp_path / "LOC_synset_mapping.txt"
    plain.write_text("\n".join(WNIDS) + "\n")
    mapping.write_text("".join(f"{name} a fish, a Latin name\n" for name in WNIDS))
    imagenet = tmp_path / "imagenet"
    for name in WNIDS:
        (imagenet / "val" / name).mkdir(parents=True)
    logits, files = logits_of(network, five / "val")
    labels = [WNIDS.index(file.parent.name) for file in files]
    want = reference(logits, labels, sorted(set(labels)))
    for source in (plain, mapping, imagenet, imagenet / "val"):
        out = evaluated(call, nameless, "--present-classes", "--class-names", source, five)
        assert measured(out) == pytest.approx(want, abs=1e-3)


def test_whole_names_say_how_they_are_matched(call, nameless, tmp_path):
    data = write_images(tmp_path / "data", WNIDS, 1)
    out = evaluated(call, nameless, data)
    assert f"{WNIDS[0]} is taken as output 0, {WNIDS[-1]} as the last one" in "\n".join(out)


def test_what_cannot_be_matched_is_refused(call, nameless, named, numbered, five, tmp_path):
    assert "--class-names must say" in refused(call, "--resume", nameless, five)
    from_one = write_images(tmp_path / "one", [str(k + 1) for k in range(OUTPUTS)], 1)
    assert "numbers, but not 0 to 11" in refused(call, "--resume", nameless, from_one)
    assert "not among the 12 known classes" in refused(call, "--resume", named, from_one)
    part = write_images(tmp_path / "part", ["0", "1", "2"], 1)
    assert "not among the 12 known classes" in refused(call, "--resume", named, part)
    assert "does nothing here" in refused(call, "--resume", named, "--present-classes", numbered)
    one = write_images(tmp_path / "alone", [WNIDS[0]], 1)
    assert "nothing to compare" in refused(call, "--resume", named, "--present-classes", one)
    training = write_images(tmp_path / "data" / "train", WNIDS, 1).parent
    assert "no such folder" in refused(call, "--resume", named, training)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a\nb\n", "2 names for 12 outputs"),
        ("\n".join(["a", *WNIDS[1:-1], "a"]), "a is there twice"),
        (None, "no such file or folder"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
    ],
)
def test_a_file_of_names_that_cannot_be_used(call, nameless, five, tmp_path, content, words):
    file = tmp_path / "names.txt"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert words in refused(call, "--resume", nameless, "--class-names", file, five)


def test_flags_of_evaluation_alone(call, named, tree, five, tmp_path):
    for flag in (["--present-classes"], ["--class-names", "x"], ["--real-labels", "x"]):
        code, _, err = call(*flag, tree)
        assert code != 0
        assert f"{flag[0]} does nothing without -e" in err[0]
    both = ("--present-classes", "--real-labels", tmp_path)
    assert "give one of them" in refused(call, "--resume", named, *both, five)
    assert "has its own" in refused(call, "--resume", named, "--class-names", tmp_path, five)


@pytest.fixture
def validation(tmp_path) -> Path:
    """ImageNet's validation images: their names count them, whatever the folder."""
    return write_images(tmp_path / "imagenet", SHUFFLED, 3, "ILSVRC2012_val_{:08}.png")


@pytest.fixture
def real(tmp_path) -> Path:
    """Of 40 images, three of ours without a label, and some with several."""
    chance = np.random.default_rng(5)
    table = [chance.choice(OUTPUTS, chance.integers(1, 6), False).tolist() for _ in range(40)]
    for empty in (2, 17, 30, 38):
        table[empty] = []
    (tmp_path / "real.json").write_text(json.dumps(table))
    return tmp_path / "real.json"


def real_reference(logits: np.ndarray, files: list[Path], real: Path, names) -> tuple[int, float]:
    """The authors' formula: a class's number is its place among the sorted names."""
    table = json.loads(real.read_text())
    order = sorted(names)
    right = []
    for row, file in zip(logits, files, strict=True):
        labels = table[int(file.stem.rpartition("_")[2]) - 1]
        if labels:
            right.append(order.index(names[int(np.argmax(row))]) in labels)
    return len(right), 100 * float(np.mean(right))


@pytest.mark.parametrize("kind", ["nameless", "named"])
def test_real_labels(call, network, validation, real, request, tmp_path, kind):
    names = SHUFFLED if kind == "named" else WNIDS
    logits, files = logits_of(network, validation)
    counted, top1 = real_reference(logits, files, real, names)
    assert counted == 33
    assert 0 < top1 < 100
    flags = ("--real-labels", real, "--output", tmp_path / "result")
    out = evaluated(call, request.getfixturevalue(kind), *flags, validation)
    (found,) = filter(None, map(REAL.match, out))
    assert int(found[1]) == counted
    assert float(found[2]) == pytest.approx(top1, abs=1e-3)
    labels = [names.index(file.parent.name) for file in files]
    want = reference(logits, labels, list(range(OUTPUTS)))
    assert measured(out) == pytest.approx(want, abs=1e-3)
    result = json.loads((tmp_path / "result" / "evaluation.json").read_text())
    assert (result["real_images"], result["real_top1"]) == (counted, pytest.approx(top1))


def test_real_labels_over_two_ranks(run, network, named, validation, real):
    logits, files = logits_of(network, validation)
    counted, top1 = real_reference(logits, files, real, SHUFFLED)
    flags = ("-e", "--resume", named, *SIZE, "--device", "cpu", "--real-labels", real)
    done = run("main.py", *flags, validation, ranks=2)
    assert done.returncode == 0, done.stderr
    assert f"{counted} images with labels  top-1 {top1:.3f} %" in done.stdout


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("no json", "not a JSON list of lists"),
        ("[" * 100000, "not a JSON list of lists"),
        ('{"1": [2]}', "not a JSON list of lists"),
        ("[[1], 2]", "not a JSON list of lists"),
        ("[[true]]", "not a JSON list of lists"),
        (json.dumps([[1]] * 20), "labels for 20 images, and the data has image 36"),
        (json.dumps([[1], [12]] * 20), "image 2 has class 12"),
        (json.dumps([[]] * 40), "none of these images has a label"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_not_real_json(call, named, validation, tmp_path, content, words):
    file = tmp_path / "other.json"
    if content is not None:
        file.write_text(content)
    assert words in refused(call, "--resume", named, "--real-labels", file, validation)


def test_images_and_classes_that_real_labels_are_not_of(call, named, nameless, real, tmp_path):
    flags = ("--real-labels", real)
    other = write_images(tmp_path / "other", WNIDS, 1)
    assert "is not named ILSVRC2012_val_" in refused(call, "--resume", named, *flags, other)
    words = [f"class {k:02}" for k in range(OUTPUTS)]
    other = write_images(tmp_path / "words", words, 1, "ILSVRC2012_val_{:08}.png")
    assert "sorted WordNet numbers" in refused(call, "--resume", nameless, *flags, other)
    twice = write_images(tmp_path / "twice", WNIDS, 1, "ILSVRC2012_val_00000003.png")
    assert "image 3 more than once" in refused(call, "--resume", named, *flags, twice)
