"""Reads a user's images, and says what a classifier or a detector sees in them."""

import glob
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from utils.data import coco_masks
from utils.data.coco_eval import MASK_THRESHOLD, to_results
from utils.data.decoding import (
    DECODERS,
    EXTENSIONS,
    BrokenImageError,
    Stored,
    read_image,
    to_tensor,
)
from utils.data.image_folder import files_below
from utils.data.loader import device_batches, leave_broken_connections_unsaid
from utils.data.transforms import Preprocessing
from utils.inspection.drawing import as_image, draw, resized
from utils.inspection.exported_network import ExportedDetector
from utils.runs.checkpoint import Checkpoint
from utils.system.errors import UserError
from utils.system.faults import is_out_of_memory
from utils.system.files import write_atomically
from utils.system.text import cell, csv_text, printable


@dataclass(frozen=True)
class UserBatch:
    """Holds some of the images, and for the others why they could not be read."""

    images: Tensor  # (n, 3, S, S) float32, normalised; n can be 0
    indices: list[int]  # (n,) where in the list of paths each image is from
    broken: list[tuple[int, str]]  # index and reason of those that cannot be read


def find_images(names: Sequence[str]) -> list[bytes]:
    """Returns the paths that `names` stand for, each once, in their order.

    Args:
        names: files; folders, which stand for all images below them, sorted; glob patterns (`**`
            crosses folders); or "-" for one path a line on standard input, there or not.

    Raises:
        UserError: a name that stands for nothing.
    """
    paths: dict[bytes, None] = {}
    for name in names:
        nothing = f"{printable(name)}: no such file, folder or pattern that matches a file"
        if name == "-":
            lines = (line.rstrip(b"\r\n") for line in sys.stdin.buffer)
            here = [line for line in lines if line]  # one that is gone is told when it is read
            nothing = "no path came in on standard input"
        elif os.path.isdir(name):
            here = sorted(path for path, ending in files_below(name) if ending in EXTENSIONS)
            nothing = f"{printable(name)}: no image below this folder ({' '.join(EXTENSIONS)})"
        elif os.path.exists(name):  # before patterns: names may hold brackets
            here = [os.fsencode(name)]
        else:
            matches = sorted(glob.glob(name, recursive=True))
            here = [os.fsencode(path) for path in matches if os.path.isfile(path)]
        if not here:
            raise UserError(nothing)
        paths.update(dict.fromkeys(here))
    return list(paths)


Item = tuple[int, Tensor | str] | UserError  # index and image, or why there is none


class _Paths(Dataset[Item]):
    def __init__(self, paths: Sequence[bytes | Stored], look: Preprocessing, decoder: str):
        self.paths, self.transform, self.decoder = paths, look, decoder

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Item:
        try:
            image = self.transform(read_image(self.paths[index], self.decoder))
        except BrokenImageError as error:
            return index, error.reason
        except UserError as error:  # raised in a worker it would arrive as a traceback
            return error
        return index, image if isinstance(image, Tensor) else to_tensor(image)


def read_batches(
    paths: Sequence[bytes | Stored],
    look: Preprocessing,
    batch_size: int,
    device: torch.device,
    workers: int = 0,
    decoder: str = DECODERS[0],
) -> Iterator[UserBatch]:
    """Yields the images at `paths` in order, prepared as for evaluation, on `device`.

    Args:
        workers: loader processes; 0 reads in this one.
    """
    loader = DataLoader(
        _Paths(paths, look, decoder),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=partial(_collate, img_size=look.img_size),
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_interrupts_to_the_main_process,
    )
    for batch in device_batches(loader, device, look=look):
        broken: list[Any] = list(batch.broken)
        yield UserBatch(batch.images, batch.targets.tolist(), broken)


def _collate(items: list[Item], img_size: int) -> Any:
    images, indices, broken = [], [], []
    for item in items:
        if isinstance(item, UserError):
            return item
        index, image = item
        if isinstance(image, str):
            broken.append((index, image))
        else:
            images.append(image.permute(1, 2, 0))
            indices.append(index)
    pixels = torch.stack(images) if images else torch.empty(0, img_size, img_size, 3).byte()
    return pixels.permute(0, 3, 1, 2), torch.tensor(indices, dtype=torch.int64), broken


