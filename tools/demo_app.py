"""Shows what a checkpoint's network sees in an image, as a page for the browser of this machine.

examples:
  python -m tools.demo_app CKPT                  classes, where the evidence lies, channel weights
  python -m tools.demo_app DETECTOR --port 8000  boxes and masks

Only this machine can open the page, and nothing is sent or downloaded. Ctrl-C ends it.
"""

import html
import io
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from models.inspection import attention_layers, recorded_gates
from predict import classify, map_stage
from utils.command_line.parser import Parser
from utils.config.flags import number
from utils.data.decoding import read_image
from utils.inspection.channel_weights import GateStatistics, draw_one_image
from utils.inspection.predictions import class_table, find_objects, picture, read_batches
from utils.runs.checkpoint import Checkpoint
from utils.system import backends, distributed
from utils.system.errors import EXIT_FAILED, EXIT_STOPPED, UserError, require
from utils.system.faults import run_script
from utils.system.text import printable
from utils.training.classifier import network_line

TOPK, LEAST_SCORE = 5, 0.5
Show = Callable[..., list[Any]]  # the path of an image, and for detectors a score → what is shown


# fmt: off
def build_parser() -> Parser:
    parser = Parser(prog="python -m tools.demo_app", description=__doc__)
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="of main.py, of detect_main.py, or released weights")
    add("--port", type=number(int, 1, 65535), default=7860, metavar="N",
        help="of this machine (default: 7860)")
    add("--names", metavar="FILE", help="class names, one a line (default: the checkpoint's)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    return parser
# fmt: on


def main() -> int:
    args = build_parser().parse_args()
    require(("gradio",), "tools.demo_app", "-r requirements-demo.txt")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_STOPPED))  # the folder is removed then
    with tempfile.TemporaryDirectory(prefix="eca-demo-", ignore_cleanup_errors=True) as folder:
        # gradio reads these as it is imported: no uploaded file outlives the page.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
        about, show, detects = open_checkpoint(args.checkpoint, args.names, args.device)
        serve(args.checkpoint, about, show, detects, args.port)
    return 0


def open_checkpoint(
    file: str, names: str | None = None, device: str = "auto"
) -> tuple[str, Show, bool]:
    """Returns a line on a checkpoint's network, what shows it at work, and whether it detects.

    For a classifier `show(path)` returns the confidences of the most likely classes, the evidence
    as a picture and, where the network has attention, the channel weights as another one; for a
    detector `show(path, score)` the picture with its objects, and one row an object.
    """
    saved, where = Checkpoint.read(Path(file)), distributed.setup(device).device
    if saved.is_detector:
        from models.detection.detectors import FIRST_LABEL

        if names is not None:
            raise UserError(f"--names is for classifiers, and {file} holds a detector")
        backends.configure(False, where, one_shape=False)
        detector = saved.detector().to(where).eval()
        first = FIRST_LABEL[detector.arch]
        classes, _ = class_table(saved, detector.num_classes - first)
        about = f"{detector.arch} on {detector.backbone_arch}, {len(classes)} classes"
        return about, partial(_show_objects, detector, classes, first, where), True
    backends.configure(False, where)
    network = saved.network().to(where).eval().requires_grad_(False)
    known = saved.class_names(network.num_classes, names)
    times = Counter(known)
    known = [f"{n} (class {i})" if times[n] > 1 else n for i, n in enumerate(known)]
    look = saved.preprocessing()
    stage = map_stage(network, look.img_size, None)
    about = f"{network_line(network)}; {look.img_size} pixels, evidence by Grad-CAM on {stage}"
    return about, partial(_show_classes, network, known, look, stage, where), False


def _show_classes(network, names, look, stage, device, path: str) -> list[Any]:
    from utils.inspection import pictures

    batches = read_batches([path], look, 1, device)
    file, topk = printable(Path(path).name), min(TOPK, len(names))
    with recorded_gates(network) as gates:
        ((_, prediction, heat),) = classify(network, batches, [file], names, topk, stage)
    if prediction.error is not None:
        raise UserError(f"{file}: {prediction.error}")
    image = read_image(path, "pil")
    square = pictures.seen_square(*image.size, look.img_size, look.crop_pct)
    shown: list[Any] = [{guess.name: guess.confidence for guess in prediction.guesses}]
    shown.append(pictures.draw_evidence(image, heat, square))
    if layers := attention_layers(network):
        statistics = GateStatistics(1)
        plain = {name: gate.detach() for name, gate in gates.items()}  # maps take gradients
        statistics.update(plain, torch.zeros(1, dtype=torch.int64))
        drawn = io.BytesIO(draw_one_image([statistics.layer(layer) for layer in layers]))
        shown.append(Image.open(drawn).convert("RGB"))
    return shown


def _show_objects(
    network, names, first_label, device, path: str, score: float = LEAST_SCORE
) -> list[Any]:
    (image,) = find_objects(network, [path], device, first_label)
    if image.error is not None:
        raise UserError(f"{printable(Path(path).name)}: {image.error}")
    labels, scores = (image.objects[key].tolist() for key in ("labels", "scores"))
    rows = [
        [names[label], f"{sure:.2f}", ", ".join(f"{value:.0f}" for value in box)]
        for label, sure, box in zip(labels, scores, image.boxes_in_file().tolist(), strict=True)
        if sure >= score
    ]
    return [picture(image, names, score), rows]


def serve(file: str, about: str, show: Show, detects: bool, port: int) -> None:
    """Serves the page to this machine alone, until Ctrl-C."""
    import gradio as gr

    def answer(path: str | None, *score: float) -> list[Any]:
        if path is None:
            raise gr.Error("choose an image file first", print_exception=False)
        try:
            return show(path, *score)
        except UserError as error:  # gradio shows the text as HTML
            raise gr.Error(html.escape(printable(error)), print_exception=False) from None

    inputs: list[Any] = [gr.File(label="Image file", type="filepath")]
    plain = {"show_label": False, "format": "png"}  # a label would lie on the picture
    outputs: list[Any] = [gr.Label(label="Classes"), gr.Image(**plain)]
    if detects:
        inputs.append(gr.Slider(0, 1, LEAST_SCORE, step=0.05, label="Least score shown"))
        columns = ["class", "score", "box (x1, y1, x2, y2)"]
        outputs = [gr.Image(**plain), gr.Dataframe(headers=columns, label="Objects")]
    elif attention_layers(show.args[0]):
        outputs.append(gr.Image(**plain))
    texts = {"title": printable("/".join(Path(file).parts[-2:])), "description": about}
    texts = {name: html.escape(text) for name, text in texts.items()}
    page = gr.Interface(answer, inputs, outputs, flagging_mode="never", **texts)
    print(f"{about}\nopen http://127.0.0.1:{port} on this machine; Ctrl-C ends it", flush=True)
    try:
        page.launch(server_name="127.0.0.1", server_port=port, share=False, quiet=True)
    except OSError as error:
        raise UserError(f"port {port}: {error}; choose another with --port", EXIT_FAILED) from None


if __name__ == "__main__":
    run_script(main)
