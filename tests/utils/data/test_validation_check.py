"""Broken validation images, found before training or in its background."""

import threading
import time

import pytest
import torch

from utils.data.decoding import BrokenImageError
from utils.data.validation_check import ValidationCheck
from utils.system.distributed import Context
from utils.system.errors import EXIT_FAILED, UserError

CPU = torch.device("cpu")


def broken_at(wanted, seen):
    def read(index):
        seen.append(index)
        return BrokenImageError("val/a/7.png", "the file is empty") if index == wanted else index

    return read


def test_all_are_read_before_training_and_the_broken_one_is_named(capsys):
    seen = []
    ValidationCheck(broken_at(None, seen), 9, Context(CPU)).now()
    assert sorted(seen) == list(range(9))
    assert capsys.readouterr().out == "check: 9 validation images can be read\n"
    with pytest.raises(UserError, match=r"^val/a/7.png: the file is empty; mend or ") as caught:
        ValidationCheck(broken_at(7, []), 9, Context(CPU)).now()
    assert caught.value.exit_code == EXIT_FAILED


def test_the_background_finds_it_between_two_steps_and_its_thread_ends():
    check = ValidationCheck(broken_at(7, []), 9, Context(CPU))
    found = 0
    for step in check.beside(range(60_000)):
        time.sleep(0.001)
        found = step
        if check.fault is not None:
            break
    assert found < 60_000 - 1
    assert str(check.fault).startswith("val/a/7.png")
    assert check.fault.exit_code == EXIT_FAILED
    assert not [t for t in threading.enumerate() if t.name == "check-val"]


def test_steps_pass_unchanged_and_an_end_in_between_ends_the_thread():
    seen = []
    check = ValidationCheck(broken_at(None, seen), 9, Context(CPU, rank=1, world_size=2))
    state = torch.get_rng_state()
    assert list(check.beside(range(3))) == [0, 1, 2]
    assert set(seen) <= {1, 3, 5, 7}
    assert torch.equal(torch.get_rng_state(), state)
    for _ in check.beside(range(3)):
        break
    assert not [t for t in threading.enumerate() if t.name == "check-val"]
