"""Says what is in a user's images, with the network and the preprocessing that a checkpoint holds.

examples:
  predict.py CKPT photo.jpg                     the five most likely classes
  predict.py CKPT photos/ --maps --grid         every image of a folder, with pictures
  predict.py CKPT 'photos/**/*.jpg' --format csv > out.csv
  find photos -newer last | predict.py CKPT -
  predict.py best.onnx photos/                  a file of export.py, run by its own engine
  predict.py DETECTOR photos/                   boxes and masks, drawn and as COCO's JSON
"""

import utils.system.script_start  # noqa: F401  # isort: skip - what follows takes seconds
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from models.inference import optimise_for_inference
from models.inspection import COARSEST, feature_maps, grad_cam
from utils.command_line.parser import refuse_for_exported
from utils.command_line.prediction_and_export import (
    prediction_parser,
    settle_prediction,
)
from utils.data.decoding import read_image
from utils.data.transforms import Preprocessing
from utils.inspection import predictions
from utils.inspection.exported_network import ExportedDetector, is_exported
from utils.inspection.exported_network import load as load_exported
from utils.inspection.predictions import Guess, Prediction, UserBatch
from utils.runs import folder as run_folder
from utils.runs.checkpoint import Checkpoint
from utils.system import backends, distributed, style
from utils.system.backends import DTYPES
from utils.system.errors import EXIT_FAILED, UserError, as_user_error
from utils.system.faults import run_script
from utils.system.files import check_free, write_atomically
from utils.system.processes import default_workers
from utils.system.text import counted, printable
from utils.training.classifier import network_line

FINE_ENOUGH = 4  # positions a side: with fewer, a map hardly tells where
MOST_IN_GRID = 400
MOST_LARGE = 100  # of those with captions in them
LONGEST_STEM = 200  # bytes; file systems take names of 255, with what marks a file half written
SMALLER = "a smaller -b or --img-size"  # what spares memory


def main() -> int:
    args = prediction_parser(__doc__).parse_args()
    check_free(args.output)
    paths = predictions.find_images(args.images)
    exported = is_exported(args.checkpoint)
    if exported:
        refuse_for_exported(vars(args), args.checkpoint)
        network = load_exported(args.checkpoint)
        saved = Checkpoint.of_fields(Path(args.checkpoint), network.metadata)
        args.device = "cpu"
    else:
        network, saved = None, Checkpoint.read(Path(args.checkpoint))
    args = Namespace(**settle_prediction(vars(args), saved.is_detector))
    if saved.is_detector:
        return predict_objects(args, saved, paths, network)
    if not exported:
        network = saved.network(args.attention)
    names = saved.class_names(network.num_classes, args.names)
    look = saved.preprocessing(args.img_size, args.crop_pct)
    with as_user_error("--maps: "):
        stage = map_stage(network, look.img_size, args.map_stage) if args.maps else None
    device = distributed.setup(args.device).device
    backends.configure(False, device)
    network.to(device).eval().requires_grad_(False)
    line = network.describe() if exported else network_line(network)
    say(f"{line}; the middle {look.img_size} of {look.resized} pixels")
    if args.fast:
        with as_user_error("--fast: "):
            network = optimise_for_inference(network, DTYPES.get(args.amp))
        say(f"  rebuilt for inference: BatchNorm folded, weights in {network.dtype}")

    folder = None
    if args.output or args.maps or args.grid:
        folder = run_folder.create("predict", args.output)
    workers = args.workers
    if workers is None:  # processes take longer to start than a few images take to read
        workers = 0 if len(paths) <= 2 * args.batch_size else default_workers()
    batches = predictions.read_batches(paths, look, args.batch_size, device, workers, args.decoder)
    files = [printable(path) for path in paths]
    log = predictions.PredictionLog(args.format, files, min(args.topk, len(names)))
    for i, prediction, heat in classify(network, batches, files, names, log.topk, stage):
        if prediction.error is not None:
            say(f"! {prediction.file}: {prediction.error}; passed over")
        if heat is not None:
            drawn = folder / "maps" / png_name(i, prediction.file)
            write_map(drawn, paths[i], prediction, heat, look, stage)
            prediction = replace(prediction, map=str(drawn))
        log.add(prediction)
    log.close()

    broken = sum(prediction.error is not None for prediction in log.predictions)
    if folder is not None:
        log.write(folder)
        if args.grid and broken < len(paths):
            write_grid(folder / "grid.png", paths, log.predictions, names, args.checkpoint)
    return finish(folder, broken, len(paths))


def predict_objects(
    args: Namespace, saved: Checkpoint, paths: Sequence[bytes], exported: ExportedDetector | None
) -> int:
    """Runs a detector over the images, and draws on each what was found in it."""
    from models.detection.detectors import FIRST_LABEL

    if exported is not None:
        network, first_label = exported, exported.first_label
    else:
        network = saved.detector().eval()
        first_label = FIRST_LABEL[network.arch]
    names, ids = predictions.class_table(saved, network.num_classes - first_label)
    device = distributed.setup(args.device).device
    backends.configure(False, device, one_shape=False)
    how = f", from {exported.path.name}, run by onnxruntime" if exported is not None else ""
    say(f"{network.arch} on {network.backbone_arch}, {counted(len(names), 'class')}{how}")
    folder = run_folder.create("predict", args.output)
    document, cells, broken = predictions.CocoDocument(names, ids), [], 0
    width = predictions.path_width([printable(path) for path in paths])
    network.to(device)
    for i, image in enumerate(predictions.find_objects(network, paths, device, first_label)):
        if image.error is not None:
            say(f"! {image.file}: {image.error}; passed over")
            broken += 1
            continue
        document.add(image)
        drawn = predictions.picture(image, names, args.min_score)
        target = folder / "pictures" / png_name(i, image.file)
        target.parent.mkdir(exist_ok=True)
        write_atomically(target, style.encoded(drawn))
        if args.grid and len(cells) < MOST_LARGE:
            sure = int((image.objects["scores"] >= args.min_score).sum())
            cells.append(style.Cell(drawn, Path(image.file).name, counted(sure, "object")))
        if args.format == "table":
            print(predictions.object_line(image, names, args.min_score, width), flush=True)
    if args.format != "table":
        print(document.json() if args.format == "json" else document.csv(), end="")
    document.write(folder)
    if cells:
        if len(cells) == MOST_LARGE:
            say(f"grid.png holds the first {MOST_LARGE} images")
        grid = style.draw_grid(cells, args.checkpoint, style.LARGE_CELL)
        write_atomically(folder / "grid.png", grid)
    return finish(folder, broken, len(paths))


