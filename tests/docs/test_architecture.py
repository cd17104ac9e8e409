"""docs/ARCHITECTURE.md shows the layout and the arrows that the code has."""

import importlib.util
import re

from helpers.trees import ROOT

from tests.test_laws import ARROWS

TEXT = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")


def test_the_layout_is_that_of_the_code():
    spec = importlib.util.spec_from_file_location("layout", ROOT / "docs" / "write_layout.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.with_layout(TEXT) == TEXT, "run python docs/write_layout.py"
    assert "main.py" in module.layout()
    assert TEXT.count(".py") > 100


def test_the_arrows_are_those_of_the_law():
    block = TEXT.split("```text")[1].split("```")[0]
    shown = {}
    for line in block.splitlines():
        match = re.match(r"((?:utils|models)[\w/]*)(?:\s+->\s+([\w/, ]+?))?(?:\s{3,}.*)?$", line)
        if match:
            here, names = match.groups()
            room = here.partition("/")[0]
            targets = [name.strip() for name in (names or "").split(",") if name.strip()]
            shown[here] = {n if n.startswith("models") else f"{room}/{n}" for n in targets}
    assert shown == {folder: set(to) for folder, to in ARROWS.items() if folder != "utils"}
