"""Every flag of the training scripts, as it is declared, shown, typed and read from a file."""

import json
import re
from dataclasses import MISSING, fields

import pytest

import detect_main
import light_main
import main
from utils.command_line.classification import make_parser
from utils.command_line.parser import GONE_FLAGS, Parser, parser_of
from utils.config import classification, detection
from utils.config.flags import SWITCH, YES_NO, flags_of

SCRIPTS = {
    "main.py": (classification.Config.parts(), main.RECIPE),
    "light_main.py": (classification.Config.parts(), light_main.RECIPE),
    "detect_main.py": (detection.DetectionConfig.parts(), detect_main.RECIPE),
}
FLAGS = [
    pytest.param(script, name, id=f"{script.removesuffix('.py')}-{name}")
    for script, (parts, _) in SCRIPTS.items()
    for name in flags_of(*parts)
]
TEXTS = (
    "bicubic",
    *("", "x", "auto", "none", "off", "nan", "inf", "-inf", "True", "None", "1_0", "0x10", "1e3"),
    *("0", "1", "2", "5", "-1", "255", "2147483647", "2147483648", "9223372036854775808"),
    *("0.0", "0.05", "0.5", "0.875", "1.0", "1.5", "-0.1", "1e-12", "1e-13", "1e38", "1e39", "1e6"),
    *("eca_resnet50", "eca_mobilenetv2", "vgg16", "mask_rcnn", "frozen", "bf16", "fp32", "sgd"),
    *("lamb", "cosine", "exp", "linear", "balanced", "bce", "backbone", "stages:2", "stages:"),
    *("trivial", "rand", "rand-m7-mstd0.5-inc1", "rand-m99", "a1", "A1", "r.json", "pil", "turbo"),
    *("simplejpeg", "3557", "last.pth", "cuda:1", "ü", " 3", "3 "),
)


def parser_for(script: str) -> Parser:
    parts, recipe = SCRIPTS[script]
    return make_parser(recipe, "") if script != "detect_main.py" else parser_of(parts, recipe, "")


def declared(script: str, name: str):
    """The flag, and its value where nothing is typed: the script's recipe's, or the field's."""
    parts, recipe = SCRIPTS[script]
    (item,) = [item for part in parts for item in fields(part) if item.name == name]
    return flags_of(*parts)[name], getattr(recipe, name, item.default)


@pytest.fixture(scope="module")
def helps() -> dict[str, list[str]]:
    """The entries of `-h all`, by script: a flag with its words, in one line."""
    texts = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "10000")
        for script in SCRIPTS:
            text = parser_for(script).format_help()
            entries = re.split(r"\n  (?=\S)", text)
            texts[script] = [" ".join(entry.split("\n\n")[0].split()) for entry in entries[1:]]
    return texts


@pytest.mark.parametrize(("script", "name"), FLAGS)
def test_each_flag_is_in_the_help_once_with_its_default(helps, script, name):
    """The default as the help shows it, typed, is the field's."""
    flag, default = declared(script, name)
    shown = flag.metavar if flag.name == name else flag.name
    own = [entry for entry in helps[script] if re.match(rf"(\S+, |\S+ \S+, )*{shown}[ ,]", entry)]
    assert len(own) == 1, own
    assert all(spelling in own[0] for spelling in flag.names if spelling != name)
    assert flag.help in own[0]
    assert own[0].count("(default: ") <= 1
    assert default is not MISSING
    if default is None:
        assert own[0].endswith(flag.help)
        return
    (text,) = re.findall(r" \(default: ([^()]*)\)$", own[0])
    if flag.kind in (SWITCH, YES_NO):
        assert text == {True: "yes", False: "no"}[default]
        return
    value = parser_for(script).typed([flag.name, *text.split()])[name]
    assert value == (list(default) if isinstance(default, tuple) else default)
    assert flag.takes(json.loads(json.dumps(default)))


def test_what_is_not_declared_is_not_in_the_help(helps):
    for script, (parts, _) in SCRIPTS.items():
        assert len(helps[script]) == len(flags_of(*parts)) + 1  # --help
        assert not GONE_FLAGS.keys() & set(" ".join(helps[script]).split())


def accepted(parser: Parser, words: list[str], capsys):
    """What the parser makes of the words, or None where it refuses them in one line."""
    try:
        return parser.typed(words)
    except SystemExit:
        line = capsys.readouterr().err
        assert line.startswith(f"{parser.prog}: error: ")
        assert len(line.splitlines()) == 1
        return None


def as_a_file_may_hold(text: str):
    """The text itself, and the numbers that it may stand for."""
    values = [text]
    for kind in (int, float):
        try:
            values.append(kind(text))
        except ValueError:
            continue
    return values


@pytest.mark.parametrize(("script", "name"), FLAGS)
def test_a_flag_takes_from_a_file_what_the_parser_takes(script, name, capsys):
    parser, (flag, _) = parser_for(script), declared(script, name)
    if flag.kind in (SWITCH, YES_NO):
        assert accepted(parser, [flag.name], capsys) == {name: True}
        assert (accepted(parser, [f"--no-{flag.name[2:]}"], capsys) == {name: False}) == (
            flag.kind == YES_NO
        )
        assert accepted(parser, [f"{flag.name}=yes"], capsys) is None
        assert flag.takes(True)
        assert flag.takes(False)
        assert not any(map(flag.takes, (None, 0, 1, "yes", "", [True], {})))
        return
    several = flag.nargs == "+"
    taken = 0
    texts = (*TEXTS, *(flag.choices or ()))
    for text in texts:
        words = ["--", text] if flag.name == name else [f"{flag.name}={text}"]
        found = accepted(parser, words, capsys)
        if found is not None:
            taken += 1
            assert flag.takes(json.loads(json.dumps(found[name]))), text
        else:
            values = [[value] if several else value for value in as_a_file_may_hold(text)]
            assert not any(map(flag.takes, values)), text
    assert 0 < taken <= len(texts)
    assert not any(map(flag.takes, (None, True, False, {}, [], [None], "\0", [[1]], b"1")))
    if several:
        assert flag.takes([1, 1])
        assert not flag.takes([1, "x"])
        assert not flag.takes(1)
    else:
        assert not flag.takes(["x"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_flag_needs_is_another_flag_with_values_that_it_takes(script):
    flags = flags_of(*SCRIPTS[script][0])
    for flag in flags.values():
        for other, values in (flag.needs or {}).items():
            assert values
            assert all(map(flags[other].takes, values))
