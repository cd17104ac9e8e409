"""docs/RELIABILITY.md names tests that exist, and the exit codes that the code has."""

import re

from helpers.trees import ROOT

from utils.system import errors

TEXT = (ROOT / "docs" / "RELIABILITY.md").read_text(encoding="utf-8")


def test_every_named_test_exists():
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", TEXT)
    assert len(named) > 40
    for file, function in named:
        source = next((ROOT / "tests").rglob(file)).read_text(encoding="utf-8")
        assert f"def {function}(" in source, f"{file}::{function}"


def test_every_fault_has_a_test():
    table = TEXT[TEXT.index("## Faults") :]
    rows = [line for line in table.splitlines() if line.startswith("|") and "**" not in line][2:]
    assert len(rows) > 30
    for row in rows:
        assert "::" in row or row.endswith("| the same |"), row


def test_the_exit_codes_are_the_codes():
    (sentence,) = re.findall(r"Exit codes: (.*?)\. ", TEXT, re.DOTALL)
    told = set(map(int, re.findall(r"\b\d+\b", sentence)))
    assert told == {0} | {v for k, v in vars(errors).items() if k.startswith("EXIT_")}


def test_the_number_of_kills_is_what_make_test_faults_runs():
    source = (ROOT / "tests" / "faults" / "test_kill_and_resume.py").read_text(encoding="utf-8")
    tests = [part for part in source.split("\n\n\n") if part.startswith("@pytest.mark.faults")]
    numbers = [
        n for part in tests for n in re.findall(r"(?:tree|shapes),\s+tmp_path,\s+(\w+),", part)
    ]
    (default,) = re.findall(r'environ.get\("KILLS", (\d+)\)', source)
    kills = sum(int(default if n == "KILLS" else n) for n in numbers)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for text in (TEXT, readme):
        assert re.findall(r"kills runs at (\d+) ", text) == [str(kills)]
