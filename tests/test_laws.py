"""The laws of the house: which folder may import which, and how long files and functions are."""

import ast
import functools
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from helpers.trees import ROOT, write_tree
from PIL import Image

# Folder -> the folders that its files may import from, besides their own: the floors of the house.
# docs/ARCHITECTURE.md shows the same arrows. Everything may import `models` but `utils/system`.
FLOORS = ("system", "data", "config", "runs", "training", "inspection", "command_line")
ARROWS: Mapping[str, frozenset[str]] = {
    "utils": frozenset(),
    **{
        f"utils/{floor}": frozenset(f"utils/{below}" for below in FLOORS[:number])
        | ({"models", "models/detection", "models/fused"} if number else frozenset())
        for number, floor in enumerate(FLOORS)
    },
    "models": frozenset({"models/fused"}),
    "models/fused": frozenset({"models/eca_module"}),
    "models/detection": frozenset({"models"}),
}
OPEN = ("", "tools", "benchmarks")  # scripts and tools may import models and utils
LONGEST_FILE, LONGEST_FUNCTION = 600, 60
LONGEST_SCRIPT = 240  # of the training scripts, which are read from top to bottom
MOST_FILES = 14  # of a folder
MOST_FILES_OF_A_RUN = 40
WITH_ARGS = "utils/command_line"  # where a parsed command line may be called `args`
OUTSIDE = {  # packages that models/ may import besides torch and Python's own
    "models/detection": {"torchvision"},
    "models/pretrained": {"safetensors", "huggingface_hub"},  # inside of its functions
    "models/attention": {"timm"},
    "models/registry": {"timm", "torchvision"},
    "models/timm_registry": {"timm"},
    "models/fused/triton_kernels": {"triton"},
    "models/fused/triton_tail": {"triton"},
}


@functools.cache
def sources(root: Path) -> dict[str, Path]:
    """Every file of the program by its name with slashes: `utils/runs/resume`, `models`."""
    rooms = [root / name for name in ("models", "utils", "tools", "benchmarks")]
    files = sorted([*root.glob("*.py"), *(path for room in rooms for path in room.rglob("*.py"))])
    names = (path.relative_to(root).with_suffix("").as_posix() for path in files)
    return dict(zip((name.removesuffix("/__init__") for name in names), files, strict=True))


def folder_of(module: str, root: Path) -> str:
    """The folder that a module lies in; a package lies in itself."""
    return module if (root / module).is_dir() else module.rpartition("/")[0]


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@functools.cache
def imported(path: Path, root: Path) -> frozenset[str]:
    """Modules that a file imports, also inside of its functions, as `sources` names them."""
    names, package = set(), path.parent.relative_to(root).parts
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name.replace(".", "/") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            start = "/".join([*base, *(node.module or "").split(".")]).rstrip("/")
            for inner in (f"{start}/{alias.name}" for alias in node.names):
                is_module = (root / f"{inner}.py").exists() or (root / inner).is_dir()
                names.add(inner if is_module else start)
    return frozenset(names)


def broken_arrows(root: Path) -> list[str]:
    """Imports that the law of arrows forbids, one line each."""
    closed = {script.stem for script in root.glob("*.py")} | {"tools", "benchmarks", "tests"}
    broken = []
    for module, path in sources(root).items():
        here = folder_of(module, root)
        for name in imported(path, root) if here not in OPEN else ():
            top, there = name.partition("/")[0], folder_of(name, root)
            ours = top in ("models", "utils") and there != here
            if top in closed or (ours and not {there, name} & ARROWS[here]):
                broken.append(f"{module} -> {name}")
    return broken


def circles(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """Circles in a graph, each as the list of its nodes."""
    closed, done, path = [], set(), []

    def visit(node: str) -> None:
        if node in path:
            closed.append(path[path.index(node) :])
        elif node not in done:
            path.append(node)
            for other in sorted(arrows.get(node, ())):
                visit(other)
            path.pop()
            done.add(node)

    for node in sorted(arrows):
        visit(node)
    return closed


def file_arrows(root: Path) -> dict[str, set[str]]:
    modules = sources(root)
    return {name: {*imported(path, root)} & {*modules} - {name} for name, path in modules.items()}


def planted(tmp_path: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_every_folder_has_its_arrows():
    assert {folder_of(module, ROOT) for module in sources(ROOT)} == {*ARROWS, *OPEN}
    assert len(sources(ROOT)) > 80


def test_imports_follow_the_arrows():
    assert broken_arrows(ROOT) == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("utils/system/files.py", "from utils.runs import resume\n"),
        ("utils/system/files.py", "import models\n"),
        ("utils/runs/resume.py", "def f():\n    import utils.training.state\n"),
        ("utils/training/state.py", "from utils.command_line.parser import Parser\n"),
        ("utils/runs/resume.py", "import main\n"),
        ("models/weights.py", "from utils.runs import resume\n"),
        ("models/fused/passes.py", "from ..weights import load\n"),
        ("models/weights.py", "from .detection.detectors import x\n"),
    ],
)
def test_a_planted_import_breaks_the_law(tmp_path: Path, file: str, text: str):
    names = ("utils/runs/resume", "utils/training/state", "utils/command_line/parser", "main")
    names += ("models/weights", "models/__init__", "models/detection/detectors")
    root = planted(tmp_path, {**{f"{name}.py": "" for name in names}, file: text})
    assert len(broken_arrows(root)) == 1


