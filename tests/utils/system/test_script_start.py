"""What a script sets before PyTorch is loaded, as the OpenMP library itself reports it."""

import os
import re
import subprocess
import sys

import pytest
from helpers.small_runs import PATIENCE
from helpers.trees import ROOT


def test_threads_spin_for_a_short_time():
    inherited = {
        k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    done = subprocess.run(
        [sys.executable, "paras_flops.py", "-a", "eca_mobilenetv2"],
        cwd=ROOT,
        env={**inherited, "OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0
    assert "eca_mobilenetv2" in done.stdout
    spins = re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if spins is None:
        pytest.skip("this PyTorch has another OpenMP library")
    assert spins[1] == "1000"
