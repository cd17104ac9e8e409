"""The compiled library: built once, in a private folder, and never a stranger's."""

import ctypes
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from helpers.tail_cases import needs_compiler
from helpers.trees import ROOT

import models
from models.fused import cpu_passes
from models.fused.block_tail import can_fuse
from models.fused.cpu_passes import BuildError, library, serves

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The file of a library that the compiler has made now, in a cache of its own. Read only."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        library.cache_clear()
        assert isinstance(library(), ctypes.CDLL)
        library.cache_clear()
    (file,) = (home / "eca-net").iterdir()
    assert file.parent.stat().st_mode & 0o777 == file.stat().st_mode & 0o777 == 0o700
    return file


@pytest.fixture
def fresh_library(monkeypatch, tmp_path):
    """As in a new process with an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library.cache_clear()
    yield tmp_path / "cache" / "eca-net"
    library.cache_clear()


@needs_compiler
def test_compiled_once(compiled, fresh_library, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(compiled.parent.parent))
    monkeypatch.setattr(cpu_passes, "_compile", Mock(side_effect=AssertionError))
    assert isinstance(library(), ctypes.CDLL)


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of loaded libraries")
def test_no_second_openmp_is_loaded_and_nothing_by_an_import(compiled):
    code = (
        "import torch, models\n"
        "models.create_model('eca_resnet18')\n"
        "print(models.fused.cpu_passes.library.cache_info().misses)\n"
        "def loaded():\n"
        "    return {line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line}\n"
        "before = loaded(); models.fused.cpu_passes.library(); after = loaded()\n"
        "print(models.fused.cpu_passes.why_not(), len(before), before == after)"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(compiled.parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["0", "None", "1", "True"], done.stderr


def copy(file: Path, target: Path) -> Path:
    """A file of its own: the linker would take another name of one that is loaded for the same."""
    target.write_bytes(file.read_bytes())
    target.chmod(0o700)
    return target


@pytest.fixture
def kept(compiled, fresh_library, monkeypatch):
    """A copy of `compiled` in the cache; from now on the compiler makes further ones."""
    fresh_library.mkdir(0o700, parents=True)
    monkeypatch.setattr(cpu_passes, "_compile", lambda *to: copy(compiled, to[-1] / "passes.so"))
    return copy(compiled, fresh_library / compiled.name)


def compile_stranger(target: Path, text: str) -> None:
    """Puts a library with all functions there that leaves a file beside it when it is loaded."""
    functions = "".join(f"void eca_{name}(void) {{}}\n" for name in cpu_passes.FUNCTIONS)
    source = target.with_suffix(".c")
    source.write_text(
        f"#include <stdio.h>\n{text.replace('FUNCTIONS', functions)}\n"
        "__attribute__((constructor)) static void start(void) "
        f'{{ fclose(fopen("{target.parent.parent}/loaded", "w")); }}\n'
    )
    compiled = target.with_suffix(".new")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", compiled, source], check=True)
    content = compiled.read_bytes()
    compiled.write_bytes(content + hashlib.sha256(content).digest())
    compiled.replace(target)
    target.chmod(0o700)
    source.unlink()


def is_ours_and_works() -> bool:
    z = torch.randn(2, 3, 4, 4)
    found = library()
    return isinstance(found, ctypes.CDLL) and serves(z)


@needs_compiler
def test_a_stranger_s_library_is_the_control(kept):
    """With the user's rights alone it would be loaded: the tests below can fail."""
    compile_stranger(kept, "FUNCTIONS")
    assert is_ours_and_works()
    assert (kept.parent.parent / "loaded").exists()


@needs_compiler
@pytest.mark.parametrize("fault", ["file mode", "folder mode", "link", "no functions"])
def test_a_library_that_others_could_have_changed_is_compiled_again(kept, fault):
    compile_stranger(kept, "" if fault == "no functions" else "FUNCTIONS")
    if fault == "file mode":
        kept.chmod(0o722)
    elif fault == "folder mode":
        kept.parent.chmod(0o777)
    elif fault == "link":
        kept.symlink_to(kept.rename(kept.parent.parent / "elsewhere.so"))
    before = kept.read_bytes()
    assert is_ours_and_works()
    assert (kept.parent.parent / "loaded").exists() == (fault == "no functions")
    assert kept.read_bytes() != before
    assert not kept.is_symlink()
    assert kept.parent.stat().st_mode & 0o777 == kept.stat().st_mode & 0o777 == 0o700


@needs_compiler
@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a folder to another user")
@pytest.mark.parametrize("part", ["file", "folder"])
def test_a_library_of_another_user_is_never_loaded(kept, part):
    compile_stranger(kept, "FUNCTIONS")
    before = kept.read_bytes()
    os.chown(kept if part == "file" else kept.parent, 12345, 12345)
    assert is_ours_and_works()
    assert not (kept.parent.parent / "loaded").exists()
    assert (kept.read_bytes() == before) == (part == "folder")  # which is left as it is
    assert os.listdir(kept.parent) == [kept.name]


@needs_compiler
@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_a_truncated_library_is_compiled_again(kept, share):
    """The linker itself would end the process with SIGBUS."""
    whole = kept.read_bytes()
    kept.write_bytes(whole[: int(share * len(whole))])
    assert is_ours_and_works()
    assert len(kept.read_bytes()) == len(whole)


@pytest.mark.parametrize("compiler", [None, "/nowhere/c++", "false"])
def test_without_a_working_compiler_the_modules_serve(compiler, fresh_library, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    if compiler:
        monkeypatch.setenv("CXX", compiler)
    else:
        monkeypatch.setattr(cpu_passes.shutil, "which", lambda name: None)
    assert isinstance(library(), BuildError)
    assert "\n" not in cpu_passes.why_not()
    z = torch.randn(2, 3, 4, 4)
    assert not serves(z)
    assert not can_fuse(z, torch.nn.BatchNorm2d(3), models.ECALayer(3))


def test_a_cache_folder_that_cannot_be_made_is_no_fault(fresh_library, monkeypatch):
    fresh_library.parent.write_text("a file")
    assert isinstance(library(), BuildError)
    library.cache_clear()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("no home directory")))
    assert cpu_passes.why_not() in ("no home directory", "no C++ compiler")
