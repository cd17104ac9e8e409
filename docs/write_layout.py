"""Writes the layout of the code into docs/ARCHITECTURE.md: each file, its docstring's first line.

python docs/write_layout.py
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "ARCHITECTURE.md"
FOLDERS = ("models", "utils", "assembly", "tools")
BEGIN, END = "<!-- layout: written by docs/write_layout.py -->", "<!-- end of layout -->"
MARGIN = 36  # columns for names


def summary(path: Path) -> str:
    """The first line of a file's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def row(depth: int, name: str, text: str) -> str:
    return f"{'  ' * depth + name:<{MARGIN}}{text}".rstrip()


def folder_rows(folder: Path, depth: int) -> list[str]:
    """A folder, its files, and the folders in it."""
    rows = [row(depth, f"{folder.name}/", summary(folder / "__init__.py"))]
    files = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
    rows += [row(depth + 1, path.name, summary(path)) for path in files]
    for inner in sorted(path.parent for path in folder.glob("*/__init__.py")):
        rows += folder_rows(inner, depth + 1)
    return rows


def layout() -> str:
    """The tree of the scripts and of `FOLDERS`, as text."""
    rows = [row(0, path.name, summary(path)) for path in sorted(ROOT.glob("*.py"))]
    for name in FOLDERS:
        rows += ["", *folder_rows(ROOT / name, 0)]
    return "\n".join(rows)


def with_layout(document: str) -> str:
    """`document` with the layout between its two marks."""
    before, rest = document.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n```text\n{layout()}\n```\n{END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(with_layout(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {DOCUMENT}")
