"""docs/ARCHITECTURE.md shows the arrows that the law has, and names that the code has."""

import re

from helpers.trees import ROOT

from tests.test_laws import ARROWS, FLOORS

TEXT = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")


def test_the_arrows_are_those_of_the_law():
    lines = re.findall(r"^utils/(\w+)(?: +-> +([\w, ]+))?$", TEXT, re.M)
    shown = {
        here: {name.strip() for name in names.split(",") if name.strip()} for here, names in lines
    }
    assert shown == {
        floor: {name.removeprefix("utils/") for name in ARROWS[f"utils/{floor}"] if "utils" in name}
        for floor in FLOORS
    }


def test_files_and_names_are_there():
    for file in re.findall(r"`((?:utils|models|tests|tools)/[\w/]+\.py)`", TEXT):
        if "NAME" not in file:
            assert (ROOT / file).exists(), file
    rows = [line for line in TEXT.splitlines() if line.startswith("| `")]
    for row in rows[:10]:
        files = re.findall(r"`([\w/]+\.py)`", row)
        source = "".join((ROOT / file).read_text(encoding="utf-8") for file in files)
        for name in re.findall(r"`([A-Za-z_]\w+)`", row):
            assert name in source, f"{name} is not in {files}"


def test_one_sitting():
    assert len(TEXT.split()) <= 900
