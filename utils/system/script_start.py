"""Puts a script's surroundings in order before it imports what takes seconds: imported first.

Where Python takes the names of files for ASCII (`LC_ALL=C PYTHONUTF8=0`), the script starts again
in Python's UTF-8 mode: else a class would have one name here and another one elsewhere.

PyTorch's threads (of GNU OpenMP, which reads its settings as it is loaded) wait for one another by
spinning. Where another process has taken a core, a thread that spins keeps the one that it waits
for from running; so they spin for a short time only, and sleep then. docs/PERFORMANCE.md has what
that costs on a quiet machine, and what it saves on another.
"""

import codecs
import os
import signal
import sys
from pathlib import Path

from utils.system import signals

SPINS = "1000"  # turns of the loop in which a thread waits; 300,000 without the setting
ROOT = Path(__file__).resolve().parents[2]


def runs_a_script() -> bool:
    """Returns whether this process is a script of ours, not a test or a notebook."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    return file is not None and Path(file).resolve().parent in (ROOT, ROOT / "tools")


def open_closed_streams() -> None:
    """Opens stdin, stdout and stderr to nowhere where they are closed (`>&-`).

    A checkpoint that is opened under one of their numbers would get what libraries print.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which takes the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w"))


if runs_a_script():
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signals.leave)
    open_closed_streams()
    os.environ["MPLBACKEND"] = "Agg"  # only files are drawn, and a senseless name breaks the import
    if "OMP_WAIT_POLICY" not in os.environ:  # what a user has set stands
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    if codecs.lookup(sys.getfilesystemencoding()).name == "ascii":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
