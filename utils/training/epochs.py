"""Runs the epochs of classifiers and detectors alike: train, save, evaluate, record, stop.

It knows no files: it is handed a writer. It knows no network: a `Task` has the steps and the
evaluation, and the task's `Outcome` the columns, the score and the words.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from utils.system import distributed
from utils.system.distributed import Context
from utils.system.errors import UserError
from utils.system.stop_requests import StopRequest, Votes
from utils.training.outcome import Outcome
from utils.training.progress import Pace, Progress
from utils.training.state import RunState


class Order(Protocol):
    """Describes the order of an epoch's batches, a function of the epoch."""

    steps: int

    def seek(self, epoch: int, first_step: int) -> None:
        """Makes the next pass that of `epoch`, from `first_step` on."""


class Done(Protocol):
    """Describes a batch after its step; `broken` are the images that had to be replaced in it."""

    @property
    def broken(self) -> Sequence[int]:
        """Returns the numbers of these images."""


class Writer(Protocol):
    """Describes what saves a run's results. `utils.runs.writer.RunFiles` is one."""

    def due(self, step: int) -> bool:
        """Returns whether the state is to be saved after `step` steps of the epoch."""

    def save(self, snapshot: dict) -> None:
        """Saves the state."""

    def finish_epoch(self, snapshot: dict, images_per_second: float, improved: bool) -> None:
        """Saves the state after an epoch and its evaluation."""

    def stopped(self, epoch: int, step: int, exit_code: int, why: str = "asked to stop") -> int:
        """Says why the run stops and where it was saved; returns `exit_code`."""


@dataclass(frozen=True)
class Task:
    """Holds what is trained, for how long, and how it is judged.

    Args:
        outcome: columns, score and words.
        order: of the training batches.
        steps: trains from the run's step of this number on, resting after each step.
        evaluate: judges the network over all ranks; None when the function that it is handed,
            which asks whether to stop, said so. Called on every rank.
        lr_at: step of the run → learning rate.
        epochs, batch_size, print_freq: of the run.
        ended_early: why no further epoch is to begin, as a line, or None. A function of what is
            saved alone, so that every rank, and a run that is resumed, comes to the same.
        fault: what was found beside the training that the run cannot pass, or None. The run is
            saved before it ends with it.
    """

    outcome: Outcome
    order: Order
    steps: Callable[[int], Iterator[Done]]
    evaluate: Callable[[Callable[[], bool]], Any]
    lr_at: Callable[[int], float]
    epochs: int
    batch_size: int
    print_freq: int
    ended_early: Callable[[RunState], str | None] = lambda state: None
    fault: Callable[[], UserError | None] = lambda: None


def run_epochs(
    state: RunState, task: Task, writer: Writer, context: Context, stop: StopRequest
) -> int:
    """Trains from where `state` is to the last epoch, to an early end, or until asked to stop.

    Returns:
        The exit code: 0 after the last epoch or an early end, that of `stop` otherwise.

    Raises:
        UserError: the task's `fault`, on the rank that found it.
    """
    votes, pace = Votes(context.votes), Pace()
    while state.epoch < task.epochs:
        first = state.epoch * task.order.steps  # the epoch's first step, counted over the run
        speed = _train_epoch(state, task, writer, context, stop, votes, pace)
        if speed is None:
            fault = task.fault()
            # It also waits: torchrun ends the others as soon as one has ended.
            code: int = max(distributed.gather(0 if fault is None else fault.exit_code))
            if not code:
                return writer.stopped(state.epoch, state.step, stop.exit_code)
            writer.stopped(state.epoch, state.step, code, "stopped by a fault")
            if fault is None:  # the rank that met with it says which
                return code
            raise fault
        ended = time.perf_counter()
        state.share_buffers()
        writer.save(state.snapshot())  # whatever evaluation meets with, the epoch is not lost
        found = task.evaluate(lambda: context.is_main and bool(stop))
        if found is None:
            return writer.stopped(state.epoch, state.step, stop.exit_code)
        recorded_at = first + task.order.steps - 1 if task.outcome.lr_at_end else first
        improved = state.finish_epoch(task.lr_at(recorded_at), found, task.outcome)
        writer.finish_epoch(state.snapshot(), speed, improved)
        pace.note_between(time.perf_counter() - ended)
        context.say(task.outcome.epoch_line(state.history[-1], task.epochs, speed, improved))
        if state.epoch < task.epochs and (why := task.ended_early(state)):
            context.say(why)
            break
    return 0


def _train_epoch(
    state: RunState,
    task: Task,
    writer: Writer,
    context: Context,
    stop: StopRequest,
    votes: Votes,
    pace: Pace,
) -> float | None:
    """Does the steps that are left of the epoch, saving where due.

    Returns:
        Images per second; None when the run was asked to stop, or met with a fault, and has been
        saved.
    """
    first = state.epoch * task.order.steps
    task.order.seek(state.epoch, state.step)
    progress = Progress(
        f"epoch {state.epoch + 1}/{task.epochs}",
        task.order.steps,
        task.batch_size,
        task.print_freq,
        task.outcome.step_words,
        done=state.step,
        quiet=not context.is_main,
        pace=pace,
        epochs_left=task.epochs - state.epoch - 1,
    )
    for batch in task.steps(first + state.step):
        state.finish_step(batch.broken)
        if progress.advance():
            state.guard.check()
            means = state.meter.means(state.meter.total())
            progress.show(means, task.lr_at(first + state.step - 1))
        stops = bool(stop) or task.fault() is not None
        stopping, saving = votes.cast(stops, writer.due(state.step))
        if stopping or saving:
            writer.save(state.snapshot())
        if stopping:
            return None
    votes.settle()
    return progress.close()
