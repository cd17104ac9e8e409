"""Processes that a test has started itself, apart from those of tests before it."""

import multiprocessing
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

BEFORE: set[BaseProcess] = set()  # those that ran as the test began; conftest notes them


def own_children() -> list[BaseProcess]:
    """Not by is_alive(): where a pool's thread took the exit status first, it says yes for ever."""
    return [c for c in multiprocessing.active_children() if c not in BEFORE and not gone(c)]


def gone(child: BaseProcess) -> bool:
    return bool(wait([child.sentinel], 0))
