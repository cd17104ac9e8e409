"""What several tests of one script need: the script in this process."""

import sys

import pytest

from utils.options.parser import run_script


@pytest.fixture
def export_cli(monkeypatch, capsys, tmp_path):
    """Runs a script's main in an empty folder and gives (exit code, all that it printed)."""
    import export

    monkeypatch.chdir(tmp_path)

    def call(*arguments, main=export.main):
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            run_script(main)
        return end.value.code, "".join(capsys.readouterr())

    return call
