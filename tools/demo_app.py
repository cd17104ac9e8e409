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
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from models.eca_module import ECALayer
from models.inspection import attention_layers, recorded_gates
from models.weights import network_from_checkpoint
from predict import classify, map_stage
from utils.command_line.parser import Parser
from utils.config.flags import number, positive_int
from utils.data.decoding import read_image
from utils.inspection.channel_weights import GateStatistics
from utils.inspection.predictions import class_table, find_objects, picture, read_batches
from utils.runs.checkpoint import class_names, is_detector, load, preprocessing
from utils.system import backends, distributed
from utils.system.errors import EXIT_FAILED, EXIT_STOPPED, UserError, as_user_error, require
from utils.system.faults import is_out_of_memory, run_script
from utils.system.text import printable
from utils.training.classifier import network_line

TOPK, LEAST_SCORE = 5, 0.5
COLUMNS = ["class", "score", "box (x1, y1, x2, y2)"]


def main() -> int:
    parser = Parser(prog="python -m tools.demo_app", description=__doc__)
    parser.add_argument(
        "checkpoint", metavar="CKPT", help="of main.py, of detect_main.py, or released weights"
    )
    port = {"type": number(int, 1, 65535), "default": 7860, "metavar": "N"}
    parser.add_argument("--port", **port, help="of this machine (default: 7860)")
    parser.add_argument(
        "--names", metavar="FILE", help="class names, one a line (default: the checkpoint's)"
    )
    parser.add_argument(
        "--img-size", type=positive_int, metavar="S", help="pixels (default: the checkpoint's)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    args = parser.parse_args()
    require(("gradio",), "tools.demo_app", "-r requirements-demo.txt")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_STOPPED))  # the folder is removed then
    with tempfile.TemporaryDirectory(prefix="eca-demo-", ignore_cleanup_errors=True) as folder:
        # gradio reads these as it is imported: no uploaded file outlives the page.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
        about, show = open_checkpoint(args.checkpoint, args.names, args.img_size, args.device)
        print(about, flush=True)
        serve(args.checkpoint, about, show, args.port)
    return 0


def open_checkpoint(
    file: str, names: str | None = None, img_size: int | None = None, device: str = "auto"
) -> tuple[str, partial]:
    """Returns a line on a checkpoint's network, and what shows it at work.

    Args:
        names: file of class names, for a classifier; None for the checkpoint's.
        img_size: pixels, for a classifier; None for the checkpoint's.

    Returns:
        The line, and `show_classes` or `show_objects` of this network.

    Raises:
        UserError: no such file, or no network in it; or an argument that a detector does not use.
    """
    saved, where = load(file), distributed.setup(device).device
    with as_user_error(f"{file}: "):
        if is_detector(saved):
            from models.detection.detectors import FIRST_LABEL, detector_from_checkpoint

            if names is not None or img_size is not None:
                flag = "--names" if names is not None else "--img-size"
                raise UserError(f"{flag} is for classifiers, and {file} holds a detector")
            backends.configure(False, where, one_shape=False)
            detector = detector_from_checkpoint(saved).to(where).eval()
            first = FIRST_LABEL[detector.arch]
            classes, _ = class_table(saved, detector.num_classes - first)
            about = f"{detector.arch} on {detector.backbone_arch}, {len(classes)} classes"
            return about, partial(show_objects, detector, classes, first, where)
        backends.configure(False, where)
        network = network_from_checkpoint(saved).to(where).eval().requires_grad_(False)
    known = class_names(saved, network.num_classes, names)
    times = Counter(known)
    known = [f"{n} (class {i})" if times[n] > 1 else n for i, n in enumerate(known)]
    size = preprocessing(saved, img_size)
    stage = map_stage(network, size[0], None)
    about = f"{network_line(network)}; {size[0]} pixels, evidence by Grad-CAM on {stage}"
    return about, partial(show_classes, network, known, size, stage, where)


