"""The laws of the house: which folder may import which, and how long files and functions are."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from helpers.trees import ROOT

# Folder -> the folders that its files may import from, besides their own. docs/ARCHITECTURE.md
# shows the same arrows.
ARROWS: Mapping[str, frozenset[str]] = {
    "utils": frozenset(),
    "utils/system": frozenset(),
    "utils/recipes": frozenset(),
    "utils/cost": frozenset({"utils/system"}),
    "utils/data": frozenset({"utils/system", "utils/recipes"}),
    "utils/training": frozenset({"utils/system"}),
    "utils/runs": frozenset({"utils/system", "utils/recipes", "utils/data"}),
    "utils/classification": frozenset(
        {"utils/training", "utils/runs", "utils/data", "utils/recipes", "utils/system"}
    ),
    "utils/detection": frozenset(
        {"utils/training", "utils/runs", "utils/data", "utils/recipes", "utils/system"}
    ),
    "utils/inspection": frozenset({"utils/detection", "utils/data", "utils/system"}),
    "utils/study": frozenset({"utils/data", "utils/system"}),
    "utils/options": frozenset({"utils/recipes", "utils/data", "utils/inspection", "utils/system"}),
    "models": frozenset({"models/fused"}),
    "models/fused": frozenset({"models/eca_module"}),
    "models/detection": frozenset({"models"}),
}
OPEN = ("", "tools", "benchmarks")  # scripts and tools may import models and utils
JOINING = "assembly"  # what joins models and utils for the training scripts, which alone import it
LONGEST_FILE, LONGEST_FUNCTION = 300, 60
LONGEST_SCRIPT = 200  # of the training scripts, which are read from top to bottom
WITH_ARGS = ("utils/options", JOINING)  # where a parsed command line may be called `args`
OUTSIDE = {  # packages that models/ may import besides torch and Python's own
    "models/detection": {"torchvision"},
    "models/pretrained": {"safetensors", "huggingface_hub"},  # inside of its functions
    "models/timm_registry": {"timm"},
    "models/fused/triton_channel_kernels": {"triton"},
    "models/fused/triton_grids": {"triton"},
    "models/fused/triton_launches": {"triton"},
    "models/fused/triton_pass_kernels": {"triton"},
}


def sources(root: Path) -> list[Path]:
    """Every file of the program: scripts, models, utils and tools."""
    rooms = [root / name for name in ("models", "utils", JOINING, "tools", "benchmarks")]
    return sorted([*root.glob("*.py"), *(path for room in rooms for path in room.rglob("*.py"))])


def module_of(path: Path, root: Path) -> str:
    """A file's name with slashes and without its ending: `utils/runs/resume`, `models`."""
    name = path.relative_to(root).with_suffix("").as_posix()
    return name.removesuffix("/__init__")


def folder_of(module: str, root: Path) -> str:
    """The folder that a module lies in; a package lies in itself."""
    if (root / module).is_dir():
        return module
    return module.rpartition("/")[0]


