"""Parses command lines: flags as they are declared, did-you-mean, faults in one line."""

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from utils.config.flags import GROUPS, BaseRecipe, Flag, flags_of
from utils.system.errors import UserError
from utils.system.text import did_you_mean, printable

AnyRecipe = TypeVar("AnyRecipe", bound=BaseRecipe)
GONE_FLAGS = {"--bce": "use --loss bce"}


class Parser(argparse.ArgumentParser):
    """Answers an unknown flag with the nearest known one; otherwise an ArgumentParser.

    Abbreviated flags are off: `--epoch` should be a question, not a guess.

    Args:
        first: names of the flags that `-h` shows; the others are shown by `-h all`. Empty: `-h`
            shows all of them.
    """

    def __init__(self, first: Collection[str] = (), **kwargs: Any):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
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

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        parsed, unknown = self.parse_known_args(self._values_last(words), namespace)
        if unknown:
            flags = [word for action in self._actions for word in action.option_strings]
            word = next((u for u in unknown if u.startswith("-")), unknown[0])
            hint = did_you_mean(word.split("=")[0], flags)
            files = [w for w in (word, getattr(parsed, "data", None)) if w and Path(w).is_file()]
            if files and not word.startswith("-"):
                hint = f"; a checkpoint goes behind a flag: --resume {files[0]}"
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
                kind: Any = action.type
                single = argparse.Action([], "", type=kind, choices=action.choices)
                rest, last = words, words[:0]
                while flag in rest:
                    start = rest.index(flag)
                    end = start + 1
                    while end < len(rest) and _is_taken(single, rest[end]):
                        end += 1
                    if end == start + 1:  # argparse says what is wrong
                        return words
                    rest, last = [*rest[:start], *rest[end:]], [*last, *rest[start:end]]
                words = [*rest, *last]
        return words

    def typed(self, words: Sequence[str] | None = None) -> dict[str, Any]:
        """Returns what is typed, by field: a flag that is left out is not in it.

        For a parser of `parser_of`, whose flags have no defaults.
        """
        return dict(vars(self.parse_args(words)))

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


class _Help(argparse.Action):
    """Prints the flags that matter most, or with the word `all` every one."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any):
        super().__init__(option_strings, dest, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        print(parser.format_help() if values == "all" else parser.short_help(), end="")
        parser.exit()


def _is_taken(action: argparse.Action, word: str) -> bool:
    """Returns whether a word is a value that the flag takes; any text may be one."""
    kind: Any = action.type
    if kind is None:
        return action.choices is not None and word in action.choices
    try:
        kind(word)
    except (argparse.ArgumentTypeError, ValueError):
        return False
    return True


def parser_of(
    parts: Sequence[type], defaults: object, description: str, epilog: str | None = None
) -> Parser:
    """Returns the parser of the flags that the fields of frozen values declare.

    Args:
        parts: the frozen values' classes.
        defaults: an instance of one of them, whose values are shown as defaults in the help.
    """
    flags = flags_of(*parts)
    first = [name for name, flag in flags.items() if flag.first]
    parser = Parser(first=first, description=description, epilog=epilog)
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    fixed = {item.name: item.default for part in parts for item in fields(part)}
    for name, flag in flags.items():
        flag.add_to(groups[flag.group], name, getattr(defaults, name, fixed[name]))
    for name in GONE_FLAGS:
        parser.add_argument(
            name, nargs="?", action=_Gone, default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    return parser


class _Gone(argparse.Action):
    """Answers a flag that is gone with what to use."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        parser.error(f"{option} is gone: {GONE_FLAGS[option]}")


