"""The house's laws that a program can check."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    [
        *ROOT.glob("*.py"),
        *(p for room in ("models", "utils", "tools") for p in (ROOT / room).rglob("*.py")),
    ]
)


def imported(path: Path, at_once: bool = False) -> set[str]:
    """What a file imports; `at_once`: when it is imported itself, not inside of its functions."""
    names = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.split(".")[0])
    return names


SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
OF_MODELS = {"torch", "models", *sys.stdlib_module_names} - {"argparse"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_models_and_utils_never_import_each_other(path: Path):
    home, names = path.parent.name, imported(path)
    if home == "models":
        further = {"eca_detection": "torchvision", "eca_triton": "triton"}
        further = {name for prefix, name in further.items() if path.stem.startswith(prefix)}
        assert names <= OF_MODELS | further
    if home == "utils":
        assert {"main", "detect_main", "attention"} <= SCRIPTS
        assert not names & {"models", *SCRIPTS}


def test_the_layer_needs_torch_alone():
    standard = {"math", "collections", "numbers"}
    assert imported(ROOT / "models" / "eca_module.py", at_once=True) <= {"torch", *standard}


def test_args_stop_at_the_scripts():
    """No function below the scripts takes a parsed command line."""
    for path in SOURCES:
        if path.parent == ROOT:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                taken = {a.arg for a in [*node.args.args, *node.args.kwonlyargs]}
                annotated = {ast.unparse(a.annotation) for a in node.args.args if a.annotation}
                assert not annotated & {"Namespace", "argparse.Namespace"}, f"{path}: {node.name}"
                if node.name not in ("parse_args",):  # argparse's own signature
                    assert not taken & {"args", "opts"}, f"{path}: {node.name}"
