"""tools.run_report in this process."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

from tools import run_report
from utils.system import faults


@pytest.fixture
def write_page(monkeypatch, tmp_path):
    """Runs the tool in an empty folder: (exit code, lines on stdout, lines on stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(faults, "end_children", lambda: True)

    def start(*arguments):
        monkeypatch.setattr(sys, "argv", ["run_report", *map(str, arguments)])
        out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            faults.run_script(run_report.main)
        said = [stream.buffer.getvalue().decode().splitlines() for stream in (out, err)]
        return ended.value.code, *said

    return start
