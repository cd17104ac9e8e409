"""Makes the page that shows what a network sees in an image, and serves it to this machine alone.

It needs gradio, and knows no network: what is shown comes from the function that it is given.
Nothing is fetched or sent: gradio's notices are off, the fonts are the browser's own, and the
browser is told to ask no other machine.
"""

import html
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image

from utils.system.errors import EXIT_FAILED, EXIT_STOPPED, UserError
from utils.system.optional_packages import require
from utils.system.text import printable

HERE = "127.0.0.1"
LARGEST = "100mb"  # of an image file
INSTALL = "-r requirements-demo.txt"
# Scripts and styles are gradio's own, which are written into its page. `self` is this machine.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "worker-src 'self' blob:; frame-ancestors 'none'"
)
FONTS = ("system-ui", "sans-serif")
STYLE = """
.gradio-container {
  width: 100% !important; max-width: 1120px !important; margin: 0 auto !important;
}
.caption { font-size: 0.9rem; opacity: 0.8; margin: 0; }
.answer { font-size: 1.05rem; overflow-wrap: anywhere; }
.answer.fault { color: #b42318; }
.dark .answer.fault { color: #ff9c92; }
"""


@dataclass(frozen=True)
class Answer:
    """Holds what is shown for an image. With a fault there is nothing else.

    Args:
        words: one line.
        is_fault: the image could not be read.
        ranking: the most likely classes with their confidences, best first.
        pictures: one for each of the page's `titles`.
        rows: of the table; see `Layout`.
    """

    words: str
    is_fault: bool = False
    ranking: tuple[tuple[str, float], ...] = ()
    pictures: tuple[Image.Image, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Layout:
    """Says what a kind of network has to show.

    Args:
        titles: of the pictures.
        topk: classes of a ranking; 0 for none.
        columns: of a table; empty for none.
        score: the first value of the slider for the least score; None for no slider.
    """

    titles: tuple[str, ...]
    topk: int = 0
    columns: tuple[str, ...] = ()
    score: float | None = None


Examine = Callable[[str, float], Answer]


@contextmanager
def prepared() -> Iterator[None]:
    """Switches off what would send or fetch something; removes uploaded files at the end.

    Make and serve the page in it, and import gradio nowhere before.

    Raises:
        UserError: gradio is missing; one line with the command that installs it.
    """
    require(("gradio",), "tools.demo_app", INSTALL)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    with tempfile.TemporaryDirectory(prefix="eca-demo-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        yield


def values(answer: Answer, layout: Layout) -> list[Any]:
    """Returns an answer as the page's parts take it, in their order; None empties a part."""
    kind = "answer fault" if answer.is_fault else "answer"
    shown: list[Any] = [f'<p class="{kind}" role="status">{html.escape(answer.words)}</p>']
    if layout.topk:
        shown.append(dict(answer.ranking) or None)
    shown += answer.pictures or [None] * len(layout.titles)
    if layout.columns:
        shown.append([list(row) for row in answer.rows])
    return shown


def build(title: str, about: Sequence[str], layout: Layout, examine: Examine) -> Any:
    """Returns the page.

    Args:
        title: its heading.
        about: lines on the network.
        examine: (path of an uploaded file, least score) → what is shown.
    """
    import gradio as gr

    start = Answer("Drop an image on the field, or click it to choose one.")

    def show(path: str | None, score: float = 0.0) -> list[Any]:
        return values(start if path is None else examine(path, score), layout)

    with gr.Blocks(title=printable(title), analytics_enabled=False) as page:
        lines = "".join(f"<br>{html.escape(line)}" for line in about)
        gr.HTML(f"<h1>{html.escape(printable(title))}</h1><p>{lines.removeprefix('<br>')}</p>")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                inputs = [gr.File(label="Image file", height=150, type="filepath")]
                if layout.score is not None:
                    inputs.append(
                        gr.Slider(0, 1, layout.score, step=0.05, label="Least score shown")
                    )
                parts = [gr.HTML(values(start, layout)[0])]
                if layout.topk:
                    parts.append(
                        gr.Label(
                            label="Most likely classes",
                            num_top_classes=layout.topk,
                            show_heading=False,
                        )
                    )
            with gr.Column(scale=5, min_width=300):
                parts += _pictures(layout.titles)
                if layout.columns:
                    parts.append(gr.Dataframe(headers=list(layout.columns), interactive=False))
        inputs[0].change(show, inputs, parts, api_name="examine")
        for slider in inputs[1:]:
            slider.release(show, inputs, parts, api_visibility="private")
    return page


def _pictures(titles: Sequence[str]) -> list[Any]:
    """Returns the fields for pictures: the first two beside each other, the others below."""
    import gradio as gr

    def field(title: str) -> Any:
        # A label of gradio's would lie on the picture.
        gr.HTML(f'<p class="caption">{html.escape(title)}</p>', padding=False)
        return gr.Image(
            label=title,
            show_label=False,
            alt_text=title,
            format="png",
            interactive=False,
            buttons=["fullscreen"],
        )

    if len(titles) < 2:
        return [field(title) for title in titles]
    fields = []
    with gr.Row():
        for title in titles[:2]:
            with gr.Column(min_width=240):
                fields.append(field(title))
    return fields + [field(title) for title in titles[2:]]


def listen(port: int) -> socket.socket:
    """Takes a port of this machine, which no other machine can reach; 0 takes any that is free.

    Raises:
        UserError: it is in use.
    """
    taken = socket.socket()
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((HERE, port))
        taken.listen()  # who comes early waits
    except OSError as error:
        taken.close()
        raise UserError(
            f"port {port}: {error.strerror}; choose another with --port, or 0 for any", EXIT_FAILED
        ) from None
    return taken


def serve(page: Any, taken: socket.socket, ready: Callable[[str], None]) -> None:
    """Serves the page until Ctrl-C or SIGTERM.

    Args:
        taken: from `listen`.
        ready: called with the page's address before the first answer.
    """
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(openapi_url=None)
    # A page of another machine that calls itself by a name of its own reaches nothing.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HERE, "localhost"])

    @app.middleware("http")
    async def closed(request: Any, answer: Any) -> Any:
        response = await answer(request)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    app = gr.mount_gradio_app(
        app,
        page,
        path="/",
        max_file_size=LARGEST,
        ssr_mode=False,
        footer_links=[],
        theme=gr.themes.Base(font=list(FONTS), font_mono=["ui-monospace", "monospace"]),
        css=STYLE,
    )
    # uvicorn ends in order, and then raises the signal again, which without this ends the process
    # before uploaded files are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_STOPPED))
    ready(f"http://{HERE}:{taken.getsockname()[1]}")
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[taken])
