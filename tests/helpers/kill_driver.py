"""Trains, is killed at a random moment, goes on, and compares: started by test_kill_and_resume.py.

    python tests/helpers/kill_driver.py SCRIPT DATA FOLDER KILLS [FLAGS…]

Moments are counted over one run: every optimizer step, and every fsync, link and rename of a file,
each before and after. A reference run counts them. Every trial is a child process that takes
SIGKILL at one of them, chosen by a seeded generator, then another child that resumes. Children are
forked, so that torch is imported once.

A run begun anew would end in the same bits, too; so what a resumed child prints and the number of
its steps must show that it went on.
"""

import os
import random
import runpy
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import detect_main as _detect_main  # noqa: E402, F401 - imported before forking
import main as _main  # noqa: E402, F401
from utils.runs import checkpoint  # noqa: E402
from utils.training.state import TrainingState  # noqa: E402

STATE = ("state_dict", "raw_state_dict", "averaged_steps", "optimizer", "progress", "history")


class Moments:
    """Counts moments; at number `fatal` the process is killed.

    `log` gets the number reached, and that of steps.
    """

    def __init__(self, fatal: int, log: Path):
        self.fatal, self.log, self.count, self.steps = fatal, log, 0, 0

    def __call__(self) -> None:
        self.count += 1
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        self.log.write_text(f"{self.count} {self.steps}")

    def around(self, function):
        def wrapped(*args, **kwargs):
            self()
            result = function(*args, **kwargs)
            self()
            return result

        return wrapped


def stepping(finish_step, moment: Moments):
    """Counts a moment after each step, before anything of it is saved."""

    def counted(*args):
        finish_step(*args)
        moment.steps += 1
        moment()

    return counted


def child(script: str, arguments: list[str], fatal: int, log: Path) -> int:
    """Runs the script in a fork with the moment `fatal` (0: none); returns its exit status."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    quiet = os.open(log.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    moment = Moments(fatal, log)
    log.write_text("0 0")
    for name in ("fsync", "link", "replace"):
        setattr(os, name, moment.around(getattr(os, name)))
    TrainingState.finish_step = stepping(TrainingState.finish_step, moment)
    sys.argv = [script, *arguments]
    code = 1
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stopped:
        code = stopped.code or 0
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code if isinstance(code, int) else 1)


def same(a, b) -> bool:
    """Bitwise equality of nested plain values and tensors."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def state(folder: Path) -> dict:
    """All that a run ends with."""
    found = {}
    for name in (checkpoint.LAST, checkpoint.BEST):
        saved = checkpoint.load(folder / name)
        found[name] = {k: saved[k] for k in STATE if k in saved}
    found["metrics.csv"] = (folder / "metrics.csv").read_bytes()
    return found


def steps_done(folder: Path, in_all: int) -> int | None:
    """What a resumption need not do again, of a run of `in_all` steps; None: it starts anew."""
    newest = checkpoint.CheckpointFolder(folder).newest_good()
    if newest is None:
        return None
    run = newest[0].run
    return run.epoch * (in_all // run.recipe["epochs"]) + run.step


def run() -> None:
    script, data, place, kills, *flags = sys.argv[1:]
    torch.set_num_threads(1)
    folder, log = Path(place), Path(place) / "moments"
    folder.mkdir()
    chance = random.Random(0)

    reference = folder / "reference"
    assert child(script, [data, "--output", str(reference), *flags], 0, log) == 0, log
    total, steps = map(int, log.read_text().split())
    resumed = 0
    wanted = state(reference)
    for trial in range(int(kills)):
        output = folder / f"trial-{trial}"
        fatal = chance.randint(1, total)
        workers = str(trial % 3)
        command = [data, "--output", str(output), "--resume", "auto", *flags, "-j", workers]
        code = child(script, command, fatal, log)
        assert code == -signal.SIGKILL, f"trial {trial}: exit {code} at moment {fatal}"
        again = [data, "--output", str(output), "--resume", "auto", *flags]
        if trial % 4 == 0:  # killed twice
            code = child(script, again, max(1, (total - fatal) // 2), log)
            assert code in (0, -signal.SIGKILL), f"trial {trial}: exit {code}"
        done, told = steps_done(output, steps), log.with_suffix(".txt").stat().st_size
        code = child(script, [*again, "-j", str((trial + 1) % 3)], 0, log)
        assert code == 0, f"trial {trial}: exit {code} after moment {fatal} of {total}"
        took = int(log.read_text().split()[1])
        assert took == steps - (done or 0), f"trial {trial}: {took} steps after {done} of {steps}"
        text = log.with_suffix(".txt").read_text()[told:]
        assert (f"resuming {output}" in text) == (done is not None), f"trial {trial}: {text}"
        resumed += bool(done)
        found = state(output)
        for part, content in wanted.items():
            assert same(content, found[part]), f"trial {trial}, moment {fatal}: {part} differs"
        print(f"trial {trial}: killed at moment {fatal} of {total}, equal", flush=True)
        for path in output.glob("*.pth"):
            path.unlink()
    assert resumed, "each trial was killed before its first step was saved"


if __name__ == "__main__":
    run()