def test_no_circle_of_files_or_folders(tmp_path: Path):
    assert circles(file_arrows(ROOT)) == []
    assert circles({folder: {*to} - {"models/eca_module"} for folder, to in ARROWS.items()}) == []
    late = "def f():\n    from utils.a import x\n"
    root = planted(tmp_path, {"utils/a.py": "from utils import b\n", "utils/b.py": late})
    assert circles(file_arrows(root)) == [["utils/a", "utils/b"]]


def test_models_need_torch_alone():
    standard = {*sys.stdlib_module_names} - {"argparse"}
    for module, path in sources(ROOT).items():
        if module.partition("/")[0] != "models":
            continue
        outside = OUTSIDE.get(module, set()) | OUTSIDE.get(folder_of(module, ROOT), set())
        foreign = {name.partition("/")[0] for name in imported(path, ROOT)} - outside
        assert foreign <= {"torch", "models", *standard}, module
    layer = imported(ROOT / "models" / "eca_module.py", ROOT)
    assert layer <= {"torch", "math", "collections/abc", "numbers", "typing"}


def test_args_stop_at_the_command_line():
    """Below it nothing takes or keeps a parsed command line."""
    for module, path in sources(ROOT).items():
        if folder_of(module, ROOT) in (*OPEN, WITH_ARGS):
            continue
        for node in nodes(path):
            if isinstance(node, ast.arguments):
                for part in (*node.posonlyargs, *node.args, *node.kwonlyargs):
                    kind = ast.unparse(part.annotation) if part.annotation else ""
                    assert part.arg not in ("args", "opts"), f"{module}: line {part.lineno}"
                    assert kind.rpartition(".")[2] != "Namespace", f"{module}: line {part.lineno}"
            elif isinstance(node, ast.Attribute):
                assert node.attr != "args", f"{module}: line {node.lineno}"


def too_long(root: Path) -> dict[str, int]:
    """Files that have more lines than a law allows, and functions as `file:name`."""
    long = {}
    for module, path in sources(root).items():
        limit = LONGEST_SCRIPT if module in ("main", "detect_main") else LONGEST_FILE
        long[module] = len(path.read_text(encoding="utf-8").splitlines()), limit
        for function in functions(path):
            lines = function.end_lineno - function.lineno + 1
            long[f"{module}:{function.name}:{function.lineno}"] = lines, LONGEST_FUNCTION
    return {name: lines for name, (lines, limit) in long.items() if lines > limit}


def crowded(root: Path) -> dict[str, int]:
    """Folders with more files than one looks through."""
    folders = Counter(folder_of(module, root) for module in sources(root))
    return {name: n for name, n in folders.items() if n > MOST_FILES}


def test_files_functions_and_folders_are_small(tmp_path: Path):
    assert too_long(ROOT) == {}
    assert crowded(ROOT) == {}
    body = "    x = 1\n" * LONGEST_FUNCTION
    files = {f"utils/data/f{i}.py": "def f():\n    x = 1\n" for i in range(MOST_FILES + 1)}
    files |= {"utils/a.py": f"def f():\n{body}", "main.py": "\n" * (LONGEST_SCRIPT + 1)}
    root = planted(tmp_path, files)
    assert too_long(root) == {"utils/a:f:1": LONGEST_FUNCTION + 1, "main": LONGEST_SCRIPT + 1}
    assert crowded(root) == {"utils/data": MOST_FILES + 1}


def test_files_of_tests_are_short():
    for path in (ROOT / "tests").rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE, path


def unpacked(root: Path) -> list[str]:
    """Calls with three positions or more that were packed before: nobody sees which is which."""
    calls = []
    for module, path in sources(root).items():
        for inside in ([*ast.walk(function)] for function in functions(path)):
            packed = {
                ast.unparse(target)
                for node in inside
                if isinstance(node, ast.Assign) and len(getattr(node.value, "elts", ())) > 2
                for target in node.targets
            }
            for node in (node for node in inside if isinstance(node, ast.Call)):
                stars = [a.value for a in node.args if isinstance(a, ast.Starred)]
                if packed & {*map(ast.unparse, stars)}:
                    calls.append(f"{module}:{node.lineno}")
    return calls


