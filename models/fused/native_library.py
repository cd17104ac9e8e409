"""Compiles native.cpp once and keeps the library in a folder that nobody else can write to.

A library is code: one that another user could have put there, or changed, is never loaded.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("native.cpp")
# No -ffast-math: infinities and NaN must come out as PyTorch's do.
FLAGS = ("-O3", "-march=native", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
X86_FLAGS = ("-mprefer-vector-width=256",)  # measured on Zen 4; also narrow rows fill such vectors
SECONDS = 120  # for the compiler
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class BuildError(Exception):
    """Says why there is no library."""


def load(functions: Sequence[str]) -> ctypes.CDLL:
    """Returns the library with these functions: the one in the cache, or one compiled now.

    The one in the cache is used if it and its folder belong to this user, nobody else can write to
    either, every byte is as it was written, and it has all `functions`.

    Raises:
        BuildError: no compiler, or the compiled library lacks a function.
        subprocess.SubprocessError: the compiler failed or took too long.
        OSError, RuntimeError: there is no place for the library.
    """
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    compiler = shlex.split(found or "")
    if not compiler:
        raise BuildError("no C++ compiler")
    flags = FLAGS + (X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else ())
    key = hashlib.sha256(SOURCE.read_bytes())
    for part in (*compiler, *flags, torch.__version__, _processor()):
        key.update(part.encode() + b"\0")
    cache: Path | None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eca-net"
    target = cache / f"passes-{key.hexdigest()[:16]}.so"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = cache.stat()
    if not _only_ours(folder):
        if folder.st_uid == os.geteuid():  # closed; what lies in it is replaced, never loaded
            cache.chmod(0o700)
        else:
            cache = None
    elif (library := _kept(target, functions)) is not None:
        return library
    # A temporary folder is made 0700. Loaded from there, because the linker would take a library
    # at a path that it knows for the one that it has loaded already.
    with tempfile.TemporaryDirectory(dir=cache) as place:
        linked = _compile(compiler, flags, Path(place))
        library = ctypes.CDLL(str(linked))
        if not _has(library, functions):
            raise BuildError("the compiled library lacks a function")
        if cache is not None:
            os.replace(linked, target)
    return library


def _compile(compiler: list[str], flags: Sequence[str], place: Path) -> Path:
    compiled, linked = place / "passes.o", place / "passes.so"
    # Linked without OpenMP: its functions are found in the copy that torch has loaded. A second
    # copy would keep threads of its own, and the two would take turns waiting.
    commands: tuple[list[str | Path], ...]
    commands = ([*flags, "-c", SOURCE, "-o", compiled], ["-shared", compiled, "-o", linked])
    for command in commands:
        subprocess.run([*compiler, *command], check=True, capture_output=True, timeout=SECONDS)
    content = linked.read_bytes()
    linked.write_bytes(content + hashlib.sha256(content).digest())  # behind what a loader reads
    linked.chmod(0o700)  # whatever the umask
    return linked


def _kept(target: Path, functions: Sequence[str]) -> ctypes.CDLL | None:
    """Loads the library at `target`, or returns None where it must be compiled again."""
    try:
        found = target.lstat()
        if not stat.S_ISREG(found.st_mode) or not _only_ours(found):
            return None
        # Checked before it is loaded: a truncated one ends the process with SIGBUS.
        content = target.read_bytes()
        if hashlib.sha256(content[:-32]).digest() != content[-32:]:
            return None
        library = ctypes.CDLL(str(target))
    except OSError:
        return None
    return library if _has(library, functions) else None


def _only_ours(found: os.stat_result) -> bool:
    return found.st_uid == os.geteuid() and not found.st_mode & OTHERS_WRITE


def _has(library: ctypes.CDLL, functions: Sequence[str]) -> bool:
    return all(hasattr(library, name) for name in functions)


def _processor() -> str:
    """Describes what -march=native depends on: different machines may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    known = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.split("\t")[0].strip() in known}))
