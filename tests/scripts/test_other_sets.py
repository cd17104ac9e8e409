"""`main.py -e` on sets like ImageNet-V2, -A and -R, against loops in float64."""

import json
from pathlib import Path

import pytest
from helpers.other_sets import (
    OUTPUTS,
    SHUFFLED,
    WNIDS,
    evaluated,
    logits_of,
    measured,
    reference,
    refused,
    write_images,
)
from helpers.shard_sets import make


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
def test_numbers_are_outputs_and_not_strings(call, network_of_twelve, numbered, request, kind):
    logits, files = logits_of(network_of_twelve, numbered)
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


def test_only_present_classes_are_compared_where_asked(
    call, network_of_twelve, named, five, tmp_path
):
    logits, files = logits_of(network_of_twelve, five / "val")
    labels = [SHUFFLED.index(file.parent.name) for file in files]
    compared = sorted(set(labels))
    want = reference(logits, labels, compared)
    assert want[0] != reference(logits, labels, list(range(OUTPUTS)))[0]
    result = tmp_path / "result"
    out = evaluated(call, named, "--present-classes", "--fast", "--output", result, five)
    assert measured(out) == pytest.approx(want, abs=2e-3)
    assert "  5 of the network's 12 classes: only their outputs are compared" in out
    assert "val: 30 images in 5 classes" in "\n".join(out)
    assert json.loads((result / "evaluation.json").read_text())["compared_classes"] == 5


def test_all_outputs_are_compared_where_not_asked_and_this_is_said(
    call, network_of_twelve, named, five
):
    logits, files = logits_of(network_of_twelve, five / "val")
    labels = [SHUFFLED.index(file.parent.name) for file in files]
    out = evaluated(call, named, five / "val")
    want = reference(logits, labels, list(range(OUTPUTS)))
    assert measured(out) == pytest.approx(want, abs=1e-3)
    assert any("all 12 outputs are compared; --present-classes compares" in line for line in out)


def test_names_for_weights_without_them(call, network_of_twelve, nameless, five, tmp_path):
    """As plain lines, as ImageNet's list of names, and as a folder of class folders."""
    plain, mapping = tmp_path / "wnids.txt", tmp_path / "LOC_synset_mapping.txt"
    plain.write_text("\n".join(WNIDS) + "\n")
    mapping.write_text("".join(f"{name} a fish, a Latin name\n" for name in WNIDS))
    imagenet = tmp_path / "imagenet"
    for name in WNIDS:
        (imagenet / "val" / name).mkdir(parents=True)
    logits, files = logits_of(network_of_twelve, five / "val")
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
    ],
)
def test_a_file_of_names_that_cannot_be_used(call, nameless, five, tmp_path, content, words):
    file = tmp_path / "names.txt"
    file.write_text(content)
    assert words in refused(call, "--resume", nameless, "--class-names", file, five)


def test_flags_of_evaluation_alone(call, named, tree, five, tmp_path):
    for flag in (["--present-classes"], ["--class-names", "x"], ["--real-labels", "x"]):
        code, _, err = call(*flag, tree)
        assert code != 0
        assert f"{flag[0]} does nothing without -e" in err[0]
    both = ("--present-classes", "--real-labels", tmp_path)
    assert "give one of them" in refused(call, "--resume", named, *both, five)
    assert "has its own" in refused(call, "--resume", named, "--class-names", tmp_path, five)
