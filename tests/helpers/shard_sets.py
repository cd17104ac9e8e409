"""Small sets of tar shards: of ours, and as other programs write them."""

import io
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from tools import make_shards
from utils.system import faults


def make(monkeypatch, source: Path, target: Path, *flags: object) -> Path:
    """`python -m tools.make_shards` in this process."""
    monkeypatch.setattr(faults, "end_children", lambda: True)
    monkeypatch.setattr(sys, "argv", ["make_shards", str(source), str(target), *map(str, flags)])
    with pytest.raises(SystemExit) as ended:
        faults.run_script(make_shards.main)
    assert not ended.value.code
    return target


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A tar file as the webdataset package writes it: no folders, a key after the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path