def png_name(index: int, file: str) -> str:
    """Returns a name for the picture of the image `file`: its number and its shortened name."""
    stem = Path(file).stem.encode()[:LONGEST_STEM].decode(errors="ignore")
    return f"{index + 1:04}_{stem}.png"


def finish(folder: Path | None, broken: int, images: int) -> int:
    """Prints the closing lines, and returns the exit code."""
    if folder is not None:
        say(f"written to {folder}")
    if broken:
        say(f"{broken} of {counted(images, 'image')} could not be read")
    return EXIT_FAILED if broken else 0


def say(text: str) -> None:
    """Prints to standard error: standard output is for the predictions alone."""
    print(text, file=sys.stderr, flush=True)


def map_stage(network: nn.Module, img_size: int, number: int | None) -> str:
    """Returns the name of the module whose output the maps are made from."""
    stages = list(feature_maps(network))
    if number is not None:
        if number > len(stages):
            raise UserError(
                f"--map-stage {number}: {network.arch} has feature maps 1 to {len(stages)}"
            )
        return stages[number - 1]
    pixels, back = COARSEST, 1
    while img_size < FINE_ENOUGH * pixels and back < len(stages):
        pixels, back = pixels // 2, back + 1
    if back > 1:
        say(f"maps of {stages[-back]}: of {img_size} pixels {stages[-1]} keeps too few positions")
    return stages[-back]


def classify(
    network: nn.Module,
    batches: Iterable[UserBatch],
    files: Sequence[str],
    names: Sequence[str],
    topk: int,
    stage: str | None,
) -> Iterator[tuple[int, Prediction, np.ndarray | None]]:
    """Yields (index, prediction, map or None) of each image; `stage` is None without maps."""
    for batch in batches:
        results: dict[int, tuple[Prediction, np.ndarray | None]]
        results = {i: (Prediction(files[i], error=reason), None) for i, reason in batch.broken}
        heats = [None] * len(batch.indices)
        if batch.indices and stage is None:
            with torch.inference_mode():
                logits = network(batch.images)
        elif batch.indices:
            logits, maps = grad_cam(network, network.get_submodule(stage), batch.images)
            heats = maps.cpu().numpy()
        for row, i in enumerate(batch.indices):
            if not logits[row].isfinite().all():
                results[i] = Prediction(files[i], error="the network's output is not finite"), None
                continue
            confidences, classes = logits[row].float().softmax(0).topk(topk)
            pairs = zip(classes.tolist(), confidences.tolist(), strict=True)
            guesses = tuple(Guess(label, names[label], confidence) for label, confidence in pairs)
            results[i] = Prediction(files[i], guesses), heats[row]
        for i in sorted(results):
            yield i, *results[i]


def write_map(
    target: Path,
    path: bytes,
    prediction: Prediction,
    heat: np.ndarray,
    look: Preprocessing,
    stage: str,
) -> None:
    from utils.inspection import pictures  # matplotlib is slow to import

    image = read_image(path, "pil")
    square = pictures.seen_square(*image.size, look.img_size, look.crop_pct)
    ranking = [(guess.name, guess.confidence) for guess in prediction.guesses]
    where = f"{stage}, {heat.shape[0]} × {heat.shape[1]} positions"
    target.parent.mkdir(exist_ok=True)
    title = Path(prediction.file).name
    write_atomically(target, pictures.draw_map(image, heat, square, title, ranking, where))


def write_grid(
    target: Path,
    paths: Sequence[bytes],
    made: Sequence[Prediction],
    names: Sequence[str],
    title: str,
) -> None:
    """One picture of the readable images; in folders named like a class, right ones are green."""
    cells, checked, right = [], 0, 0
    for path, prediction in zip(paths, made, strict=True):
        if prediction.error is not None:
            continue
        if len(cells) == MOST_IN_GRID:
            say(f"grid.png holds the first {MOST_IN_GRID} images")
            break
        guess, file = prediction.guesses[0], Path(prediction.file)
        colour, note = style.PLAIN, file.name
        if file.parent.name in names:
            agrees = file.parent.name == guess.name
            checked, right = checked + 1, right + agrees
            colour = style.RIGHT if agrees else style.WRONG
            note = f"{file.parent.name}/{file.name}"
        image = read_image(path, "pil")
        note = f"{100 * guess.confidence:.0f} %  {note}"
        cells.append(style.Cell(image, guess.name, note, colour))
    if checked:
        title += f": {right} of {checked} as the folder says"
    write_atomically(target, style.draw_grid(cells, title))


if __name__ == "__main__":
    run_script(main, SMALLER)
