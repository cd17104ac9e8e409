"""Finds validation images that cannot be read before the first evaluation does."""

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

from utils.data.decoding import BrokenImageError
from utils.data.loader_workers import as_raised
from utils.system.cpu_share import processors
from utils.system.distributed import Context
from utils.system.errors import UserError

Item = TypeVar("Item")
PATIENCE = 5.0  # seconds for a thread to end the image that it is at


class ValidationCheck:
    """Reads each validation image once, all before training or in the background of it.

    It draws no random number and changes nothing that training uses, so a run with it and one
    without it give the same bits.

    Args:
        read: the number of an image → anything, or the fault as a value.
        size: images over all ranks; each rank reads its own share.
    """

    def __init__(self, read: Callable[[int], object], size: int, context: Context):
        self.read, self.size, self.context = read, size, context
        self.indices = range(context.rank, size, context.world_size)
        self.is_done = False
        self._fault: BrokenImageError | UserError | None = None
        self._stop = threading.Event()

    @property
    def fault(self) -> UserError | None:
        """Returns what names the image that `beside` could not read; exit code 1."""
        return None if self._fault is None else as_raised(self._fault)

    def now(self) -> None:
        """Reads all images with several threads, and says so.

        Raises:
            UserError: exit code 1, one image cannot be read; names the file.
        """
        silent = not (self.context.is_main and sys.stderr.isatty())
        with ThreadPoolExecutor(processors()) as pool:
            found = pool.map(self.read, self.indices)
            for item in tqdm(found, "check val", len(self.indices), leave=False, disable=silent):
                if isinstance(item, BrokenImageError | UserError):
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise as_raised(item)
        self.is_done = True
        self.context.say(f"check: {self.size:,} validation images can be read")

    def beside(self, steps: Iterable[Item]) -> Iterator[Item]:
        """Gives `steps` on, while one thread of low priority reads the images.

        The thread ends with the steps, also where they end early: evaluation reads the rest. Once
        all images have been read, later calls read none.

        An image that cannot be read does not end the steps: it becomes `fault`.
        """
        if self.is_done:
            yield from steps
            return
        thread = None
        try:
            for step in steps:
                if thread is None:  # not before: the loader workers are forked in the first step
                    thread = threading.Thread(target=self._read_all, name="check-val", daemon=True)
                    thread.start()
                yield step
        finally:
            self._stop.set()
            if thread is not None:
                thread.join(PATIENCE)
            self.is_done = True

    def _read_all(self) -> None:
        if sys.platform == "linux":  # where it is a thread's own; elsewhere the whole process's
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        for index in self.indices:
            if self._stop.is_set():
                return
            item = self.read(index)
            if isinstance(item, BrokenImageError | UserError):
                self._fault = item
                return
