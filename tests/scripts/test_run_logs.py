"""metrics.csv and TensorBoard's events of a run: the same rows, whatever came in between."""

import csv
import resource
import signal

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.data.coco_eval import FIGURES
from utils.runs.writer import RunLogger
from utils.training import classification, detection
from utils.training.classification import FIGURES as METRICS

CLASSIFICATION = ("lr", *(f"{part}_{name}" for part in ("train", "val") for name in METRICS))
DETECTION = ("lr", "train_loss", *(f"box_{name}" for name in FIGURES))


def epochs_of(folder):
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    events = EventAccumulator(str(folder)).Reload()
    return [int(row["epoch"]) for row in rows], [e.step for e in events.Scalars("train/loss")]


@pytest.mark.parametrize("columns", [CLASSIFICATION, DETECTION])
def test_a_run_that_goes_on_elsewhere_brings_its_epochs(columns, tmp_path):
    """--resume with --output, or --start-epoch: the folder is new, and the run is not."""
    rows = [{"epoch": e, **dict.fromkeys(columns, e + 0.5)} for e in range(4)]
    for folder, first, last in (("one", 0, 2), ("one", 2, 3), ("two", 3, 4)):
        (tmp_path / folder).mkdir(exist_ok=True)
        log = RunLogger(tmp_path / folder, "title", first)
        for done in range(first, last):
            history = rows[: done + 1]
            is_detector = columns == DETECTION
            panels = detection.panels(history) if is_detector else classification.panels()
            log.log(history, panels, images_per_second=7.0)
    assert epochs_of(tmp_path / "one") == ([1, 2, 3], [1, 2, 3])
    assert epochs_of(tmp_path / "two") == ([1, 2, 3, 4], [1, 2, 3, 4])


def test_events_that_could_not_be_written_come_with_the_next_epoch(tmp_path, monkeypatch, capsys):
    """After part of a record was written, as on a disk that is full for a while."""
    rows = [{"epoch": e, **dict.fromkeys(CLASSIFICATION, e + 0.5)} for e in range(4)]
    log = RunLogger(tmp_path, "title")
    panels = classification.panels()
    log.log(rows[:1], panels, 7.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for part in (3, 300):
        size = log.events.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + part, limits[1]))
        log.log(rows[: 2 + (part > 3)], panels, 7.0)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert log.events.stat().st_size == size
    signal.signal(signal.SIGXFSZ, full)
    log.log(rows, panels, 7.0)
    assert epochs_of(tmp_path) == ([1, 2, 3, 4], [1, 2, 3, 4])
    assert capsys.readouterr().err.count("TensorBoard's events could not be written") == 1
