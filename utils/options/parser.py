"""Parses command lines for all scripts: checked numbers, did-you-mean, one-line errors."""

import argparse
import ast
import contextlib
import math
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.system import interrupts, streams
from utils.system.cpu_share import fit_threads
from utils.system.errors import EXIT_FAILED, EXIT_INTERRUPTED, UserError, of_system
from utils.system.processes import end_children
from utils.system.text import did_you_mean, printable


class Parser(argparse.ArgumentParser):
    """Answers an unknown flag with the nearest known one; otherwise an ArgumentParser.

    Abbreviated flags are off: `--epoch` should be a question, not a guess.

    Args:
        first: names of the flags that `-h` shows; the others are shown by `-h all`. Empty: `-h`
            shows all of them.
    """

    def __init__(self, first: Collection[str] = (), **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        if kwargs.get("description") is None:
            kwargs["description"] = _text_of_script()
        super().__init__(allow_abbrev=False, add_help=not first, **kwargs)
        self.first = first
        if first:
            self.usage = "%(prog)s [FLAG …] [DATA]"
            self.add_argument(
                "-h",
                "--help",
                nargs="?",
                action=_Help,
                metavar="all",
                help="show these flags and exit; -h all: every flag",
            )

    def short_help(self) -> str:
        """Returns the help with the flags of `first` alone."""
        others = [a for a in self._actions if a.dest not in self.first and a.dest != "help"]
        words = [action.help for action in others]
        for action in others:
            action.help = argparse.SUPPRESS
        try:
            text = self.format_help()
        finally:
            for action, help_ in zip(others, words, strict=True):
                action.help = help_
        return f"{text}\n{len(others)} more flags: {self.prog} -h all\n"

    def parse_args(self, args=None, namespace=None):
        words = list(sys.argv[1:] if args is None else args)
        parsed, unknown = self.parse_known_args(self._values_last(words), namespace)
        if unknown:
            flags = [word for action in self._actions for word in action.option_strings]
            word = next((u for u in unknown if u.startswith("-")), unknown[0])
            hint = did_you_mean(word.split("=")[0], flags)
            self.error(f"unknown argument {word}{hint or f' (see {self.prog} -h)'}")
        return parsed

    def _values_last(self, words: list[str]) -> list[str]:
        """Moves flags with several values to the end: a name behind these is none of them.

        argparse itself would take `DATA` of `--lr-steps 8 11 DATA` for a third step.
        """
        if "--" in words:
            return words
        for action in (action for action in self._actions if action.nargs == "+"):
            for flag in set(action.option_strings).intersection(words):
                start = words.index(flag)
                single = argparse.Action([], "", type=action.type, choices=action.choices)
                end = start + 1
                while end < len(words) and _is_taken(single, words[end]):
                    end += 1
                if end > start + 1:
                    words = [*words[:start], *words[end:], *words[start:end]]
        return words

    def given(self, values: Mapping[str, object]) -> set[str]:
        """Returns names of the flags whose parsed values are not the defaults; "no_NAME" where a
        flag that is on by default is off.
        """
        changed = {name: v for name, v in values.items() if v != self.get_default(name)}
        return {
            f"no_{name}" if value is False and self.get_default(name) is True else name
            for name, value in changed.items()
        }

    def take_saved(
        self, values: Mapping[str, object], one_start: Collection[str], source: str
    ) -> dict[str, object]:
        """Returns those of a file's values that a run may carry, checked as flags are.

        Args:
            values: names of flags, or of a recipe's fields, and what the file holds for them.
            one_start: names that no file may set.
            source: the file, for messages.

        Raises:
            UserError: a value that the flag itself would refuse; names file, field and value.
        """
        known = {action.dest: action for action in self._actions if action.dest != "help"}
        taken = {k: v for k, v in values.items() if k in known and k not in one_start}
        for name, value in taken.items():
            if value is not None and not _fits(known[name], value):
                raise UserError(
                    f"{printable(source)}: the saved {name.replace('_', '-')} "
                    f"{printable(repr(value))[:60]} is not what --{name.replace('_', '-')} takes; "
                    "give a checkpoint as the scripts write it"
                )
        return taken

    def takes(self, name: str, value: object) -> bool:
        """Returns whether a value that a file holds is one that the flag of this name gives."""
        return _fits({action.dest: action for action in self._actions}[name], value)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def _text_of_script() -> str | None:
    """Returns the docstring in the file of the running script, which `python -OO` takes away."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    if file is None:
        return None
    try:
        return ast.get_docstring(ast.parse(Path(file).read_text(encoding="utf-8")), clean=False)
    except (OSError, ValueError, SyntaxError):  # a compiled file
        return None


class _Help(argparse.Action):
    """Prints the flags that matter most, or with the word `all` every one."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any):
        super().__init__(option_strings, dest, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        print(parser.format_help() if values == "all" else parser.short_help(), end="")
        parser.exit()


def _is_taken(action: argparse.Action, word: str) -> bool:
    """Returns whether a word is a value that the flag takes; any text may be one."""
    if action.type is None:
        return action.choices is not None and word in action.choices
    try:
        action.type(word)
    except (argparse.ArgumentTypeError, ValueError):
        return False
    return True


def _fits(action: argparse.Action, value: object) -> bool:
    """Returns whether a saved value is one that the flag would have given."""
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return isinstance(value, bool)
    if action.nargs == "+":
        single = argparse.Action([], "", type=action.type, choices=action.choices)
        return isinstance(value, list | tuple) and all(_fits(single, part) for part in value)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    if action.choices is not None and value not in action.choices:
        return False
    if action.type is None:
        return isinstance(value, str)
    try:
        return action.type(str(value)) == value
    except (argparse.ArgumentTypeError, ValueError):
        return False


def number(
    kind: type,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
) -> Callable[[str], float]:
    """Returns an argparse type: a finite `kind` (int or float) in [low, high].

    `above` and `below` leave out the lower and the upper end.
    """
    if math.isinf(high):
        wanted = f"{'above' if above else 'at least'} {low:g}"
    else:
        ends = [f"{low:g}", str(high) if kind is int else f"{high:g}"]
        left_out = [end for end, is_out in zip(ends, (above, below), strict=True) if is_out]
        wanted = f"between {' and '.join(ends)}"
        if left_out:
            wanted += f", {' and '.join(left_out)} excluded"
    noun = "a whole number" if kind is int else "a number"

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        low_ok = value > low if above else value >= low
        high_ok = value < high if below else value <= high
        if not (abs(value) < math.inf and low_ok and high_ok):
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun} {wanted}")
        return value

    return parse


positive_int = number(int, 1)
count = number(int, 0)
positive_float = number(float, 0, above=True)
non_negative_float = number(float, 0)
fraction = number(float, 0, 1)


def refuse_idle(given: set[str], idle: Collection[str], where: str) -> None:
    """Refuses flags that would do nothing in this start.

    Args:
        given, idle: names of flags, as `Parser.given` has them.
        where: they are idle, such as "with -e".

    Raises:
        UserError: names the flags that are both.
    """
    if found := sorted(given.intersection(idle)):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in found)
        it, does = ("them", "do") if len(found) > 1 else ("it", "does")
        raise UserError(f"{flags} {does} nothing {where}: leave {it} out")