def test_no_tuple_is_unpacked_into_a_call(tmp_path: Path):
    assert unpacked(ROOT) == []
    root = planted(tmp_path, {"utils/a.py": "def f():\n    parts = (1, 2, 3)\n    g(*parts)\n"})
    assert unpacked(root) == ["utils/a:3"]


@pytest.mark.parametrize("module", sources(ROOT))
def test_assertions_do_nothing(module: str):
    """`python -O` takes them away: what they call would not be done."""
    checks = [n.test for n in nodes(sources(ROOT)[module]) if isinstance(n, ast.Assert)]
    calls = [n for test in checks for n in ast.walk(test) if isinstance(n, ast.Call)]
    assert all(ast.unparse(call.func) == "isinstance" for call in calls)


# What a script runs and imports, in a fresh process: the files whose functions are called (an
# import runs a module's body and decorators, which are no step of a run), then all modules.
WATCHED = """
import runpy, sys
root, script, *_ = sys.argv = sys.argv[1:]
sys.argv[:] = sys.argv[1:]
sys.path.insert(0, root)
files = set()
def note(frame, event, _):  # returns nothing: the lines of a function are not traced
    name = frame.f_code.co_filename
    if name.startswith(root) and not frame.f_code.co_name.startswith("<"):
        files.add(name[len(root) + 1:])
__import__(script.removesuffix(".py"))
sys.settrace(note)
try:
    runpy.run_path(f"{root}/{script}", run_name="__main__")
except SystemExit as end:
    assert not end.code
sys.settrace(None)
print("files", *sorted(name for name in files if not name.startswith(".venv")))
print("modules", *sorted(sys.modules))
"""
HELP = """
import contextlib, io, runpy, sys
root, *scripts = sys.argv[1:]
sys.path.insert(0, root)
for script in scripts:
    sys.argv = [script, "-h"]
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as page:
        runpy.run_path(f"{root}/{script}", run_name="__main__")
    assert "usage:" in page.getvalue()
    print(script, *sorted(sys.modules))
"""
SLOW = {"torchvision", "torch._dynamo", "sklearn", "timm", "thop", "sympy", "onnx", "openvino"}
UNUSED = SLOW | {"matplotlib", "tensorboard", "torch.utils.tensorboard"}  # in help and predictions


def printed_by(code: str, *arguments: object) -> list[list[str]]:
    """The words of each line that a fresh Python prints; it must succeed."""
    command = [sys.executable, "-c", code, ROOT, *arguments]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return [line.split() for line in done.stdout.splitlines()]


def watched(*command: object) -> tuple[set[str], set[str]]:
    """Files whose functions a script calls, and the modules that it imports."""
    files, modules = (set(words[1:]) for words in printed_by(WATCHED, *command)[-2:])
    assert "torch" in modules
    return files, modules


def test_help_comes_without_slow_imports():
    """What help does not use is imported when used: torchvision takes half as long as torch."""
    scripts = ["main.py", "light_main.py", "predict.py", "export.py"]
    pages = printed_by(HELP, *scripts)
    assert [script for script, *_ in pages] == scripts
    for script, *modules in pages:
        assert "torch" in modules
        assert not UNUSED & {*modules}, script


def test_a_plain_run_goes_through_few_files_and_a_prediction_without_torchvision(tmp_path: Path):
    """From PNGs and JPEGs, with the paper's crops and flips."""
    root = write_tree(tmp_path / "tree", train=2, val=2)
    for file in sorted(root.rglob("*.png"))[1::2]:
        Image.open(file).save(file.with_suffix(".jpg"))
        file.unlink()
    run, flags = tmp_path / "run", ("--img-size", 32, "-b", 6, "--epochs", 1, "--device", "cpu")
    files, modules = watched("main.py", "-a", "resnet18", *flags, "-j", 0, "--output", run, root)
    assert {"main.py", "utils/training/classification.py"} <= files
    assert len(files) <= MOST_FILES_OF_A_RUN, files
    assert {"simplejpeg", "PIL.PngImagePlugin"} <= modules
    assert not modules & (SLOW - {"torch._dynamo", "sympy", "torchvision"})
    picture = next((root / "val").rglob("*.jpg"))
    _, modules = watched("predict.py", run / "last.pth", picture, "--device", "cpu")
    assert "simplejpeg" in modules
    assert not modules & UNUSED
