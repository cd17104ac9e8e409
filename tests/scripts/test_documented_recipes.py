"""The commands of docs/RECIPES.md are understood, and run at a size for tests."""

import json
import re

import pytest
from helpers.trees import ROOT

import main as script
from light_main import DEMOS as LIGHT_DEMOS
from light_main import RECIPE as LIGHT
from utils.config.recipes import RECIPES
from utils.data import demo_sets
from utils.runs import checkpoint

# Documented commands at a size for tests; DATA is the test's own, and so are the demo's images.
SMALL = ("-b", 8, "--epochs", 1)
SCALED = {
    "main.py": (*SMALL, "-a", "resnet18", "--img-size", 32, "--train-size", 24, "-j", 0),
    "light_main.py": (*SMALL, "--img-size", 32, "--train-size", 32, "-j", 0),
    "demo": SMALL,
}


def documented() -> list[str]:
    """The commands of docs/RECIPES.md."""
    lines = (ROOT / "docs" / "RECIPES.md").read_text().splitlines()
    return [line.split("  #")[0].strip() for line in lines if re.match("(python|torchrun) ", line)]


@pytest.mark.slow
@pytest.mark.parametrize("line", documented())
def test_documented_commands(call, run, tree, tmp_path, monkeypatch, line):
    monkeypatch.setattr(demo_sets, "HOME", tmp_path / "home")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "digits").symlink_to(tree)
    words = [str(tree) if word == "DATA" else word for word in line.split()]
    if words[0] == "torchrun":
        name, arguments = words[2], words[3:]
        done = run(name, *arguments, *SCALED[name], ranks=2)
        code, text = done.returncode, done.stdout + done.stderr
        best = tmp_path / "runs" / "resnet18-1" / "best.pth"
        assert call("-e", "--resume", best, "--output", tmp_path / "result")[0] == 0
        result = json.loads((tmp_path / "result" / "evaluation.json").read_text())
        wanted = checkpoint.load(best)["progress"]["best"]["val_loss"]
        assert result["loss"] == pytest.approx(wanted, rel=1e-3)  # of bfloat16, and one rank's
    else:
        name, arguments = words[1], words[2:]
        entry = script.main if name == "main.py" else lambda: script.main(LIGHT, LIGHT_DEMOS)
        scaled = SCALED["demo" if "demo:digits" in arguments else name]
        code, out, err = call(*arguments, *scaled, entry=entry)
        text = "\n".join([*out, *err])
    assert code == 0, text
    (folder,) = (tmp_path / "runs").iterdir()
    saved = checkpoint.load(folder / "last.pth")
    assert ("raw_state_dict" in saved) == (saved["recipe"]["ema"] > 0)
    assert not any(key.startswith("module.") for key in saved["state_dict"])
    if "--recipe" in arguments:
        chosen = arguments[arguments.index("--recipe") + 1]
        assert f"recipe {chosen}: 1 epoch, batch 8" in text
        assert saved["args"]["recipe"] == chosen
        if "--ema" not in arguments:
            assert saved["recipe"]["ema"] == RECIPES[chosen].get("ema", 0.0)