def run_script(main: Callable[[], int | None]) -> None:
    """Calls `main` and exits with its code; a UserError becomes one line on stderr.

    No process that `main` started outlives this one.
    """
    with streams.guarded(), interrupts.interruptible():
        fit_threads()
        code = _exit_code(main)
        with contextlib.suppress(UserError, BrokenPipeError):  # the code says that already
            sys.stdout.flush()
        if not end_children() or interrupts.came():  # a late Ctrl-C would meet no handler
            os._exit(code if isinstance(code, int) else EXIT_FAILED)
    sys.exit(code)


def _exit_code(main: Callable[[], int | None]) -> int | str | None:
    """Calls `main`, and says in one line what it raised; returns the exit code."""
    try:
        try:
            code: int | str | None = main() or 0
        except SystemExit as error:  # argparse, or a fault that others answer for
            code = error.code
        sys.stdout.flush()  # a full disk shows here at the latest
        return code
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or interrupts.came():
            interrupts.say()  # whatever a library made of it
            return EXIT_INTERRUPTED
        if isinstance(error, BrokenPipeError):  # `… | head` closed our output: not worth a line
            return EXIT_FAILED
        if isinstance(error, OSError):
            error = of_system(error) or error
        if isinstance(error, UserError):
            rank = os.environ.get("RANK")  # several processes may each have a line to say
            where = f" (rank {rank})" if rank else ""
            print(f"error{where}: {printable(str(error))}", file=sys.stderr)
            return error.exit_code
        end_children()
        raise error  # our own fault: shown with its traceback