def imported(path: Path, root: Path, at_once: bool = False) -> Iterator[str]:
    """Modules that a file imports, those of the repository as `module_of` names them.

    Args:
        at_once: only what is imported together with the file, not inside of its functions.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = path.parent.relative_to(root).parts
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.replace(".", "/") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            start = "/".join([*base, *(node.module or "").split(".")]).rstrip("/")
            for alias in node.names:
                inner = f"{start}/{alias.name}"
                is_module = (root / f"{inner}.py").exists() or (root / inner).is_dir()
                yield inner if is_module else start


def broken_arrows(root: Path) -> list[str]:
    """Imports that the law of arrows forbids, one line each."""
    found = []
    for path in sources(root):
        module = module_of(path, root)
        here = folder_of(module, root)
        if here in OPEN:
            continue
        scripts = {script.stem for script in root.glob("*.py")}
        for name in imported(path, root):
            top = name.partition("/")[0]
            if top in scripts or top in ("tools", "benchmarks", "tests"):
                found.append(f"{module} -> {name}")
            if here == JOINING:
                continue
            if top == JOINING:
                found.append(f"{module} -> {name}")
            if top not in ("models", "utils"):
                continue
            there = folder_of(name, root)
            if there != here and not {there, name} & ARROWS[here]:
                found.append(f"{module} -> {name}")
    return found


def circles(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """Circles in a graph, each as the list of its nodes."""
    found, done, path = [], set(), []

    def visit(node: str) -> None:
        if node in path:
            found.append(path[path.index(node) :])
            return
        if node in done:
            return
        path.append(node)
        for other in sorted(arrows.get(node, ())):
            visit(other)
        path.pop()
        done.add(node)

    for node in sorted(arrows):
        visit(node)
    return found


def file_arrows(root: Path) -> dict[str, set[str]]:
    modules = {module_of(path, root): path for path in sources(root)}
    return {
        module: {name for name in imported(path, root, at_once=True) if name in modules} - {module}
        for module, path in modules.items()
    }


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def planted(tmp_path: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_every_folder_has_its_arrows():
    folders = {folder_of(module_of(path, ROOT), ROOT) for path in sources(ROOT)}
    assert folders == {*ARROWS, *OPEN, JOINING}
    assert len(sources(ROOT)) > 100


def test_imports_follow_the_arrows():
    assert broken_arrows(ROOT) == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("utils/system/files.py", "from utils.runs import resume\n"),
        ("utils/training/epochs.py", "def f():\n    import utils.runs.resume\n"),
        ("utils/classification/engine.py", "from utils.detection.engine import detect\n"),
        ("utils/runs/resume.py", "import models\n"),
        ("utils/runs/resume.py", "import main\n"),
        ("utils/runs/resume.py", "from assembly import detector\n"),
        ("assembly/detector.py", "import main\n"),
        ("models/weights.py", "from utils.runs import resume\n"),
        ("models/fused/passes.py", "from ..weights import load\n"),
        ("models/weights.py", "from .detection.engine import x\n"),
    ],
)
def test_a_planted_import_breaks_the_law(tmp_path: Path, file: str, text: str):
    names = ("utils/runs/resume", "utils/detection/engine", "models/weights", "models/__init__")
    names += ("models/detection/engine", "main", "assembly/detector")
    root = planted(tmp_path, {**{f"{name}.py": "" for name in names}, file: text})
    assert len(broken_arrows(root)) == 1


def test_no_circle_of_files_or_folders():
    assert circles(file_arrows(ROOT)) == []
    assert circles({folder: {*to} - {"models/eca_module"} for folder, to in ARROWS.items()}) == []


def test_a_planted_circle_is_found(tmp_path: Path):
    texts = {"utils/a.py": "from utils import b\n", "utils/b.py": "from utils.a import x\n"}
    assert circles(file_arrows(planted(tmp_path, texts))) == [["utils/a", "utils/b"]]


def test_models_need_torch_alone():
    standard = {*sys.stdlib_module_names} - {"argparse"}
    for path in (path for path in sources(ROOT) if path.is_relative_to(ROOT / "models")):
        module = module_of(path, ROOT)
        allowed = {"torch", "models", *standard}
        for name in (module, folder_of(module, ROOT)):
            allowed |= OUTSIDE.get(name, set())
        foreign = {name.partition("/")[0] for name in imported(path, ROOT)} - allowed
        assert not foreign, f"{module}: {foreign}"


def test_the_layer_needs_torch_alone():
    found = set(imported(ROOT / "models" / "eca_module.py", ROOT))
    assert found <= {"torch", "math", "collections/abc", "numbers", "typing"}


def test_args_stop_at_scripts_options_and_tools():
    """Below them nothing takes or keeps a parsed command line."""
    for path in sources(ROOT):
        module = module_of(path, ROOT)
        if folder_of(module, ROOT) in (*OPEN, *WITH_ARGS):
            continue
        for function in functions(path):
            given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            names = {argument.arg for argument in given}
            kinds = {ast.unparse(a.annotation) for a in given if a.annotation}
            assert not names & {"args", "opts"}, f"{module}: {function.name}"
            assert not kinds & {"Namespace", "argparse.Namespace"}, f"{module}: {function.name}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                assert node.attr != "args", f"{module}: line {node.lineno}"


def lengths(root: Path) -> dict[str, int]:
    """Lines of every file, and of every function as `file:name`."""
    found: dict[str, int] = {}
    for path in sources(root):
        module = module_of(path, root)
        found[module] = len(path.read_text(encoding="utf-8").splitlines())
        for function in functions(path):
            name = f"{module}:{function.name}"
            lines = function.end_lineno - function.lineno + 1
            found[name] = max(lines, found.get(name, 0))
    return found


def too_long(found: Mapping[str, int]) -> dict[str, int]:
    limits = {name: LONGEST_FUNCTION if ":" in name else LONGEST_FILE for name in found}
    return {name: lines for name, lines in found.items() if lines > limits[name]}


def test_files_and_functions_are_short():
    found = lengths(ROOT)
    assert too_long(found) == {}
    assert max(found["main"], found["detect_main"]) <= LONGEST_SCRIPT


def test_files_of_tests_are_short():
    files = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "docs").glob("*.py")]
    counted = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {path: lines for path, lines in counted.items() if lines > LONGEST_FILE} == {}


def test_a_planted_long_function_is_found(tmp_path: Path):
    body = "    x = 1\n" * LONGEST_FUNCTION
    root = planted(
        tmp_path, {"utils/a.py": f"def f():\n{body}", "utils/b.py": "def f():\n    x = 1\n"}
    )
    assert too_long(lengths(root)) == {"utils/a:f": LONGEST_FUNCTION + 1}


@pytest.mark.parametrize("script", ["main.py", "light_main.py", "predict.py", "export.py"])
def test_help_comes_without_slow_imports(script: str):
    """What help does not use is imported when used: torchvision takes half as long as torch."""
    found = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / script, "-h"],
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    names = {line.rpartition("|")[2].strip() for line in found.stderr.splitlines()}
    assert "torch" in names
    slow = {"torchvision", "torch._dynamo", "matplotlib", "tensorboard", "sklearn", "timm", "thop"}
    assert not names & (slow | {"torch.utils.tensorboard", "sympy", "onnx", "openvino"})


@pytest.mark.parametrize("path", sources(ROOT), ids=lambda path: module_of(path, ROOT))
def test_assertions_do_nothing(path):
    """`python -O` takes them away: what they call would not be done."""
    asserts = [
        n
        for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(n, ast.Assert)
    ]
    calls = [n for found in asserts for n in ast.walk(found.test) if isinstance(n, ast.Call)]
    assert all(ast.unparse(call.func) == "isinstance" for call in calls)
