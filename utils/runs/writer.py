"""Writes a run's folder: checkpoints, log, and the lines that say how to continue."""

import time
from dataclasses import dataclass
from pathlib import Path

from utils.runs import folder as run_folder
from utils.runs.checkpoint import CheckpointFolder
from utils.runs.commands import command, look_line
from utils.runs.metrics_log import Figures, RunLogger
from utils.runs.saved_run import Checkpoint, SavedRun
from utils.system.errors import EXIT_FAILED, UserError


@dataclass(frozen=True)
class Saving:
    """Says when a checkpoint is written besides those at the ends of epochs.

    Args:
        every: steps between checkpoints inside an epoch, or None.
        minutes: between any two checkpoints, or None.
    """

    every: int | None = None
    minutes: float | None = None


class RunFiles:
    """Writes on the main process; on every other rank each method does nothing.

    `begin` comes first.

    Args:
        folder: the run's folder; None on ranks above 0.
        fixed: what every checkpoint holds besides the state: network, classes, recipe, flags.
        figures: what is recorded of an epoch.
        title: of the curves.
        first_epoch: that this process will finish.
        saving: when checkpoints are due.
        saved: the run that this process goes on from, or None.

    Raises:
        UserError: another process is writing to the folder, or has written to it since `saved` was
            read.
    """

    def __init__(
        self,
        folder: Path | None,
        fixed: dict,
        figures: Figures,
        *,
        title: str = "",
        first_epoch: int = 0,
        saving: Saving = Saving(),
        saved: SavedRun | None = None,
    ):
        self.folder, self.fixed, self.figures, self.saving = folder, fixed, figures, saving
        self.saved_at = time.monotonic()
        if folder is not None:
            self.lock = run_folder.lock(folder)
            self.checkpoints = CheckpointFolder(folder)
            self._refuse_newer(saved)
            self.title, self.first_epoch = title, first_epoch
            self.logger: RunLogger | None = None

    def begin(self, snapshot: dict) -> None:
        """Makes the folder a run's: a checkpoint of its first state, args.json, an open log.

        The checkpoint comes before args.json: whatever kills the run from then on, it comes back
        with its own network, recipe and seed.
        """
        if self.folder is not None:
            if not self.checkpoints.last.exists():
                self.save(snapshot)
            run_folder.write_json(self.folder / "args.json", self.fixed)
            self.logger = RunLogger(self.folder, self.figures, self.title, self.first_epoch)

    def _refuse_newer(self, saved: SavedRun | None) -> None:
        """Refuses a folder to which another process has written since `saved` was read."""
        try:
            last = Checkpoint.read(self.checkpoints.last).run
        except UserError:  # none, or damaged: nothing newer than what was found then
            return
        if last is not None and (saved is None or last.place != saved.place):
            epoch, step = last.place
            raise UserError(
                f"{self.checkpoints.last}: another process has gone on with this run since it was "
                f"read (epoch {epoch + 1}, step {step}): start again with --resume auto --output "
                f"{self.folder}",
                EXIT_FAILED,
            )

    def lacks_best(self) -> bool:
        """Returns whether the folder holds no `best`: a new one, even of a run begun elsewhere."""
        return self.folder is not None and not self.checkpoints.best.exists()

    def due(self, step: int) -> bool:
        """Returns whether a checkpoint is due after `step` steps of the epoch."""
        if self.saving.every is not None and step % self.saving.every == 0:
            return True
        passed = time.monotonic() - self.saved_at
        return self.saving.minutes is not None and passed >= 60 * self.saving.minutes

    def save(self, snapshot: dict) -> None:
        """Writes `last`; the one before it becomes `previous`."""
        if self.folder is not None:
            self.checkpoints.save_last({**self.fixed, **snapshot})
        self.saved_at = time.monotonic()

    def finish_epoch(self, snapshot: dict, images_per_second: float, improved: bool) -> None:
        """Writes an epoch's files, `last` at the end: killed before it, the epoch is run again."""
        if self.folder is not None:
            if improved:
                self.checkpoints.save_best({**self.fixed, **snapshot})
            assert self.logger is not None  # `begin` has opened it
            self.logger.log(snapshot["history"], images_per_second)
        self.save(snapshot)

    def stopped(self, epoch: int, step: int, exit_code: int, why: str = "asked to stop") -> int:
        """Says why a run stops and where it was saved; returns `exit_code`."""
        if self.folder is not None:
            print(f"{why}: saved in epoch {epoch + 1} after step {step}; go on with")
            print(f"  {command('--resume', self.checkpoints.last)}", flush=True)
            self.close()
        return exit_code

    def farewell(self, best: dict, data: str, early: bool = False) -> list[str]:
        """Returns the closing lines: the result, and the commands that a user wants next.

        Args:
            best: the row of the best epoch; empty for none.
            data: as the command line named it.
            early: training ended by --early-stop, before the last epoch.
        """
        if self.folder is None:
            return []
        last, weights = self.checkpoints.last, self.checkpoints.best
        more = ("--early-stop", "0") if early else ("--epochs", "N")
        evaluate = f"  evaluate:    {command('-e', '--resume', weights, data)}"
        return [
            f"done: {self.figures.result(best)}",
            *([evaluate] if best else []),
            look_line(self.folder),
            f"  train on:    {command('--resume', last, *more)}",
        ]

    def close(self) -> None:
        """Closes the log, and lets another process write to the folder."""
        if self.folder is not None:
            if self.logger is not None:
                self.logger.close()
            self.lock.close()
