"""metrics.csv and TensorBoard's events of a run: the same rows, whatever came in between."""

import csv

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.classification.outcome import CLASSIFICATION, COLUMNS
from utils.detection.coco_evaluation import FIGURES
from utils.detection.outcome import DETECTION
from utils.runs.metrics_log import RunLogger

OF_DETECTION = ("lr", "train_loss", *(f"box_{name}" for name in FIGURES))
OUTCOMES = {"classification": (CLASSIFICATION, COLUMNS[1:]), "detection": (DETECTION, OF_DETECTION)}


def epochs_of(folder):
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    events = EventAccumulator(str(folder)).Reload()
    return [int(row["epoch"]) for row in rows], [e.step for e in events.Scalars("train/loss")]


@pytest.mark.parametrize("kind", OUTCOMES)
def test_a_run_that_goes_on_elsewhere_brings_its_epochs(kind, tmp_path):
    """--resume with --output, or --start-epoch: the folder is new, and the run is not."""
    outcome, columns = OUTCOMES[kind]
    rows = [{"epoch": e, **dict.fromkeys(columns, e + 0.5)} for e in range(4)]
    for folder, first, last in (("one", 0, 2), ("one", 2, 3), ("two", 3, 4)):
        log = RunLogger(tmp_path / folder, outcome, "title", first)
        for done in range(first, last):
            log.log(rows[: done + 1], images_per_second=7.0)
        log.close()
    assert epochs_of(tmp_path / "one") == ([1, 2, 3], [1, 2, 3])
    assert epochs_of(tmp_path / "two") == ([1, 2, 3, 4], [1, 2, 3, 4])