def without_effect(
    typed: Mapping[str, Any], values: Mapping[str, Any], flags: Mapping[str, Flag]
) -> None:
    """Refuses typed flags that would do nothing in this start, by what they declare.

    Args:
        typed: the fields that were typed.
        values: all fields with their values in this start.
        flags: of all fields.

    Raises:
        UserError: names the flags, and why they do nothing.
    """
    idle = [name for name in typed if flags[name].trains and values["evaluate"]]
    where = "with -e, which does not train"
    for name in typed if not idle else ():
        for other, working in (flags[name].needs or {}).items():
            if values[other] not in working and not idle:
                idle, where = [name], f"with {flags[other].typed(values[other])}"
                if isinstance(values[other], bool):
                    where = f"with{'' if values[other] else 'out'} {flags[other].names[0]}"
    if idle:
        words = ", ".join(
            flags[name].typed(typed[name]) if isinstance(typed[name], bool) else flags[name].name
            for name in sorted(idle)
        )
        it, does = ("them", "do") if len(idle) > 1 else ("it", "does")
        raise UserError(f"{words} {does} nothing {where}: leave {it} out")


def take_saved(
    values: Mapping[str, Any], flags: Mapping[str, Flag], source: object
) -> dict[str, Any]:
    """Returns those of a file's values that a run may carry, checked as flags are.

    Args:
        values: what the file holds, by the names of fields.
        flags: of the fields that it may set.
        source: the file, for messages.

    Raises:
        UserError: a value that the flag itself would refuse; names file, field and value.
    """
    taken = {
        name: [value] if flags[name].nargs and isinstance(value, int | float) else value
        for name, value in values.items()
        if name in flags
    }
    for name, value in taken.items():
        if value is not None and not flags[name].takes(value):
            raise UserError(
                f"{printable(source)}: the saved {name.replace('_', '-')} "
                f"{printable(repr(value))[:60]} is not what {flags[name].name} takes; give a "
                "checkpoint as the scripts write it"
            )
    return taken


def saved_flags(
    values: Mapping[str, Any], flags: Mapping[str, Flag], source: object
) -> dict[str, Any]:
    """Returns the flags that a run carries, see `take_saved`.

    Not the number of workers: it is saved for the record, but a matter of the machine.
    """
    taken = {name: flag for name, flag in flags.items() if flag.saved and name != "workers"}
    checked = take_saved(values, taken, source)
    return {name: value for name, value in checked.items() if value is not None}


def saved_recipe(kind: type[AnyRecipe], values: Mapping[str, Any], source: object) -> AnyRecipe:
    """Returns the recipe that a checkpoint holds, each field checked as its flag is.

    Raises:
        UserError: a field is missing or is not what its flag takes; names file and field.
    """
    checked = take_saved(values, flags_of(kind), source)
    needed = {f.name for f in fields(kind) if f.default is f.default_factory is MISSING}
    if lacking := needed - checked.keys() | {name for name, v in checked.items() if v is None}:
        raise UserError(
            f"{source}: the saved recipe lacks {min(lacking)}; give a checkpoint as the scripts "
            "write it"
        )
    others = {f.name for f in fields(kind)} - checked.keys()  # no flags: checked by the recipe
    try:
        return kind.from_dict({**checked, **{k: values[k] for k in others if k in values}})
    except ValueError as error:
        raise UserError(f"{source}: {error}; give a checkpoint as the scripts write it") from None


OF_ENGINES = {  # flag: its value without effect, and why an exported network takes no other
    "fast": (False, "an exported network is rebuilt already"),
    "compile": (False, "an exported network has an engine of its own"),
    "amp": ("off", "an exported network has a precision of its own"),
    "channels_last": (False, "an exported network has a layout of its own"),
    "fused": (True, "an exported network has no blocks to take apart"),
    "attention": (None, "an exported network has its layers in it"),
    "maps": (False, "maps are made from gradients, which an exported network has none of"),
}


def refuse_for_exported(typed: Mapping[str, Any], file: str) -> None:
    """Refuses flags that a file of export.py has no use for.

    Args:
        typed: {flag: value}, None or absent where it is left out.
        file: as the command line named it.

    Raises:
        UserError: one line with the flag.
    """
    for name, (usual, reason) in OF_ENGINES.items():
        if (value := typed.get(name)) not in (None, usual):
            flag = f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
            raise UserError(f"{flag}: {reason}; leave it out, or give the checkpoint")
    for name, idle in (("gpu", (None,)), ("device", ("auto", "cpu", None))):
        if (value := typed.get(name)) not in idle:
            raise UserError(
                f"--{name} {value}: {file} is run on the CPU; leave it out, or give the checkpoint"
            )
