"""Builds an HTML page that needs no other file: text, tables, pictures as data.

All text is escaped here, so a name that looks like HTML is shown as the text that it is. The page's
own policy forbids scripts and everything that is not in the file.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from utils.system.text import CONTROL

MARK = "<!-- written by python -m tools.run_report -->"  # what may be replaced by a newer page
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
LARGEST = 30_000_000  # bytes of a picture
STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --text: #1f2328; --soft: #59636e;
  --line: #d1d9e0; --card: #f6f8fa; --k0: #0072b2; --k1: #d55e00; --k2: #009e73; --k3: #cc79a7;
  --k4: #b77c00; --k5: #2b93cf; --k6: #5c4b8a; --k7: #000000; --k8: #6b7280; }
@media (prefers-color-scheme: dark) { :root { --ground: #0d1117; --text: #e6edf3; --soft: #9198a1;
  --line: #30363d; --card: #161b22; --k0: #4db2ec; --k1: #ff8f45; --k2: #2fc79b; --k3: #e6a3c8;
  --k4: #f0b429; --k5: #8fd0f5; --k6: #b3a2e8; --k7: #e6edf3; --k8: #9198a1; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; background: var(--ground);
  color: var(--text); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.25rem 0 .4rem; }
p { margin: .5rem 0; max-width: 48rem; overflow-wrap: anywhere; }
.soft { color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: .75rem 0 0; }
a { color: var(--k0); }
code { font: .875em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  overflow-wrap: anywhere; background: var(--card); padding: .1em .3em; border-radius: 4px; }
dl.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr));
  gap: .75rem; margin: 1.25rem 0 0; }
dl.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .6rem .75rem; }
dl.tiles dt { color: var(--soft); font-size: .8125rem; }
dl.tiles dd { margin: 0; font-size: 1.25rem; font-weight: 600; overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums; }
.charts, .columns { display: grid; gap: 1.25rem; align-items: start; }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.columns { grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); }
.chart { min-width: 0; }
.chart h3 { margin: 0; }
.chart svg { display: block; width: 100%; max-width: 30rem; height: auto; }
.keys { display: flex; flex-wrap: wrap; gap: 0 1rem; font-size: .8125rem; color: var(--soft); }
.key::before { content: ""; display: inline-block; width: .9rem; height: 3px; margin-right: .35rem;
  vertical-align: middle; background: var(--key); }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem 1rem .3rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; }
.n { text-align: right; }
.settings td + td { white-space: normal; overflow-wrap: anywhere; }
figure { margin: .75rem 0; }
figure img { display: block; max-width: 100%; height: auto; border-radius: 8px; background: #fff; }
@media (max-width: 50rem) { figure .wide { max-width: none; } }
figcaption { color: var(--soft); font-size: .875rem; max-width: 48rem; margin-top: .3rem; }
details { margin: .75rem 0; }
summary { cursor: pointer; }
@media print { body { max-width: none; } details > * { display: block; } }
"""


@dataclass(frozen=True)
class Section:
    """Holds a part of the page: its heading, an identifier for links, and its HTML."""

    title: str
    name: str
    body: str


def text(value: object) -> str:
    """Returns a value as text for HTML: escaped, without control characters."""
    shown = str(value).encode("utf-8", "backslashreplace").decode()
    return html.escape(CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", shown))


def cut(words: str, most: int = 40) -> str:
    """Returns a name, or its beginning where it is longer than `most`."""
    return words if len(words) <= most else f"{words[: most - 1]}…"


def paragraph(value: object, kind: str = "") -> str:
    """Returns a paragraph of text."""
    return f"<p{_class(kind)}>{text(value)}</p>"


def tiles(facts: Mapping[str, object]) -> str:
    """Returns the most important facts, large."""
    parts = [f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in facts.items()]
    return f'<dl class="tiles">{"".join(parts)}</dl>'


def table(titles: Sequence[str], rows: Sequence[Sequence[object]], words: int = 1) -> str:
    """Returns a table in a box that scrolls by itself where it is wider than the page.

    Args:
        words: so many of the first columns hold words, the others numbers.
    """

    def line(kind: str, cells: Sequence[object]) -> str:
        parts = (
            f"<{kind}{_class('n' if i >= words else '')}>{text(cell)}</{kind}>"
            for i, cell in enumerate(cells)
        )
        return f"<tr>{''.join(parts)}</tr>"

    body = "\n".join(line("td", row) for row in rows)
    head = f"<thead>{line('th', titles)}</thead>" if titles else ""
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def settings_table(values: Mapping[str, object]) -> str:
    """Returns a table of names and values; long values are shown whole, on several lines."""
    return f'<div class="settings">{table((), list(values.items()), words=2)}</div>'


def folded(title: str, body: str) -> str:
    """Returns what is shown when a reader asks for it."""
    return f"<details><summary>{text(title)}</summary>{body}</details>"


def picture(data: bytes, words: str, caption: str = "", wide: bool = False) -> str:
    """Returns a PNG as a part of the page; a note instead where `data` is none.

    Args:
        words: what the picture shows, for who cannot see it.
        wide: holds small text: a narrow screen scrolls it instead of shrinking it.
    """
    if not is_png(data):
        return paragraph(f"{words}: cannot be read as a PNG picture; left out", "soft")
    code = base64.b64encode(data).decode()
    shown = f'<img{_class("wide" if wide else "")} alt="{text(words)}" '
    shown += f'src="data:image/png;base64,{code}">'
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return f'<figure><div class="scroll">{shown}</div>{below}</figure>'


def is_png(data: bytes) -> bool:
    """Returns whether these are the bytes of a PNG that can be read, of a sensible size."""
    if len(data) > LARGEST:
        return False
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            image.load()
    except Exception:  # what a damaged file makes Pillow raise is open-ended
        return False
    return True


def page(title: str, head: str, sections: Sequence[Section]) -> bytes:
    """Returns the page as a file.

    Args:
        head: HTML below the title.
        sections: below it, with links to them at the top.
    """
    links = "".join(f'<a href="#{s.name}">{text(s.title)}</a>' for s in sections)
    parts = (
        f'<section id="{s.name}">\n<h2>{text(s.title)}</h2>\n{s.body}\n</section>' for s in sections
    )
    body = "\n".join(parts)
    return f"""<!DOCTYPE html>
{MARK}
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{text(title)}</h1>
{head}
<nav>{links}</nav>
</header>
<main>
{body}
</main>
</body>
</html>
""".encode()


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
