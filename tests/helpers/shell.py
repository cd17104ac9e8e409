"""Scripts started by a shell, for what only a shell does: closed and full outputs, limits."""

import os
import subprocess
import sys
from pathlib import Path

from helpers.small_runs import PATIENCE
from helpers.trees import ROOT


def shell(folder: Path, line: str, **variables: str) -> subprocess.CompletedProcess:
    """Runs a line of bash in `folder`; in it `$PY main.py` starts one of our scripts."""
    return subprocess.run(
        ["bash", "-c", line.replace("$PY ", f"'{sys.executable}' {ROOT}/")],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )
