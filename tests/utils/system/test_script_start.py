"""What a script sets before PyTorch is loaded, as the OpenMP library itself reports it."""

import os
import re
import subprocess
import sys

import pytest
from helpers.small_runs import PATIENCE
from helpers.trees import ROOT


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7")],
)
def test_threads_spin_for_a_short_time_unless_the_user_says_otherwise(given, spins):
    inherited = {
        k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    done = subprocess.run(
        [sys.executable, "paras_flops.py", "-a", "eca_mobilenetv2"],
        cwd=ROOT,
        env={**inherited, "OMP_DISPLAY_ENV": "VERBOSE", **given},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0
    assert "eca_mobilenetv2" in done.stdout
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if found is None:
        pytest.skip("this PyTorch has another OpenMP library")
    assert found[1] == spins
