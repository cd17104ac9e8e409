"""Notes requests to stop, and lets all ranks come to the same decision at the same step."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

from utils.system import interrupts
from utils.system.errors import EXIT_INTERRUPTED, EXIT_STOPPED


class StopRequest:
    """Notes signals that ask the run to end, instead of dying from them.

    They are SIGTERM, SIGUSR1 (job schedulers' warning), SIGHUP (the terminal or the ssh connection
    is gone) and Ctrl-C. The loop finishes its step, saves and leaves with `exit_code`. A second
    Ctrl-C interrupts at once. Where SIGHUP was ignored already (`nohup`), it stays ignored. Use as
    a context manager: the former handlers come back on leaving.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)

    def __init__(self):
        self.signum: int | None = None

    def __enter__(self):
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        noted = [s for s in self.SIGNALS if not (s == signal.SIGHUP and ignored)]
        self._former = {s: signal.signal(s, self._note) for s in noted}
        return self

    def __exit__(self, *_):
        for signum, handler in self._former.items():
            if signal.getsignal(signum) == self._note:  # a second Ctrl-C has another by then
                signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.signum == signal.SIGINT:
            interrupts.interrupt(signum, frame)
        self.signum = signum

    def __bool__(self) -> bool:
        return self.signum is not None

    @property
    def exit_code(self) -> int:
        return EXIT_INTERRUPTED if self.signum == signal.SIGINT else EXIT_STOPPED


class Votes:
    """Answers yes/no questions alike on all ranks: yes where any rank says yes.

    A signal may reach one rank a step before another, and clocks differ; a rank that stopped alone
    would leave the others waiting in a collective. The votes of one step are summed while the next
    one runs, so the answer is one step old and costs no waiting.

    Args:
        group: a host-side (gloo) process group; None in a single process, where the answer to a
            vote is the vote itself.
    """

    def __init__(self, group: dist.ProcessGroup | None):
        self.group = group
        self._pending: tuple[torch.Tensor, dist.Work] | None = None

    def cast(self, *votes: bool) -> list[bool]:
        """Gives this rank's votes and returns the answers that are due."""
        if self.group is None:
            return list(votes)
        due = [False] * len(votes)
        if self._pending is not None:
            tensor, work = self._pending
            work.wait()
            due = [bool(v) for v in tensor.tolist()]
        tensor = torch.tensor(votes, dtype=torch.int32)
        self._pending = (
            tensor,
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group, async_op=True),
        )
        return due

    def settle(self) -> None:
        """Waits for the votes under way; before a collective of another kind, and at the end."""
        if self._pending is not None:
            self._pending[1].wait()
            self._pending = None
