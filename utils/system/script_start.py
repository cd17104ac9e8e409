"""Puts a script's surroundings in order before it imports what takes seconds: imported first.

Where Python takes the names of files for ASCII (`LC_ALL=C PYTHONUTF8=0`), the script starts again
in Python's UTF-8 mode: else a class would have one name here and another one elsewhere.
"""

import codecs
import os
import signal
import sys

from utils.system import interrupts

if interrupts.runs_a_script():
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupts.leave)
    os.environ["MPLBACKEND"] = "Agg"  # only files are drawn, and a senseless name breaks the import
    if codecs.lookup(sys.getfilesystemencoding()).name == "ascii":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
