"""A variant in a process of its own, where glibc's allocator is left as it is.

The benchmarks keep freed memory, as the scripts do, for all variants in their process. What the
textbook form takes for those who run it as it is commonly run needs a process without that.
"""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from utils.system.backends import keep_freed_memory


def differs(device: torch.device) -> bool:
    """Whether there is anything to compare: this process, on a CPU with glibc, keeps its memory."""
    return device.type == "cpu" and keep_freed_memory()  # once more: it says whether it can


class AsItIs:
    """Calls `build(*args)()` in another process and waits for it.

    Args:
        build: a function of a module, as it is found there by name.
    """

    def __init__(self, build: Callable[..., Callable[[], object]], *args: object):
        context = multiprocessing.get_context("spawn")  # a fork would inherit the allocator
        self.pipe, others = context.Pipe()
        work = (others, build, args, torch.get_num_threads())
        self.process = context.Process(target=_serve, args=work, daemon=True)
        self.process.start()
        others.close()  # so that its end is seen here
        self.pipe.recv()

    def __call__(self) -> None:
        self.pipe.send(None)
        self.pipe.recv()


def _serve(pipe: Connection, build: Callable, args: tuple, threads: int) -> None:
    torch.set_num_threads(threads)
    function = build(*args)
    while True:
        pipe.send(None)
        try:
            pipe.recv()
        except EOFError:  # the benchmark is over
            return
        function()
