"""Shows what a checkpoint's network sees in an image, as a page for the browser of this machine.

examples:
  python -m tools.demo_app CKPT                  classes, where the evidence lies, channel weights
  python -m tools.demo_app DETECTOR --port 8000  boxes and masks

Only this machine can open the page, and nothing is sent or downloaded. Ctrl-C ends it.
"""

import io
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from models.eca_module import ECALayer
from models.inspection import attention_layers, recorded_gates
from models.weights import network_from_checkpoint
from predict import classify, map_stage
from utils.classification.report import network_line
from utils.data.decoding import read_image
from utils.data.user_images import read_batches
from utils.inspection import demo_page
from utils.inspection.channel_weights import GateStatistics
from utils.inspection.demo_page import Answer, Layout
from utils.inspection.object_predictions import Found, class_table, find_objects, picture
from utils.options.parser import Parser, number, positive_int, run_script
from utils.runs.checkpoint import load
from utils.runs.checkpoint_info import class_names, is_detector, preprocessing
from utils.system import backends, distributed
from utils.system.errors import UserError, as_user_error
from utils.system.fault_messages import is_out_of_memory
from utils.system.text import printable

TOPK = 5
LEAST_SCORE = 0.5


def build_parser() -> Parser:
    parser = Parser(prog="python -m tools.demo_app", description=__doc__)
    parser.add_argument(
        "checkpoint", metavar="CKPT", help="of main.py, of detect_main.py, or released weights"
    )
    parser.add_argument(
        "--port",
        type=number(int, 0, 65535),
        default=7860,
        metavar="N",
        help="of this machine; 0: any that is free (default: 7860)",
    )
    parser.add_argument(
        "--names", metavar="FILE", help="class names, one a line (default: the checkpoint's)"
    )
    parser.add_argument(
        "--img-size", type=positive_int, metavar="S", help="pixels (default: the checkpoint's)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    return parser


def main() -> int:
    args = build_parser().parse_args()
    with demo_page.prepared():
        shown = open_demo(args.checkpoint, args.names, args.img_size, args.device)
        taken = demo_page.listen(args.port)
        title = "/".join(Path(args.checkpoint).parts[-2:])
        page = demo_page.build(title, shown.about, shown.layout, shown.examine)
        print(*shown.about, sep="\n", flush=True)
        demo_page.serve(page, taken, say_where)
    return 0


def say_where(address: str) -> None:
    """Prints where the page is."""
    print(f"open {address} on this machine; Ctrl-C ends it", flush=True)


def open_demo(
    file: str, names: str | None = None, img_size: int | None = None, device: str = "auto"
) -> "ClassifierDemo | DetectorDemo":
    """Reads a checkpoint, and returns what shows its network at work.

    Args:
        file: the checkpoint.
        names: file of class names, for a classifier; None for the checkpoint's.
        img_size: pixels, for a classifier; None for the checkpoint's.

    Raises:
        UserError: no such file, or no network in it; or an argument that a detector does not use.
    """
    saved = load(file)
    where = distributed.setup(device).device
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
            return DetectorDemo(detector, classes, first, where)
        backends.configure(False, where)
        network = network_from_checkpoint(saved).to(where).eval().requires_grad_(False)
    known = class_names(saved, network.num_classes, names)
    size, crop_pct = preprocessing(saved, img_size)
    return ClassifierDemo(network, known, size, crop_pct, map_stage(network, size, None), where)


class ClassifierDemo:
    """Shows the most likely classes, where the evidence for the first lies, and channel weights.

    Args:
        network: of `models.create_model`, in eval mode, on `device`.
        names: of its classes.
        img_size, crop_pct: see `eval_transform`.
        stage: the module whose output the map is made from.
    """

    def __init__(
        self,
        network: nn.Module,
        names: Sequence[str],
        img_size: int,
        crop_pct: float,
        stage: str,
        device: torch.device,
    ):
        self.network, self.device, self.stage = network, device, stage
        self.size = (img_size, crop_pct)
        times = Counter(names)
        self.names = [f"{n} (class {i})" if times[n] > 1 else n for i, n in enumerate(names)]
        self.layers = attention_layers(network)
        self.layout = Layout(("Image", "Evidence for the first class"), min(TOPK, len(names)))
        if self.layers:
            titles = (*self.layout.titles, "Channel weights s of each block")
            self.layout = Layout(titles, self.layout.topk)
        self.about = (
            network_line(network),
            f"the middle {img_size} of {round(img_size / crop_pct)} pixels; "
            f"evidence by Grad-CAM on {stage}",
        )
        self.alone = threading.Lock()  # matplotlib and the recording of weights are no two threads'

    def examine(self, path: str, score: float = 0.0) -> Answer:
        """Returns what is shown for the image in a file. A score is a detector's matter."""
        with self.alone:
            return answered(path, self._answer)

    def _answer(self, path: str) -> Answer:
        from utils.inspection import channel_weight_plots, pictures  # slow to import

        batches = read_batches([path], *self.size, 1, self.device)
        with recorded_gates(self.network) as gates:
            ((_, found, heat),) = classify(
                self.network, batches, [shown_name(path)], self.names, self.layout.topk, self.stage
            )
        if found.error is not None or heat is None:
            return Answer(f"{found.file}: {found.error}", is_fault=True)
        image = read_image(path, "pil")
        square = pictures.seen_square(*image.size, *self.size)
        drawn = [pictures.shown_image(image)[0], pictures.draw_evidence(image, heat, square)]
        if self.layers:
            drawn.append(opened(channel_weight_plots.draw_one_image(self._weights(gates))))
        best = found.guesses[0]
        words = f"{found.file}: {best.name}, {100 * best.confidence:.1f} %"
        ranking = tuple((guess.name, guess.confidence) for guess in found.guesses)
        return Answer(words, ranking=ranking, pictures=tuple(drawn))

    def _weights(self, gates: dict[str, torch.Tensor]) -> list:
        """Returns the channel weights of every block for one image."""
        statistics = GateStatistics(1)
        plain = {name: gate.detach() for name, gate in gates.items()}  # maps take gradients
        statistics.update(plain, torch.zeros(1, dtype=torch.int64))
        return [
            statistics.layer(
                found.name,
                found.stage,
                found.block,
                found.layer.conv.weight if isinstance(found.layer, ECALayer) else None,
            )
            for found in self.layers
        ]


class DetectorDemo:
    """Shows boxes and masks.

    Args:
        network: of `models.detection.detectors`, in eval mode, on `device`.
        names: of its classes, without the background.
        first_label: the label of the first of them.
    """

    layout = Layout(
        ("Objects",),
        columns=("class", "score", "box (x1, y1, x2, y2)"),
        score=LEAST_SCORE,
    )

    def __init__(
        self, network: nn.Module, names: Sequence[str], first_label: int, device: torch.device
    ):
        self.network, self.names = network, names
        self.first_label, self.device = first_label, device
        self.about = (f"{network.arch} on {network.backbone_arch}, {len(names)} classes",)
        self.last: tuple[str, Found] | None = None
        self.alone = threading.Lock()

    def examine(self, path: str, score: float = LEAST_SCORE) -> Answer:
        """Returns what is shown for the image in a file: the objects with at least this score."""
        with self.alone:
            return answered(path, lambda file: self._answer(file, score))

    def _answer(self, path: str, score: float) -> Answer:
        if self.last is None or self.last[0] != path:  # the slider asks for the same image again
            ((found),) = find_objects(self.network, [path], self.device, self.first_label)
            self.last = path, found
        found, name = self.last[1], shown_name(path)
        if found.error is not None:
            return Answer(f"{name}: {found.error}", is_fault=True)
        image = Image.fromarray(
            np.ascontiguousarray(picture(found, self.names, score).permute(1, 2, 0).numpy())
        )
        across = found.size[1] / found.image.shape[2]
        down = found.size[0] / found.image.shape[1]
        rows = []
        for label, sure, box in zip(
            *(found.objects[key].tolist() for key in ("labels", "scores", "boxes")), strict=True
        ):
            if sure >= score:
                corners = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
                text = ", ".join(f"{value:.0f}" for value in corners)
                rows.append((self.names[label], f"{sure:.2f}", text))
        words = f"{name}: {len(rows)} object{'s' * (len(rows) != 1)} of score {score:g} or more"
        return Answer(words, pictures=(image,), rows=tuple(rows))


def answered(path: str, answer) -> Answer:
    """Returns what `answer` makes of a file, or one line where a fault of the file prevents it."""
    try:
        return answer(path)
    except UserError as error:
        return Answer(printable(str(error)), is_fault=True)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        words = "out of memory; give a smaller image or --img-size, or --device cpu"
        return Answer(f"{shown_name(path)}: {words}", is_fault=True)


def shown_name(path: str) -> str:
    """Returns the name of an uploaded file."""
    return printable(Path(path).name)


def opened(png: bytes) -> Image.Image:
    """Returns a PNG's picture."""
    return Image.open(io.BytesIO(png)).convert("RGB")


if __name__ == "__main__":
    run_script(main)
