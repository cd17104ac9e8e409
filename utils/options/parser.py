"""Command-line manners shared by the scripts: checked numbers, did-you-mean, one-line errors."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Collection, Mapping

from utils.system.errors import EXIT_FAILED, EXIT_INTERRUPTED, UserError
from utils.system.processes import end_children
from utils.system.text import did_you_mean


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that answers an unknown flag with the nearest known one.

    Abbreviated flags are off: `--epoch` should be a question, not a guess.
    """

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [word for action in self._actions for word in action.option_strings]
            word = next((u for u in unknown if u.startswith("-")), unknown[0])
            hint = did_you_mean(word.split("=")[0], flags)
            self.error(f"unknown argument {word}{hint or f' (see {self.prog} -h)'}")
        return parsed

    def given(self, values: Mapping[str, object]) -> set[str]:
        """Names of the flags whose parsed values are not the defaults; "no_NAME" where one is off
        that is on by default."""
        changed = {name: v for name, v in values.items() if v != self.get_default(name)}
        return {
            f"no_{name}" if value is False and self.get_default(name) is True else name
            for name, value in changed.items()
        }

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(
    kind: type,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
) -> Callable[[str], float]:
    """An argparse type: a finite `kind` (int or float) in [low, high].

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
    """Ends a start with flags that would do nothing.

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
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names that a terminal cannot show
    try:
        code = main() or 0
    except UserError as error:
        rank = os.environ.get("RANK")  # several processes may each have a line to say
        print(f"error{f' (rank {rank})' if rank else ''}: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:  # `… | head` closed our output: not worth a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_FAILED
    except SystemExit as error:  # argparse, or a fault that others answer for
        code = error.code
    except BaseException:  # our own fault: shown with its traceback
        end_children()
        raise
    if not end_children():
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else EXIT_FAILED)
    sys.exit(code)
