"""Counts the processors that this process may use: of the machine, its affinity, its container."""

import math
import os
from pathlib import Path

import torch

GROUPS = Path("/sys/fs/cgroup")  # where Linux shows the limits of containers and jobs
OWN_GROUPS = Path("/proc/self/cgroup")
GIVEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # a user's own choice of threads


def processors() -> int:
    """Returns how many processors this process may use: a scheduler often grants a part of the
    machine, and a container may have a limit. A part of a processor counts as one.
    """
    granted = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        granted = len(os.sched_getaffinity(0))
    limit = quota()
    return granted if limit is None else max(1, min(granted, math.ceil(limit)))


def quota() -> float | None:
    """Returns the processors' worth of time that control groups allow; None for no limit.

    It is the lowest of this process's group and of those above it, of either version of Linux's
    control groups. What cannot be read limits nothing.
    """
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        if line.count(":") < 2:
            continue
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if not controllers:
            root, read = GROUPS, _second_version
        elif "cpu" in names:
            root, read = GROUPS / "cpu", _first_version
        else:
            continue
        place = root / path.lstrip("/")
        # Inside a container the path may be the host's, which is not there: its root still is.
        found += [read(folder) for folder in (place, *place.parents) if folder.is_relative_to(root)]
    return min((share for share in found if share is not None), default=None)


def _second_version(folder: Path) -> float | None:
    try:
        allowed, period = (folder / "cpu.max").read_text().split()
        return None if allowed == "max" else int(allowed) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _first_version(folder: Path) -> float | None:
    try:
        allowed = int((folder / "cpu.cfs_quota_us").read_text())
        return allowed / int((folder / "cpu.cfs_period_us").read_text()) if allowed > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def fit_threads() -> None:
    """Gives PyTorch no more threads than there are processors, unless the user chose a number.

    PyTorch knows nothing of a container's limit: on two processors' worth of a machine of 64 its
    64 threads would wait for each other at every operation.
    """
    if not any(os.environ.get(name) for name in GIVEN) and torch.get_num_threads() > processors():
        torch.set_num_threads(processors())
