"""pip builds a wheel of this repository: the package eca_net, complete, and importable anywhere."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.trees import ROOT

from models import __version__

WHAT_IS_BUILT = ("pyproject.toml", "LICENSE", "docs/ECOSYSTEM.md", "models")
TRIAL = """
import sys
import eca_net
foreign = {"torchvision", "safetensors", "huggingface_hub", "utils", "models"} & sys.modules.keys()
assert not foreign, foreign
from eca_net.fused import cpu_passes
assert cpu_passes.SOURCE.read_text().count("eca_") > 1, cpu_passes.SOURCE
network = eca_net.create_model("eca_resnet50")
print(eca_net.__file__)
print(eca_net.__version__)
print(sum(p.numel() for p in network.parameters()))
"""


def run(folder: Path, *command: str, path: Path | None = None) -> str:
    """Runs Python in `folder`, with `path` as the only place outside of the environment."""
    # The child must not find models/ by a variable of whoever runs the tests.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy: setuptools writes folders of its own beside the source."""
    source = tmp_path_factory.mktemp("source")
    for name in WHAT_IS_BUILT:
        here, there = ROOT / name, source / name
        there.parent.mkdir(exist_ok=True)
        if here.is_dir():
            shutil.copytree(here, there, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(here, there)
    out = tmp_path_factory.mktemp("wheel")
    flags = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    run(source, "-m", "pip", "wheel", *flags, "--wheel-dir", str(out), ".")
    (file,) = out.glob("*.whl")
    return file


def test_the_wheel_holds_models_and_nothing_else(wheel):
    assert wheel.name == f"eca_net-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        (info,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        lines = archive.read(info).decode().splitlines()
    files = [*(ROOT / "models").rglob("*.py"), *(ROOT / "models").rglob("*.cpp")]
    assert held == {f"eca_net/{path.relative_to(ROOT / 'models').as_posix()}" for path in files}
    assert "eca_net/fused/native.cpp" in held
    assert f"Version: {__version__}" in lines
    assert "License-Expression: MIT" in lines
    needs = [line.split(": ")[1] for line in lines if line.startswith("Requires-Dist")]
    (always,) = (line for line in needs if "extra ==" not in line)
    assert always in (ROOT / "requirements.txt").read_text().splitlines()
    assert always.startswith("torch>=")


def test_it_is_imported_from_a_fresh_folder(wheel, tmp_path):
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(installed)
    file, said, count = run(elsewhere, "-c", TRIAL, path=installed).splitlines()
    assert Path(file) == installed / "eca_net" / "__init__.py"
    assert said == __version__
    assert int(count) == 25_557_112  # torchvision's 25,557,032 of ResNet-50, and 80 ECA weights


def test_every_module_of_it_imports(wheel, tmp_path):
    """Those of the Triton kernels only where Triton is."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    names = [path.relative_to(tmp_path) for path in (tmp_path / "eca_net").rglob("*.py")]
    modules = [".".join(name.with_suffix("").parts).removesuffix(".__init__") for name in names]
    has_triton = importlib.util.find_spec("triton") is not None
    wanted = [name for name in modules if has_triton or ".triton_" not in name]
    assert len(wanted) > 20
    text = f"import importlib\nfor name in {wanted!r}: importlib.import_module(name)\nprint('done')"
    assert run(tmp_path, "-c", text, path=tmp_path) == "done\n"


def test_its_weights_are_those_of_the_repository(wheel, tmp_path):
    """The same seed gives the same network under either name."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    text = "\n".join(
        (
            "import torch, {0} as package",
            "torch.manual_seed(3)",
            "network = package.create_model('eca_mobilenetv2', num_classes=5)",
            "torch.save(network.state_dict(), r'{1}')",
        )
    )
    files = [tmp_path / "package.pth", tmp_path / "repository.pth"]
    run(tmp_path, "-c", text.format("eca_net", files[0]), path=tmp_path)
    run(ROOT, "-c", text.format("models", files[1]))
    one, two = (torch.load(file, weights_only=True) for file in files)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
