"""Writes what a run leaves: checkpoints, metrics.csv, events of a tracker, curves, and the lines
that say how to go on.
"""

import contextlib
import csv
import errno
import hashlib
import io
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from utils.config.flags import RunSettings
from utils.runs import folder as run_folder
from utils.runs.checkpoint import Checkpoint, CheckpointFolder, SavedRun
from utils.runs.folder import FolderLock
from utils.runs.resume import Start
from utils.system.distributed import Context
from utils.system.errors import EXIT_FAILED, UserError
from utils.system.files import write_atomically
from utils.system.style import GREY

DECADES = 20  # times: a span of losses from which on the axis is logarithmic
PROJECT = "eca-net"  # of Weights & Biases and MLflow, where none is named
Send = Callable[[int, Mapping[str, float]], None]  # the step, and its values by tag
DEVICE_FLAGS = ("--device", "--gpu")
Row = dict[str, float]  # one finished epoch: "epoch", "lr", train_… and what was evaluated


@dataclass(frozen=True)
class Curve:
    """Describes one line of a panel: a column of the history.

    Args:
        label: in the legend; None for no legend.
        colour: of matplotlib; None for the next one of its cycle.
    """

    column: str
    label: str | None
    colour: str | None = None


@dataclass(frozen=True)
class Panel:
    """Describes one diagram of curves.png. `last` shows a curve's last value in its label."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    last: str = "({:.3g})"
    can_be_log: bool = False  # a loss: logarithmic where it spans much


class Tracker:
    """Sends what a run logs; one that goes on with the same folder has the same id.

    Args:
        library: "wandb" or "mlflow".
        folder: of the run; without WANDB_MODE or MLFLOW_TRACKING_URI, all is written there.
        settings: of the run: plain values by name.

    Raises:
        UserError: the library does not begin.
    """

    def __init__(self, library: str, folder: Path, settings: Mapping[str, Any]):
        self.library = library
        begin = {"wandb": _wandb, "mlflow": _mlflow}[library]
        key = hashlib.blake2b(os.fsencode(folder.resolve()), digest_size=8).hexdigest()
        self._send, self.close = self._said(begin, folder, key, settings)

    def send(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the values of an epoch.

        Raises:
            UserError: the library fails.
        """
        self._said(self._send, step, values)

    def _said(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except Exception as error:  # what a library raises is open-ended
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"--log {self.library}: {reason}") from None


def _wandb(folder: Path, key: str, settings: Mapping[str, Any]) -> tuple[Send, Callable[[], None]]:
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        mode=os.environ.get("WANDB_MODE", "offline"),
        dir=folder,
        name=folder.name,
        id=key,
        resume="allow",
        config=dict(settings),
        settings=wandb.Settings(silent=True, console="off"),
    )
    return lambda step, values: run.log(dict(values), step=step), run.finish


