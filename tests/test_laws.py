"""The laws of the house: which folder may import which, and how long files and functions are."""

import ast
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
WITH_ARGS = ("utils/command_line",)  # where a parsed command line may be called `args`
OUTSIDE = {  # packages that models/ may import besides torch and Python's own
    "models/detection": {"torchvision"},
    "models/pretrained": {"safetensors", "huggingface_hub"},  # inside of its functions
    "models/timm_registry": {"timm"},
    "models/fused/triton_kernels": {"triton"},
    "models/fused/triton_tail": {"triton"},
}


def sources(root: Path) -> list[Path]:
    """Every file of the program: scripts, models, utils and tools."""
    rooms = [root / name for name in ("models", "utils", "tools", "benchmarks")]
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


def imported(path: Path, root: Path) -> Iterator[str]:
    """Modules that a file imports, also inside of its functions; those of the repository as
    `module_of` names them.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = path.parent.relative_to(root).parts
    for node in ast.walk(tree):
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
        module: {name for name in imported(path, root) if name in modules} - {module}
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
    assert folders == {*ARROWS, *OPEN}
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


def test_no_circle_of_files_or_folders():
    assert circles(file_arrows(ROOT)) == []
    assert circles({folder: {*to} - {"models/eca_module"} for folder, to in ARROWS.items()}) == []


def test_a_planted_circle_is_found(tmp_path: Path):
    late = "def f():\n    from utils.a import x\n"
    texts = {"utils/a.py": "from utils import b\n", "utils/b.py": late}
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


def test_args_stop_at_the_command_line():
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


def crowded(root: Path) -> dict[str, int]:
    """Folders with more files than one looks through."""
    folders = Counter(folder_of(module_of(path, root), root) for path in sources(root))
    return {name: n for name, n in folders.items() if n > MOST_FILES}


def test_folders_are_small(tmp_path: Path):
    assert crowded(ROOT) == {}
    root = planted(tmp_path, {f"utils/data/f{i}.py": "" for i in range(MOST_FILES + 1)})
    assert crowded(root) == {"utils/data": MOST_FILES + 1}


def unpacked(root: Path) -> list[str]:
    """Calls with three positions or more that were packed before: nobody sees which is which."""
    found = []
    for path in sources(root):
        for function in functions(path):
            packed = {
                target.id
                for node in ast.walk(function)
                if isinstance(node, ast.Assign) and len(getattr(node.value, "elts", ())) > 2
                for target in node.targets
                if isinstance(target, ast.Name)
            }
            found += [
                f"{module_of(path, root)}:{node.lineno}"
                for node in ast.walk(function)
                if isinstance(node, ast.Call)
                for argument in node.args
                if isinstance(argument, ast.Starred)
                and isinstance(argument.value, ast.Name)
                and argument.value.id in packed
            ]
    return found


def test_no_tuple_is_unpacked_into_a_call(tmp_path: Path):
    assert unpacked(ROOT) == []
    root = planted(tmp_path, {"utils/a.py": "def f():\n    parts = (1, 2, 3)\n    g(*parts)\n"})
    assert unpacked(root) == ["utils/a:3"]


PLAIN_RUN = """
import sys
root, tree, output = sys.argv[1:]
sys.path.insert(0, root)
files = set()
def note(frame, event, _):
    name = frame.f_code.co_filename
    # What an import runs is no step of a run: a module's body, a class's body, a decorator.
    if event == "call" and name.startswith(root + "/") and not frame.f_code.co_name.startswith("<"):
        files.add(name[len(root) + 1:])
import main
sys.argv = ["main.py", "-a", "eca_resnet18", "--img-size", "32", "-b", "6", "--epochs", "1",
            "--device", "cpu", "-j", "0", "--output", output, tree]
sys.setprofile(note)
main.main()
sys.setprofile(None)
print("files", *sorted(name for name in files if not name.startswith(".venv")))
"""


def test_a_plain_run_goes_through_few_files(tmp_path: Path):
    root, output = write_tree(tmp_path / "tree"), tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_RUN, str(ROOT), str(root), str(output)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    files = done.stdout.splitlines()[-1].split()[1:]
    assert "main.py" in files
    assert "utils/training/classification.py" in files
    assert len(files) <= MOST_FILES_OF_A_RUN, files


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


SLOW = {"torchvision", "torch._dynamo", "sklearn", "timm", "thop", "sympy", "onnx", "openvino"}


def imported_by(script: str, *arguments: object) -> set[str]:
    """The names of all modules that a run of a script imports; it must end with 0."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    names = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "torch" in names
    return names


@pytest.mark.parametrize("script", ["main.py", "light_main.py", "predict.py", "export.py"])
def test_help_comes_without_slow_imports(script: str):
    """What help does not use is imported when used: torchvision takes half as long as torch."""
    names = imported_by(script, "-h")
    assert not names & (SLOW | {"matplotlib", "tensorboard", "torch.utils.tensorboard"})


def test_an_epoch_and_a_prediction_do_without_torchvision(tmp_path: Path):
    """From PNGs and JPEGs, with the paper's crops and flips."""
    root = write_tree(tmp_path / "tree", train=6, val=3)
    for i, file in enumerate(sorted(root.rglob("*.png"))):
        if i % 2:
            Image.open(file).save(file.with_suffix(".jpg"))
            file.unlink()
    picture = next((root / "val").rglob("*.jpg"))
    run = tmp_path / "run"
    flags = ("-a", "mobilenetv2", "--img-size", 32, "-b", 6, "--epochs", 1, "--device", "cpu")
    names = imported_by("main.py", *flags, "-j", 0, "--output", run, root)
    assert {"simplejpeg", "PIL.PngImagePlugin"} <= names
    assert not names & {"torchvision", "timm", "sklearn", "thop", "onnx", "openvino"}
    names = imported_by("predict.py", run / "last.pth", picture, "--device", "cpu")
    assert "simplejpeg" in names
    assert not names & (SLOW | {"matplotlib", "tensorboard", "torch.utils.tensorboard"})


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
