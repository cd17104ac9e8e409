"""Freed memory stays with the process."""

import subprocess
import sys

import pytest
from helpers.trees import ROOT

from utils.system import backends

CODE = """
import resource, sys, torch
from utils.system.backends import keep_freed_memory
def faults():
    for step in range(20):
        if step == 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(20_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults())
if not keep_freed_memory():
    sys.exit(77)
print(faults())
"""


def test_large_tensors_do_not_fault_again():
    """In a process of its own, as what it sets stays."""
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("this allocator has no such settings")
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert before > 3 * max(after, 1000)  # a few may still come from blocks that moved


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(backends.sys, "platform", "darwin")
    assert not backends.keep_freed_memory()
