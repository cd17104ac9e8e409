"""`main.py -e --real-labels`: top-1 by ReaL labels, against the authors' formula."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.other_sets import (
    OUTPUTS,
    SHUFFLED,
    SIZE,
    WNIDS,
    evaluated,
    logits_of,
    measured,
    reference,
    refused,
    write_images,
)

REAL = re.compile(r"ReaL labels: (\d+) images with labels  top-1 ([\d.]+) %")


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
def test_real_labels(call, network_of_twelve, validation, real, request, tmp_path, kind):
    names = SHUFFLED if kind == "named" else WNIDS
    logits, files = logits_of(network_of_twelve, validation)
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


def test_real_labels_over_two_ranks(run, network_of_twelve, named, validation, real):
    logits, files = logits_of(network_of_twelve, validation)
    counted, top1 = real_reference(logits, files, real, SHUFFLED)
    flags = ("-e", "--resume", named, *SIZE, "--device", "cpu", "--real-labels", real)
    done = run("main.py", *flags, validation, ranks=2)
    assert done.returncode == 0, done.stderr
    assert f"{counted} images with labels  top-1 {top1:.3f} %" in done.stdout


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("no json", "not a JSON list of lists"),
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
