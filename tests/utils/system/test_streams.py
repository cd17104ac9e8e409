"""A stream that cannot be written ends a program, or not: as the program needs it."""

import io
import os
import sys

import pytest

from utils.system.errors import UserError
from utils.system.streams import guarded, output_as_log


@pytest.fixture
def full():
    """A stream on a full disk, written line by line as a terminal's."""
    with open("/dev/full", "w", buffering=1, encoding="utf-8") as stream:
        yield stream


def test_a_result_that_cannot_be_written_ends_the_program(full, monkeypatch):
    monkeypatch.setattr(sys, "stdout", full)
    with guarded():
        with pytest.raises(UserError, match="stdout: No space left on device; make room") as caught:
            print("result")
        assert caught.value.exit_code == 1
        sys.stdout.flush()  # told once
        with pytest.raises(UserError):
            print("another")
        os.write(full.fileno(), b"what a library prints goes nowhere")
    assert sys.stdout is full


def test_a_log_that_cannot_be_written_is_told_once(full, monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr(sys, "stdout", full)
    monkeypatch.setattr(sys, "stderr", said)
    with guarded(), output_as_log():
        for _ in range(3):
            print("epoch", flush=True)
    assert said.getvalue() == "! stdout: No space left on device; what follows is not shown\n"


def test_a_reader_that_has_gone(monkeypatch):
    """run_script makes no line of it: `| head` had what it wanted."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with guarded(), pytest.raises(BrokenPipeError):
            print("result", flush=True)


def test_closed_streams_are_opened_to_nowhere(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with guarded():
        print("result", flush=True)
        assert sys.stdout.fileno() > 2
    assert sys.stdout is None


def test_a_stream_that_works_gets_all(capsys):
    with guarded():
        print("ä", flush=True)
        assert sys.stdout.encoding
    assert capsys.readouterr().out == "ä\n"
