"""Runs of main.py so small that they take a second: under way, and what they leave behind."""

import contextlib
import functools
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from helpers.trees import ROOT
from PIL import Image

from models import eca_resnet, registry
from utils.runs import checkpoint

SMALL = ("-a", "mobilenetv2", "--img-size", 32, "-b", 6, "--lr", 0.01, "-j", 0, "--seed", 1)
LONG = (*SMALL, "--epochs", 500, "-p", 1)
PATIENCE = 1200  # seconds: for a hang alone, ten times what a loaded machine needs
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # an activated environment


@contextlib.contextmanager
def thin_networks() -> Iterator[None]:
    """ResNets and MobileNetV2s of few channels: enough for what is not about their size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eca_resnet, "WIDTHS", (8, 16, 32, 64))
        for name, constructor in registry.MODELS.items():
            if "mobilenet" in name:
                narrow = functools.partial(constructor, width_mult=0.25)
                patch.setitem(registry.MODELS, name, narrow)
        yield


def draw_nothing(history, panels, path: Path, *_) -> None:
    """In the place of `draw_curves`, which takes longer than a small run's epoch."""
    Image.new("1", (8, 8)).save(path)


class Running:
    """A script under way in a folder, with what it has printed so far."""

    def __init__(self, folder: Path, *command: object, **options):
        self.out, self.err = folder / "stdout", folder / "stderr"
        with open(self.out, "w") as out, open(self.err, "w") as err:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                cwd=folder,
                stdout=out,
                stderr=err,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PATH": PATH},
                start_new_session=True,
                **options,
            )

    def wait_for(self, pattern: str, since: int = 0) -> None:
        """Until a line of stdout matches."""
        end = time.monotonic() + PATIENCE
        while not re.search(pattern, self.out.read_text()[since:]):
            assert self.process.poll() is None, self.err.read_text()
            assert time.monotonic() < end, self.out.read_text()
            time.sleep(0.05)

    def end(self) -> tuple[int, list[str], list[str]]:
        """(exit code, lines on stdout, lines on stderr)."""
        code = self.process.wait(PATIENCE)
        return code, self.out.read_text().splitlines(), self.err.read_text().splitlines()

    def children(self) -> list[int]:
        return children(self.process.pid)


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += map(int, task.read_text().split())
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def all_gone(pids: list[int], within: float = 200) -> bool:
    """Whether these processes end within so many seconds."""
    end = time.monotonic() + within
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    return not any(map(alive, pids))


def progress(folder: Path, name: str = "last.pth") -> dict:
    return checkpoint.load(folder / name)["progress"]


def place(folder: Path, name: str = "last.pth") -> tuple[int, int]:
    found = progress(folder, name)
    return found["epoch"], found["step"]


def shell(folder: Path, line: str, **variables: str) -> subprocess.CompletedProcess:
    """Runs a line of bash in `folder`; in it `$PY main.py` starts one of our scripts."""
    return subprocess.run(
        ["bash", "-c", line.replace("$PY ", f"'{sys.executable}' {ROOT}/")],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )


BEFORE: set[BaseProcess] = set()  # those that ran as the test began; conftest notes them


def own_children() -> list[BaseProcess]:
    """Not by is_alive(): where a pool's thread took the exit status first, it says yes for ever."""
    return [c for c in multiprocessing.active_children() if c not in BEFORE and not gone(c)]


def gone(child: BaseProcess) -> bool:
    return bool(wait([child.sentinel], 0))