def _leave_interrupts_to_the_main_process(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    leave_broken_connections_unsaid()


FORMATS = ("table", "csv", "json")
WIDEST_PATH = 48  # characters of the table's first column; a longer path pushes its row aside


@dataclass(frozen=True)
class Guess:
    """Holds one class, and how sure the network is of it."""

    index: int
    name: str
    confidence: float  # softmax, 0 to 1


@dataclass(frozen=True)
class Prediction:
    """Holds the most likely classes of one image, best first, or why there are none."""

    file: str
    guesses: tuple[Guess, ...] = ()
    error: str | None = None
    map: str | None = None  # the picture of the class-activation map

    def as_dict(self) -> dict[str, Any]:
        """Returns the prediction as plain values for JSON."""
        if self.error is not None:
            return {"file": self.file, "error": self.error}
        drawn = {"map": self.map} if self.map else {}
        return {"file": self.file, "guesses": [vars(guess) for guess in self.guesses], **drawn}


class PredictionLog:
    """Shows predictions on standard output as they come, and collects them for files.

    Args:
        form: one of `FORMATS`; JSON, being one list, is shown by `close`.
    """

    def __init__(self, form: str, files: Sequence[str], topk: int):
        self.form, self.topk = form, topk
        self.width = path_width(files)
        self.predictions: list[Prediction] = []
        if form == "csv":
            print(csv_text([self._titles()]), end="")

    def add(self, prediction: Prediction) -> None:
        self.predictions.append(prediction)
        if self.form == "csv":
            print(csv_text([self._cells(prediction)]), end="", flush=True)
        elif self.form == "table" and prediction.error is None:
            shares = [f"{printable(g.name)} {100 * g.confidence:.1f} %" for g in prediction.guesses]
            print(f"{prediction.file:<{self.width}}  {'   '.join(shares)}", flush=True)

    def close(self) -> None:
        if self.form == "json":
            print(self._json(), end="")

    def write(self, folder: Path) -> None:
        """Writes predictions.csv and predictions.json to `folder`."""
        rows = [self._titles(), *map(self._cells, self.predictions)]
        write_atomically(folder / "predictions.csv", csv_text(rows).encode())
        write_atomically(folder / "predictions.json", self._json().encode())

    def _titles(self) -> list[str]:
        ranks = range(1, self.topk + 1)
        return ["file", *(t for i in ranks for t in (f"class_{i}", f"confidence_{i}")), "error"]

    def _cells(self, prediction: Prediction) -> list[str]:
        cells = [c for g in prediction.guesses for c in (cell(g.name), f"{g.confidence:.6f}")]
        empty = [""] * (2 * self.topk - len(cells))
        return [cell(prediction.file), *cells, *empty, cell(prediction.error or "")]

    def _json(self) -> str:
        entries = [prediction.as_dict() for prediction in self.predictions]
        return json.dumps(entries, indent=2, ensure_ascii=False) + "\n"


def path_width(files: Sequence[str]) -> int:
    """Returns the characters of the table's first column."""
    return min(WIDEST_PATH, max(map(len, files), default=0))


SMALLEST = 320  # pixels of a drawn picture's longer side


NO_PIXELS = torch.empty(3, 0, 0, dtype=torch.uint8)


@dataclass(frozen=True)
class ImageObjects:
    """Holds the objects in one image, highest score first, or in `error` why there are none."""

    file: str
    size: tuple[int, int] = (0, 0)  # height and width of the image file
    # (3, H, W) uint8, smaller than the file where that is larger than the network's input
    image: Tensor = NO_PIXELS
    # boxes (n, 4) as x1, y1, x2, y2 in the pixels of `image`, scores (n,), labels (n,) as indices
    # of class names, and with a mask network masks (n, 1, H, W) from 0 to 1
    objects: dict[str, Tensor] = field(default_factory=dict)
    error: str | None = None

    def boxes_in_file(self) -> Tensor:
        """Returns the boxes (n, 4) in the file's pixels."""
        across, down = self.size[1] / self.image.shape[2], self.size[0] / self.image.shape[1]
        return self.objects["boxes"] * torch.tensor([across, down, across, down])


@torch.inference_mode()
def find_objects(
    detector: Any, paths: Sequence[bytes], device: torch.device, first_label: int
) -> Iterator[ImageObjects]:
    """Runs the detector on one image after the other, as it is evaluated: unpadded.

    An image larger than the detector's input is first reduced to it: a hundred masks in the size of
    a 12-megapixel photograph would take 5 GB.

    Args:
        detector: a module: list of (3, H, W) in 0…1 → a dict of boxes, labels, scores (and masks)
            each.
    """
    exported = isinstance(detector, ExportedDetector)
    most = detector.max_size if exported else detector.transform.max_size
    for path in paths:
        file = printable(path)
        try:
            image = read_image(path)
        except BrokenImageError as error:
            yield ImageObjects(file, error=error.reason)
            continue
        assert isinstance(image, Tensor)
        size = image.shape[1], image.shape[2]
        image, _ = resized(image, {"boxes": torch.empty(0, 4)}, 0, most)
        try:
            (objects,) = detector([image.to(device).float() / 255])
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            yield ImageObjects(file, error="out of memory")
            continue
        objects = {name: value.cpu() for name, value in objects.items()}
        objects["labels"] = objects["labels"] - first_label
        if all(objects[name].isfinite().all() for name in ("boxes", "scores")):
            yield ImageObjects(file, size, image, objects)
        else:
            yield ImageObjects(file, error="the network's output is not finite")


def object_line(image: ImageObjects, names: Sequence[str], least_score: float, width: int) -> str:
    """Returns one line: the path, and the objects with at least this score."""
    labels, scores = (image.objects[name].tolist() for name in ("labels", "scores"))
    objects = [
        f"{names[label]} {score:.2f}"
        for label, score in zip(labels, scores, strict=True)
        if score >= least_score
    ]
    return f"{image.file:<{width}}  {'   '.join(objects) or '-'}"


def picture(image: ImageObjects, names: Sequence[str], least_score: float) -> Image.Image:
    """Returns the image with its objects drawn on it, at a size at which captions can be read."""
    pixels, objects = resized(image.image, image.objects, SMALLEST)
    return as_image(draw(pixels, objects, names, least_score))


class CocoDocument:
    """Collects images, detections and categories as COCO annotates a data set, with scores.

    Args:
        names: of the classes; `category_ids` are theirs in the training data.
    """

    def __init__(self, names: Sequence[str], category_ids: Sequence[int]):
        self.names, self.category_ids = names, category_ids
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add(self, image: ImageObjects) -> None:
        height, width = image.size
        entry = {"id": len(self.images) + 1, "file_name": image.file}
        self.images.append({**entry, "width": width, "height": height})
        plain = {**image.objects, "boxes": image.boxes_in_file()}
        masks = plain.pop("masks", None)
        results = to_results(plain, len(self.images), self.category_ids, first_label=0)
        for i, result in enumerate(results):
            area = result["bbox"][2] * result["bbox"][3]
            if masks is not None:  # one by one, for they can be large
                mask = F.interpolate(masks[i : i + 1], image.size, mode="bilinear")[0]
                (result["segmentation"],) = coco_masks.encode((mask > MASK_THRESHOLD).numpy())
                area = coco_masks.area(result["segmentation"])
            extra = {"id": len(self.annotations) + 1, "area": area, "iscrowd": 0}
            self.annotations.append(result | extra)

    def json(self) -> str:
        named = zip(self.category_ids, self.names, strict=True)
        categories = [{"id": i, "name": name} for i, name in named]
        parts = {"images": self.images, "annotations": self.annotations, "categories": categories}
        return json.dumps(parts, ensure_ascii=False) + "\n"

    def csv(self) -> str:
        """Returns one line a detection: file, class, score, and the box's corners in pixels."""
        rows = [["file", "class", "score", "x1", "y1", "x2", "y2"]]
        name_of = dict(zip(self.category_ids, self.names, strict=True))
        for result in self.annotations:
            x, y, width, height = result["bbox"]
            corners = [f"{v:.2f}" for v in (x, y, x + width, y + height)]
            file = self.images[result["image_id"] - 1]["file_name"]
            names = [cell(file), cell(name_of[result["category_id"]])]
            rows.append([*names, f"{result['score']:.6f}", *corners])
        return csv_text(rows)

    def write(self, folder: Path) -> None:
        """Writes detections.json and detections.csv to `folder`."""
        write_atomically(folder / "detections.json", self.json().encode())
        write_atomically(folder / "detections.csv", self.csv().encode())


def class_table(saved: Checkpoint, classes: int) -> tuple[list[str], list[int]]:
    """Returns names and category ids of a detector's checkpoint.

    Raises:
        UserError: it does not name each of its classes.
    """
    names = [printable(name) for name in saved.classes or ()]
    ids = list(saved.category_ids or range(1, len(names) + 1))
    if not len(names) == len(ids) == classes:
        raise UserError(
            f"the checkpoint names {len(names)} of its detector's {classes} classes; give one that "
            "detect_main.py wrote"
        )
    return names, ids