def _mlflow(folder: Path, key: str, settings: Mapping[str, Any]) -> tuple[Send, Callable[[], None]]:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    own = f"sqlite:///{folder.resolve() / 'mlflow.db'}"
    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", own))
    project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    known = client.get_experiment_by_name(project)
    experiment = known.experiment_id if known else client.create_experiment(project)
    before = client.search_runs([experiment], f"tags.eca_net_run = '{key}'")
    tags = {"eca_net_run": key}
    started = before[0] if before else client.create_run(experiment, None, tags, folder.name)
    run = started.info.run_id
    if not before:
        client.log_batch(run, params=[Param(k, str(v)[:500]) for k, v in settings.items()])

    def send(step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        client.log_batch(run, [Metric(tag, value, now, step) for tag, value in values.items()])

    return send, partial(client.set_terminated, run)


class RunFiles:
    """Writes on the main process; on every other rank each method does nothing.

    Args:
        folder: the run's folder; None on ranks above 0.
        fixed: what every checkpoint holds besides the state: network, classes, recipe, flags.
        title: of the curves.
        first_epoch: that this process will finish.
        flags: when checkpoints are due, and where else the figures go.
        saved: the run that this process goes on from, or None.

    Raises:
        UserError: another process is writing to the folder, or has written to it since `saved` was
            read.
    """

    def __init__(
        self,
        folder: Path | None,
        fixed: dict,
        *,
        title: str = "",
        first_epoch: int = 0,
        flags: RunSettings | None = None,
        saved: SavedRun | None = None,
    ):
        self.folder, self.fixed, self.flags = folder, fixed, flags or RunSettings()
        self.saved_at = time.monotonic()
        if folder is not None:
            self.lock = run_folder.FolderLock(folder)
            self.checkpoints = CheckpointFolder(folder)
            self._refuse_newer(saved)
            self.title, self.first_epoch = title, first_epoch
            self.logger: RunLogger | None = None

    @classmethod
    def open(
        cls,
        network: str,
        flags: RunSettings,
        start: Start,
        record: Mapping[str, Any],
        state: Any,
        context: Context,
    ) -> "RunFiles":
        """Opens the run folder, which rank 0 alone writes. Call it on every rank.

        Args:
            network: its name, with which that of the run begins.
            flags: the folder, a word for its name, and when checkpoints are due.
            record: what every checkpoint holds besides the state, but for the environment.
            state: as training begins; without a best epoch from here on where the folder has none.
        """
        folder, name = None, run_folder.run_name(network, flags.action)
        if context.is_main:
            folder = run_folder.open_folder(name, flags.output, start.folder)
            context.say(f"run folder: {folder}")
        run = cls(
            folder,
            {**record, "environment": run_folder.environment(context)},
            title=name,
            first_epoch=state.epoch,
            flags=flags,
            saved=start.run,
        )
        if run.lacks_best():
            state.best = {}
        run.begin(state.snapshot())
        return run

    def begin(self, snapshot: dict) -> None:
        """Makes the folder a run's: a checkpoint of its first state, args.json, an open log.

        The checkpoint comes before args.json: whatever kills the run from then on, it comes back
        with its own network, recipe and seed.
        """
        if self.folder is not None:
            if not self.checkpoints.last.exists():
                self.save(snapshot)
            run_folder.write_json(self.path("args.json"), self.fixed)
            tracker = None
            if self.flags.log is not None:
                settings = {**self.fixed["args"], **self.fixed["recipe"]}
                tracker = Tracker(self.flags.log, self.folder, settings)
            self.logger = RunLogger(self.folder, self.title, self.first_epoch, self.lock, tracker)

    def _refuse_newer(self, saved: SavedRun | None) -> None:
        """Refuses a folder to which another process has written since `saved` was read."""
        try:
            last = Checkpoint.read(self.checkpoints.last).run
        except UserError:  # none, or damaged: nothing newer than what was read then
            return
        if last is not None and (saved is None or last.position != saved.position):
            epoch, step = last.position
            raise UserError(
                f"{self.checkpoints.last}: another process has gone on with this run since it was "
                f"read (epoch {epoch + 1}, step {step}): start again with --resume auto --output "
                f"{self.folder}",
                EXIT_FAILED,
            )

    def path(self, name: str) -> Path:
        """Returns where a file of the run is to be written, on the main process.

        Raises:
            UserError: the folder's name now leads to another folder.
        """
        assert self.folder is not None
        self.lock.check()
        return self.folder / name

    def lacks_best(self) -> bool:
        """Returns whether the folder holds no `best`: a new one, even of a run begun elsewhere."""
        return self.folder is not None and not self.checkpoints.best.exists()

    def due(self, step: int) -> bool:
        """Returns whether a checkpoint is due after `step` steps of the epoch."""
        every, minutes = self.flags.save_every, self.flags.save_minutes
        passed = (time.monotonic() - self.saved_at) / 60
        return bool(every and step % every == 0) or bool(minutes and passed >= minutes)

    def save(self, snapshot: dict) -> None:
        """Writes `last`; the one before it becomes `previous`."""
        if self.folder is not None:
            self.lock.check()
            self.checkpoints.save_last({**self.fixed, **snapshot})
        self.saved_at = time.monotonic()

    def draw(self, name: str, make: Callable[[], bytes | None]) -> None:
        """Writes the picture that `make` draws, if any; one that cannot be written ends no run."""
        if self.folder is not None:
            assert self.logger is not None  # `begin` has opened it
            with self.logger.said_once(name):
                if picture := make():
                    write_atomically(self.folder / name, picture)

    def finish_epoch(
        self, snapshot: dict, panels: Sequence[Panel], images_per_second: float, improved: bool
    ) -> None:
        """Writes an epoch's files, `last` at the end: killed before it, the epoch is run again.

        Args:
            panels: the diagrams of curves.png.
            improved: the epoch is the best so far.
        """
        if self.folder is not None:
            if improved:
                self.lock.check()
                self.checkpoints.save_best({**self.fixed, **snapshot})
            assert self.logger is not None  # `begin` has opened it
            best = snapshot["progress"]["best"].get("epoch")
            self.logger.log(snapshot["history"], panels, images_per_second, best)
        self.save(snapshot)

    def stopped(self, epoch: int, step: int, exit_code: int) -> int:
        """Says that a run was asked to stop and where it was saved; returns `exit_code`."""
        if self.folder is not None:
            print(f"asked to stop: saved in epoch {epoch + 1} after step {step}; go on with")
            print(f"  {command('--resume', self.checkpoints.last)}", flush=True)
            self.close()
        return exit_code

    def farewell(self, result: str, has_best: bool, data: str, *more: object) -> list[str]:
        """Returns the closing lines: the result, and the commands that a user wants next.

        Args:
            result: a line on the best epoch.
            has_best: there is one.
            data: as the command line named it.
            more: flags with which training goes on; none where the learning rate would jump.
        """
        if self.folder is None:
            return []
        last, weights = self.checkpoints.last, self.checkpoints.best
        evaluate = f"  evaluate:    {command('-e', '--resume', weights, data)}"
        return [
            f"done: {result}",
            *([evaluate] if has_best else []),
            look_line(self.folder),
            *([f"  train on:    {command('--resume', last, *more)}"] if more else []),
        ]

    def close(self) -> None:
        """Lets another process write to the folder."""
        if self.folder is not None:
            if self.logger is not None and self.logger.tracker is not None:
                self.logger.tracker.close()
            self.lock.close()


class RunLogger:
    """Writes one row per epoch, always from the run's whole history.

    metrics.csv and curves.png are functions of that history, which the checkpoint holds: after an
    interruption they are neither short of a row nor have one twice. Wall-clock figures, which no
    two runs share, go to TensorBoard alone.

    Epochs count from 1 there, as people count, and from 0 in the history.

    Args:
        first_epoch: of this process; from 0; TensorBoard forgets older events from there on.
        lock: of the folder, checked before each file; None for a folder without one.
        tracker: gets the same values as TensorBoard, or None.
    """

    def __init__(
        self,
        folder: Path,
        title: str,
        first_epoch: int = 0,
        lock: FolderLock | None = None,
        tracker: Tracker | None = None,
    ):
        self.folder, self.title, self.lock, self.tracker = folder, title, lock, tracker
        self.warned: set[str] = set()  # files that could not be written, as has been said
        name = f"events.out.tfevents.{time.time():010.0f}.{os.uname().nodename}.{os.getpid()}"
        self.events = folder / name
        self.purge = first_epoch + 1 if first_epoch else 0
        # Also of a run that goes on elsewhere: the first file of a folder gets all epochs.
        is_new = not any(folder.glob("events.out.tfevents.*"))
        self.in_events = self.sent = 0 if is_new else first_epoch  # rows of the history

    def log(
        self,
        history: list[Row],
        panels: Sequence[Panel],
        images_per_second: float,
        best: int | None = None,
    ) -> None:
        """Writes all files anew; the last row of `history` is the epoch just finished.

        `best` is the number, from 0, of the epoch that curves.png marks.

        One that cannot be written ends no run: the checkpoints hold the same figures. The next
        epoch tries it again.

        Raises:
            UserError: the folder's name now leads to another folder.
        """
        fullest = max(history, key=len)  # an epoch without an evaluation has fewer columns
        columns = list(fullest)
        with self.said_once("metrics.csv"):
            text = io.StringIO()
            writer = csv.DictWriter(text, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows({**row, "epoch": int(row["epoch"]) + 1} for row in history)
            write_atomically(self.folder / "metrics.csv", text.getvalue().encode())
        with self.said_once("TensorBoard's events"):
            self._add_events(history, images_per_second)
        if self.tracker is not None:
            with self.said_once(f"the log for {self.tracker.library}"):
                for row in history[self.sent :]:
                    self.tracker.send(*_scalars(row, images_per_second, row is history[-1]))
                    self.sent += 1
        with self.said_once("curves.png"):
            draw_curves(history, panels, self.folder / "curves.png", self.title, best)

    def _add_events(self, history: list[Row], speed: float) -> None:
        """Adds epochs that TensorBoard's file lacks, and the images per second of the last one.

        In one write, without the thread of torch's SummaryWriter, which prints a traceback where a
        disk is full; and by the file's name each time, as its folder may have another by then.
        """
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        events, now = [], time.time()
        if not self.events.exists():
            events = [Event(wall_time=now, file_version="brain.Event:2")]
            if self.purge:
                begins = SessionLog(status=SessionLog.START)
                events.append(Event(wall_time=now, step=self.purge, session_log=begins))
        for row in history[self.in_events :]:
            step, values = _scalars(row, speed, row is history[-1])
            summary = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
            events.append(Event(wall_time=now, step=step, summary=Summary(value=summary)))
        records = io.BytesIO()
        writer = RecordWriter(records)
        for event in events:
            writer.write(event.SerializeToString())
        with open(self.events, "ab", buffering=0) as file:
            length = file.tell()
            try:
                if file.write(records.getvalue()) < len(records.getvalue()):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with contextlib.suppress(OSError):  # part of a record would hide what follows it
                    file.truncate(length)
                raise
        self.in_events = len(history)

    @contextmanager
    def said_once(self, name: str) -> Iterator[None]:
        """Turns a fault of the file system into a line on stderr, the first time for `name`.

        Raises:
            UserError: the folder's name now leads to another folder, which is no such fault.
        """
        if self.lock is not None:
            self.lock.check()
        try:
            yield
        except (OSError, UserError) as error:
            if name not in self.warned:
                self.warned.add(name)
                print(
                    f"! {self.folder}: {name} could not be written ({error}); the run goes on, and "
                    "its checkpoints hold the same figures",
                    file=sys.stderr,
                    flush=True,
                )


def _scalars(row: Row, speed: float, is_last: bool) -> tuple[int, dict[str, float]]:
    """Returns an epoch's number, from 1, and its values by tag: train/loss, val/top1, lr, …

    Args:
        speed: images per second, which belongs to the last row alone.
    """
    values = {name.replace("_", "/", 1): row[name] for name in row if name != "epoch"}
    return int(row["epoch"]) + 1, values | ({"train/images_per_second": speed} if is_last else {})


def draw_curves(
    history: Sequence[Row], panels: Sequence[Panel], path: Path, title: str, best: int | None = None
) -> None:
    """Draws the panels over epochs, as one PNG. Values below 0 stand for "none".

    Args:
        best: the epoch, from 0, that is marked as the best.
    """
    from matplotlib.ticker import MaxNLocator

    from utils.system.style import png, styled

    with styled() as plt:
        rows = -(-len(panels) // 2)
        figure, axes = plt.subplots(rows, 2, figsize=(9, 3.3 * rows))
        for axis, panel in zip(axes.flat, panels, strict=False):
            shown = [
                value
                for curve in panel.curves
                for value in _draw_curve(axis, panel, curve, history)
            ]
            axis.set(title=panel.title, ylabel=panel.unit, xlabel="Epoch")
            if panel.can_be_log and shown and min(shown) > 0 and max(shown) > DECADES * min(shown):
                axis.set_yscale("log")  # one high value would flatten all the others
            if best is not None:
                axis.axvline(best + 1, color=GREY, linestyle=":", zorder=0)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            if panel.unit.endswith("(%)"):
                axis.set_ylim(top=min(100.0, axis.get_ylim()[1]))
            if handles := axis.get_legend_handles_labels()[0]:
                columns = min(2, len(handles))
                axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns)
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        note = "" if best is None else f"\ndotted: the best epoch, {best + 1}"
        figure.suptitle(title + note)
        write_atomically(path, png(figure, colours=None))


def _draw_curve(axis: Any, panel: Panel, curve: Curve, history: Sequence[Row]) -> list[float]:
    """Draws one column of the history, and returns its finite values."""
    # Epochs of an earlier version lack later columns; what is no number stays.
    own = [row for row in history if curve.column in row and not row[curve.column] < 0]
    points = [(row["epoch"] + 1, row[curve.column]) for row in own]
    if points:
        label = curve.label and f"{curve.label} {panel.last.format(points[-1][1])}"
        axis.plot(
            *zip(*points, strict=True), "o-", ms=3, color=curve.colour, label=label, clip_on=False
        )
    return [value for _, value in points if math.isfinite(value)]


def look_line(folder: Path) -> str:
    """Returns the closing line that shows the curves of the run in `folder`."""
    board = _program("tensorboard", "tensorboard.main")
    curves = shlex.quote(str(folder / "curves.png"))
    return f"  look:        {board} --logdir {shlex.quote(str(folder))}   (or {curves})"


def command(*arguments: object) -> str:
    """Returns a command line for this script, started the way this process was."""
    script, *typed = sys.argv
    device = [  # which checkpoints do not hold
        word
        for word, former in zip(typed, ["", *typed], strict=False)
        if word.partition("=")[0] in DEVICE_FLAGS or former in DEVICE_FLAGS
    ]
    own = shlex.join([script, *map(str, arguments), *device])
    ranks, nodes = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("GROUP_WORLD_SIZE", "1")
    if ranks is None:
        return f"{_interpreter()} {own}"
    launcher = _program("torchrun", "torch.distributed.run")
    if nodes == "1":
        return f"{launcher} --nproc-per-node={ranks} {own}"
    # The rest differs from node to node, and from start to start.
    return f"{launcher} --nnodes={nodes} --nproc-per-node={ranks} … {own}"


def tool(module: str, *arguments: object) -> str:
    """Returns a command line for one of the tools."""
    return f"{_interpreter()} -m {shlex.join([module, *map(str, arguments)])}"


def _program(name: str, module: str) -> str:
    """Returns what to type for a program that was installed beside this Python."""
    python = _interpreter()
    return name if python == "python" else f"{python} -m {module}"


def _interpreter() -> str:
    """Returns what to type for this Python: `python` where that is it, else a short path.

    Of `make demo` it is the one in .venv, which nobody has activated.
    """
    own, usual = Path(sys.executable), shutil.which("python")
    # Not resolved: every virtual environment's Python is a link to the same file.
    if usual and Path(usual).parent == own.parent and Path(usual).samefile(own):
        return "python"
    with contextlib.suppress(ValueError):
        own = own.relative_to(Path.cwd())
    return shlex.quote(str(own))
