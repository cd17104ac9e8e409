"""Writes a run's figures for TensorBoard, whose own writer works in a thread."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


class EventFile:
    """Writes one events file. `open` comes first; after a fault nothing more is written.

    Each method raises OSError at the first fault.

    Args:
        folder: of the run.
        first_epoch: of this process, from 0; TensorBoard forgets older events from there on.
    """

    def __init__(self, folder: Path, first_epoch: int = 0):
        self.folder, self.first_epoch = folder, first_epoch
        self.is_broken = False
        self.board: Any = None  # torch's SummaryWriter
        self._former_hook = threading.excepthook

    def open(self) -> None:
        """Makes the file."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        threading.excepthook = self._hook
        purge = self.first_epoch + 1 if self.first_epoch else None

        def begin() -> None:
            self.board = SummaryWriter(str(self.folder), purge_step=purge)

        self._attempt(begin)

    def add(self, rows: Sequence[dict[str, float]], columns: Sequence[str], speed: float) -> None:
        """Adds these columns of the epochs, and the images per second of the last one."""
        for row in rows:
            epoch = int(row["epoch"]) + 1
            for name in columns:
                self._attempt(self._add, name.replace("_", "/", 1), row[name], epoch)
        self._attempt(self._add, "train/images_per_second", speed, int(rows[-1]["epoch"]) + 1)
        self._attempt(lambda: self.board.flush())

    def close(self) -> None:
        """Writes what is left, and ends the thread."""
        try:
            self._attempt(lambda: self.board.close())
        finally:
            self.is_broken = True
            if threading.excepthook == self._hook:
                threading.excepthook = self._former_hook

    def _add(self, name: str, value: float, epoch: int) -> None:
        self.board.add_scalar(name, value, epoch)

    def _attempt(self, act: Callable[..., None], *values: Any) -> None:
        if not self.is_broken:
            try:
                act(*values)
            except OSError:
                self.is_broken = True
                raise

    def _hook(self, fault: threading.ExceptHookArgs) -> None:
        """Prints no traceback of TensorBoard's thread for a full disk.

        The thread keeps the error, and raises it again where the next figure is added.
        """
        module = type(fault.thread).__module__
        if not (issubclass(fault.exc_type, OSError) and module.startswith("tensorboard.")):
            self._former_hook(fault)
