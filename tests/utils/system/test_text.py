"""Text of strangers on a terminal and in a spreadsheet."""

import pytest

from utils.system.distributed import setup
from utils.system.text import cell, counted, printable, printable_lines


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "=cmd|' /C calc'!A0"]
)
def test_what_a_spreadsheet_would_compute_becomes_text(text):
    assert cell(text) == f"'{text}"
    assert cell(f"a{text}") == f"a{text}"


def test_control_characters_are_escaped():
    assert printable("a\x1b[2J\n\x9b\x7fé\ud800") == "a\\x1b[2J\\x0a\\x9b\\x7fé\\ud800"
    assert printable_lines("one\ntwo\r\x1b]0;x\x07") == "one\ntwo\\x0d\\x1b]0;x\\x07"


def test_a_context_says_nothing_that_moves_the_cursor(capsys):
    setup("cpu").say("a\x1b[2J", "two\nlines")
    assert capsys.readouterr().out == "a\\x1b[2J\ntwo\nlines\n"


def test_counted_nouns():
    assert [counted(n, "image", ",") for n in (1, 0, 1200)] == [
        "1 image",
        "0 images",
        "1,200 images",
    ]
    assert [counted(n, "class", "") for n in (1, 1000)] == ["1 class", "1000 classes"]
