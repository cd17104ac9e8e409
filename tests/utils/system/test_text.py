"""Text of strangers on a terminal and in a spreadsheet."""

import pytest

from utils.system.distributed import setup
from utils.system.text import all_epochs, cell, counted, printable, printable_lines


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "=cmd|' /C calc'!A0"]
)
def test_what_a_spreadsheet_would_compute_becomes_text(text):
    assert cell(text) == f"'{text}"


@pytest.mark.parametrize("text", ["", "a=1", "dog", "'quoted", "1-2", "é", " =1"])
def test_other_cells_stay(text):
    assert cell(text) == text


def test_control_characters_are_escaped():
    assert printable("a\x1b[2J\n\x9b\x7fé") == "a\\x1b[2J\\x0a\\x9b\\x7fé"
    assert printable_lines("one\ntwo\r\x1b]0;x\x07") == "one\ntwo\\x0d\\x1b]0;x\\x07"


def test_half_a_surrogate_pair_is_shown():
    """As JSON can hold it; os.fsencode refuses it."""
    assert printable("a\ud800é") == "a\\ud800é"


def test_a_context_says_nothing_that_moves_the_cursor(capsys):
    setup("cpu").say("a\x1b[2J", "two\nlines")
    assert capsys.readouterr().out == "a\\x1b[2J\ntwo\nlines\n"


@pytest.mark.parametrize(
    ("number", "noun", "form", "text"),
    [
        (1, "image", ",", "1 image"),
        (0, "image", ",", "0 images"),
        (1200, "image", ",", "1,200 images"),
        (1000, "class", "", "1000 classes"),
        (1, "class", "", "1 class"),
    ],
)
def test_counted_nouns(number, noun, form, text):
    assert counted(number, noun, form) == text


def test_the_end_of_a_run_of_one_epoch():

    assert (all_epochs(1), all_epochs(2)) == ("the one epoch is", "all 2 epochs are")