def show_classes(
    network: nn.Module,
    names: Sequence[str],
    size: tuple[int, float],
    stage: str,
    device: torch.device,
    path: str,
) -> list[Any]:
    """Returns what a classifier sees in the image of a file.

    Args:
        size: pixels and share of the image, see `eval_transform`.
        stage: the module whose output the map is made from.

    Returns:
        Confidences of the most likely classes, their evidence as a picture, and the channel weights
        as another one where the network has attention.

    Raises:
        UserError: the file is no image.
    """
    from utils.inspection import channel_weights, pictures

    batches = read_batches([path], *size, 1, device)
    topk = min(TOPK, len(names))
    with recorded_gates(network) as gates:
        ((_, prediction, heat),) = classify(network, batches, [_name(path)], names, topk, stage)
    if prediction.error is not None or heat is None:
        raise UserError(f"{prediction.file}: {prediction.error}")
    image = read_image(path, "pil")
    square = pictures.seen_square(*image.size, *size)
    shown = [{guess.name: guess.confidence for guess in prediction.guesses}]
    shown.append(pictures.draw_evidence(image, heat, square))
    if layers := attention_layers(network):
        statistics = GateStatistics(1)
        plain = {name: gate.detach() for name, gate in gates.items()}  # maps take gradients
        statistics.update(plain, torch.zeros(1, dtype=torch.int64))
        weights = [
            statistics.layer(
                found.name,
                found.stage,
                found.block,
                found.layer.conv.weight if isinstance(found.layer, ECALayer) else None,
            )
            for found in layers
        ]
        drawn = io.BytesIO(channel_weights.draw_one_image(weights))
        shown.append(Image.open(drawn).convert("RGB"))
    return shown


def show_objects(
    network: nn.Module,
    names: Sequence[str],
    first_label: int,
    device: torch.device,
    path: str,
    score: float = LEAST_SCORE,
) -> list[Any]:
    """Returns the objects that a detector sees in the image of a file, as a picture and as rows.

    Args:
        names: of the classes, without the background.
        first_label: the label of the first of them.
        score: what has less is not shown.

    Raises:
        UserError: the file is no image.
    """
    ((found),) = find_objects(network, [path], device, first_label)
    if found.error is not None:
        raise UserError(f"{_name(path)}: {found.error}")
    drawn = picture(found, names, score).permute(1, 2, 0).numpy()
    across, down = found.size[1] / found.image.shape[2], found.size[0] / found.image.shape[1]
    boxes = found.objects["boxes"] * torch.tensor([across, down, across, down])
    labels, scores = (found.objects[key].tolist() for key in ("labels", "scores"))
    rows = [
        [names[label], f"{sure:.2f}", ", ".join(f"{value:.0f}" for value in box)]
        for label, sure, box in zip(labels, scores, boxes.tolist(), strict=True)
        if sure >= score
    ]
    return [Image.fromarray(np.ascontiguousarray(drawn)), rows]


def answer(show: partial, path: str | None, *score: float) -> list[Any]:
    """Returns what the page shows of an uploaded file; a fault of the file is one line on it."""
    import gradio as gr

    if path is None:
        raise gr.Error("choose an image file first", print_exception=False)
    try:
        return show(path, *score)
    except UserError as error:
        fault = str(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        fault = f"{_name(path)}: out of memory; give a smaller image or --img-size"
    raise gr.Error(html.escape(printable(fault)), print_exception=False)


def serve(file: str, about: str, show: partial, port: int) -> None:
    """Serves the page to this machine alone, until Ctrl-C.

    Raises:
        UserError: the port is in use.
    """
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    # A label or buttons of gradio's would lie on the picture.
    plain = {"show_label": False, "buttons": [], "format": "png"}
    inputs: list[Any] = [gr.File(label="Image file", type="filepath")]
    outputs = [gr.Label(label="Classes"), gr.Image(alt_text="Evidence", **plain)]
    if show.func is show_objects:
        inputs.append(gr.Slider(0, 1, LEAST_SCORE, step=0.05, label="Least score shown"))
        outputs = [gr.Image(alt_text="Objects", **plain)]
        outputs.append(gr.Dataframe(headers=COLUMNS, label="Objects"))
    elif attention_layers(show.args[0]):
        outputs.append(gr.Image(alt_text="Channel weights s of each block", **plain))
    title = printable("/".join(Path(file).parts[-2:]))
    page = gr.Interface(
        partial(answer, show),
        inputs,
        outputs,
        title=html.escape(title),
        description=html.escape(about),
        flagging_mode="never",
        analytics_enabled=False,
        api_name="examine",
    )
    # A page of another machine that calls itself by a name of its own reaches nothing.
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    print(f"open http://127.0.0.1:{port} on this machine; Ctrl-C ends it", flush=True)
    try:
        page.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            ssr_mode=False,
            quiet=True,
            footer_links=[],
            run_history=False,
            max_file_size="100mb",
            theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            app_kwargs={"middleware": [hosts]},
        )
    except OSError as error:
        raise UserError(f"port {port}: {error}; choose another with --port", EXIT_FAILED) from None


def _name(path: str) -> str:
    return printable(Path(path).name)


if __name__ == "__main__":
    run_script(main)
