"""glibc's allocator, told to keep what a training step frees."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h
TOP_PAD = 64 << 20  # bytes that are asked of the system at a time


def keep_freed_memory() -> bool:
    """Lets this process hold on to freed memory instead of handing it back to the system.

    By default glibc maps every large tensor afresh and unmaps it when freed, so the system zeroes
    its pages again at every step: a third of a CPU step's time and more. Call it before tensors
    are made. Forked workers inherit it.

    Returns:
        Whether the allocator took it; other systems' allocators do not, and need it less.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    largest = 2**31 - 1
    wanted = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, largest), (M_TOP_PAD, TOP_PAD))
    taken = [mallopt(name, value) for name, value in wanted]  # all of them, whatever the first says
    return all(taken)
