"""Reads the fenced blocks of a markdown file, and runs them as a reader would.

A block is Python (```python), commands (its first line matches `COMMAND`), or what the
block before it prints. What is printed must be what the document shows, but for numbers, and where
the document has an ellipsis.
"""

import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

COMMAND = re.compile(r"(\w+=\S* )*(python|torchrun|find|make|pip|git|tensorboard) ")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
NUMBER = re.compile(r"[+-]?\d[\d,.]*(?:e[+-]?\d+)?")


@dataclass
class Block:
    """One thing to run."""

    kind: str  # "python" or "commands"
    text: str
    line: int  # in the document
    shown: str | None = None  # what the document says that it prints


def blocks(document: str) -> list[Block]:
    found: list[Block] = []
    for match in FENCE.finditer(document):
        language, text = match.groups()
        line = document[: match.start()].count("\n") + 2
        if language == "python":
            found.append(Block("python", text, line))
        elif COMMAND.match(text):
            found.append(Block("commands", text, line))
        elif language in ("", "text") and found and found[-1].shown is None:
            found[-1].shown = text
    return found


def script_lines(document: str) -> list[list[str]]:
    """The words of each command in a document that runs Python or make, from the script on."""
    found = []
    for block in blocks(document):
        for line in command_lines(block.text if block.kind == "commands" else ""):
            words = [word for word in shlex.split(line) if not re.match(r"\w+=", word)]
            while words[0] in ("python", "torchrun") or words[0].startswith("--"):
                words.pop(0)
            found.append(words)
    return found


def command_lines(text: str) -> list[str]:
    """One command a line, without comments; a backslash at its end goes on with the next."""
    lines = (re.sub(r"\s+#.*", "", line) for line in text.replace("\\\n", " ").splitlines())
    return [line for line in lines if line.strip()]


def pattern(shown: str) -> re.Pattern:
    """What a run must print that the document shows as `shown`."""

    def of_line(line: str) -> str:
        parts = []
        for word in line.split():
            ends = [re.escape(part) for part in NUMBER.sub("\0", word).split("…")]
            parts.append(r"[^\n]*".join(ends).replace("\0", r"[+-]?\d[\d,.]*(?:e[+-]?\d+)?"))
        return r"[ ]*" + r"[ ]+".join(parts) + r"[ ]*\n"

    rest = r"(?:[^\n]*\n)*?"
    lines = shown.strip("\n").splitlines()
    return re.compile("".join(rest if line.strip() == "…" else of_line(line) for line in lines))


def run(block: Block, root: Path, names: dict, replaced: Mapping[str, str]) -> str:
    """Runs a block in the current folder and returns what it printed.

    Args:
        root: of the repository, where the scripts are.
        names: of the Python blocks of one document, from block to block.
        replaced: what to write instead of the document's words, to make it short; nothing instead
            of a whole command leaves it out.
    """
    text = block.text
    for old, new in replaced.items():
        text = text.replace(old, new)
    if block.kind == "python":
        with printed() as page:
            exec(compile("\n" * (block.line - 1) + text, "document", "exec"), names)
        return page()
    return "".join(run_command(line, root, block.shown or "") for line in command_lines(text))


def run_command(line: str, root: Path, shown: str) -> str:
    program, *arguments = shlex.split(line)
    if program != "python" or re.search(r"[|<>;&]", re.sub(r"'[^']*'", "", line)):
        own = shlex.quote(sys.executable)
        code = f"""
            python() {{ {own} "$@"; }}
            torchrun() {{ {own} -m torch.distributed.run "$@"; }}
            {line}"""
        bash = ["bash", "-eo", "pipefail", "-c", code]
        done = subprocess.run(bash, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        return done.stdout + done.stderr
    code = 0
    with printed() as page:
        try:
            run_python(arguments, root)
        except SystemExit as end:
            code = end.code or 0
    expected = 1 if "could not be read" in shown else 0
    assert code == expected, f"{line}\nended with {code}:\n{page()}"
    return page()


class Reached(BaseException):
    """Raised where `stop_at` stops a script."""


def stop_at(patch, *places: str) -> None:
    """Lets scripts stop where they would begin to work: at a call of one of `places`."""

    def stop(*_, **__):
        raise Reached

    for place in places:
        patch.setattr(place, stop)


def begins(arguments: list[str], root: Path) -> bool:
    """Whether a script's command gets as far as `stop_at`."""
    try:
        run_python(arguments, root)
    except Reached:
        return True
    except SystemExit:
        pass
    return False


def run_python(arguments: list[str], root: Path) -> None:
    """`python ARGUMENTS` in this process: a new one would take seconds to import torch."""
    before, loaded = sys.argv, dict(sys.modules)
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            sys.modules.pop(arguments[1], None)  # else runpy warns that it was imported before
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(str(root / arguments[0]), run_name="__main__")
    finally:
        sys.argv = before
        sys.modules.update(loaded)


@contextlib.contextmanager
def printed():
    """Catches standard output and error in the order they come; gives a function for the text."""
    page = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    with contextlib.redirect_stdout(page), contextlib.redirect_stderr(page):
        yield lambda: page.buffer.getvalue().decode()


def check(block: Block, output: str) -> None:
    """Raises AssertionError where `output` is not what the document shows."""
    if block.shown is not None and not pattern(block.shown).fullmatch(output):
        raise AssertionError(
            f"line {block.line} shows\n{block.shown}\nand prints\n{output}\nwhich differs in more "
            "than numbers"
        )


@contextlib.contextmanager
def within(folder: Path):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
