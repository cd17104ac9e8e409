"""Makes command lines that a user can copy: to continue a run, evaluate it, look at it."""

import contextlib
import os
import shlex
import shutil
import sys
from pathlib import Path

DEVICE_FLAGS = ("--device", "--gpu")


def look_line(folder: Path) -> str:
    """Returns the closing line that shows the curves of the run in `folder`."""
    board = _program("tensorboard", "tensorboard.main")
    curves = shlex.quote(str(folder / "curves.png"))
    return f"  look:        {board} --logdir {shlex.quote(str(folder))}   (or {curves})"


def device_flags() -> list[str]:
    """Returns the flags that chose this process's device; checkpoints do not hold them."""
    words = sys.argv[1:]
    return [
        word
        for word, former in zip(words, ["", *words], strict=False)
        if word.partition("=")[0] in DEVICE_FLAGS or former in DEVICE_FLAGS
    ]


def command(*arguments: object) -> str:
    """Returns a command line for this script, started the way this process was."""
    own = shlex.join([sys.argv[0], *map(str, arguments), *device_flags()])
    ranks, nodes = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("GROUP_WORLD_SIZE", "1")
    if ranks is None:
        return f"{_interpreter()} {own}"
    launcher = _program("torchrun", "torch.distributed.run")
    if nodes == "1":
        return f"{launcher} --nproc-per-node={ranks} {own}"
    # The rest differs from node to node, and from start to start.
    return f"{launcher} --nnodes={nodes} --nproc-per-node={ranks} … {own}"


def _program(name: str, module: str) -> str:
    """Returns what to type for a program that was installed beside this Python."""
    python = _interpreter()
    return name if python == "python" else f"{python} -m {module}"


def _interpreter() -> str:
    """Returns what to type for this Python: `python` where that is it, else a short path.

    Of `make demo` it is the one in .venv, which nobody has activated.
    """
    own, found = Path(sys.executable), shutil.which("python")
    # Not resolved: every virtual environment's Python is a link to the same file.
    if found and Path(found).parent == own.parent and Path(found).samefile(own):
        return "python"
    with contextlib.suppress(ValueError):
        own = own.relative_to(Path.cwd())
    return shlex.quote(str(own))
