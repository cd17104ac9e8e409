"""Freed memory stays with the process."""

import subprocess
import sys
from pathlib import Path

import pytest

from utils.system import backends

ROOT = Path(__file__).resolve().parents[3]
CODE = """
import resource, sys, torch
from utils.system.backends import keep_freed_memory
if "keep" in sys.argv and not keep_freed_memory():
    sys.exit(77)
def step():
    torch.ones(20_000_000)
for _ in range(10):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*arguments: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode == 77:
        pytest.skip("this allocator has no such settings")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_large_tensors_do_not_fault_again():
    kept = faults("keep")
    assert faults() > 3 * max(kept, 1000)  # a few may still come from blocks that moved


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(backends.sys, "platform", "darwin")
    assert not backends.keep_freed_memory()
