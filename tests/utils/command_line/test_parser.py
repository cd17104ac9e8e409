"""Flags, numbers and exits."""

import argparse

import pytest

from utils.command_line.parser import Parser
from utils.config.flags import crop, fraction, number, positive_float, positive_int, seconds


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (positive_int, {"1": 1, "256": 256}, ["0", "-1", "1.5", "x", "", "1e3"]),
        (positive_float, {"0.1": 0.1, "1e-4": 1e-4}, ["0", "-1", "nan", "inf", "x"]),
        (fraction, {"0": 0, "1": 1}, ["-0.1", "1.01", "nan"]),
        (number(float, 0, 1, above=True, below=True), {"0.5": 0.5}, ["0", "1"]),
        (positive_int, {"2147483647": 2**31 - 1}, ["2147483648"]),
        (number(int, 0, 2**63 - 1), {str(2**63 - 1): 2**63 - 1}, [str(2**63)]),
        (fraction, {"1e-12": 1e-12}, ["1e-13", "1e-320"]),
        (positive_float, {"1e38": 1e38}, ["1e-320", "1e39"]),
        (crop, {"0.05": 0.05, "1": 1}, ["1e-300", "0.04"]),
        (seconds, {"0": 0, "86400": 86400}, ["1e12", "-1"]),
    ],
)
def test_numbers_are_checked(kind, good, bad, capsys):
    parser = Parser(prog="x")
    parser.add_argument("--n", type=kind)
    for text, value in good.items():
        assert parser.parse_args([f"--n={text}"]).n == value
    for text in bad:
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args([f"--n={text}"])
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        assert repr(text) in said
        assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ({}, "a number between 0 and 1"),
        ({"above": True, "below": True}, "a number between 0 and 1, 0 and 1 excluded"),
    ],
)
def test_a_range_says_which_of_its_ends_is_not_in_it(ends, said):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        number(float, 0, 1, **ends)("1.5")
    assert str(caught.value) == f"'1.5' is not {said}"


def test_unknown_flags_get_the_nearest_one(capsys):
    parser = Parser(prog="x")
    parser.add_argument("--epochs", type=int)
    for word in ("--epoch", "--epoch=3", "--epocs"):
        with pytest.raises(SystemExit):
            parser.parse_args([word])
        assert "did you mean --epochs?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parser.parse_args(["--zzz"])
    assert "see x -h" in capsys.readouterr().err


def test_several_values_do_not_take_the_name_behind_them():
    parser = Parser()
    parser.add_argument("data", nargs="?")
    parser.add_argument("--steps", type=positive_int, nargs="+")
    parser.add_argument("--kinds", nargs="+", choices=("a", "b"))
    parser.add_argument("-e", action="store_true")
    for words in ("--steps 8 11 DATA -e", "DATA --steps 8 11 -e", "-e --steps 8 11 -- DATA"):
        found = parser.parse_args(words.split())
        assert (found.data, found.steps, found.e) == ("DATA", [8, 11], True)
    assert parser.parse_args(["--steps", "8", "--steps", "11", "DATA"]).steps == [11]
    found = parser.parse_args(["--kinds", "a", "b", "DATA", "--steps", "3"])
    assert (found.kinds, found.data, found.steps) == (["a", "b"], "DATA", [3])
    with pytest.raises(SystemExit):
        parser.parse_args(["--steps", "x", "DATA"])


def test_help_shows_what_matters_first_and_all_flags_when_asked(capsys):
    parser = Parser(prog="x", first=("data", "epochs"), description="examples: …")
    parser.add_argument("data", nargs="?")
    parser.add_argument("--epochs", type=int, help="how many")
    parser.add_argument("--rare", help="seldom needed")

    def shown(*words):
        with pytest.raises(SystemExit) as end:
            parser.parse_args([*words])
        assert end.value.code == 0
        return capsys.readouterr().out

    short, everything = shown("-h"), shown("--help", "all")
    assert "--epochs" in short
    assert "examples: …" in short
    assert "--rare" not in short
    assert short.splitlines()[-1] == "1 more flags: x -h all"
    assert "--rare" in everything
    assert "seldom needed" in everything
    assert "more flags" not in everything
