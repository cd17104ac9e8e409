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

from utils.system import interrupts

SPINS = "1000"  # turns of the loop in which a thread waits; 300,000 without the setting

if interrupts.runs_a_script():
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupts.leave)
    os.environ["MPLBACKEND"] = "Agg"  # only files are drawn, and a senseless name breaks the import
    if "OMP_WAIT_POLICY" not in os.environ:  # what a user has set stands
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    if codecs.lookup(sys.getfilesystemencoding()).name == "ascii":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
