"""Every flag that changes training changes a run of the script: none is lost on its way there.

What it changes is tested with the formula, where the formula is.
"""

import pytest
from helpers.coco_trees import NETWORK, annotation
from helpers.coco_trees import write_tree as write_coco
from helpers.kill_driver import same
from helpers.trees import write_tree

from utils.command_line import classification
from utils.config.classification import Config
from utils.config.detection import DetectionConfig
from utils.config.flags import flags_of
from utils.runs import checkpoint
from utils.runs.writer import RunFiles

pytestmark = pytest.mark.usefixtures("thin")

SMALL = ("-a", "eca_resnet18", "--img-size", 32, "-b", 4, "--lr", 0.01, "-j", 0, "--seed", 1)
DECAYS = ("--epochs", 2, "--lr-step", 1)
EFFECTS = {  # field: the flags with it, and those without it beside SMALL
    "arch": (("-a", "resnet18"), ()),
    "epochs": (("--epochs", 2), ()),
    "batch_size": (("-b", 6), ()),
    "lr": (("--lr", 0.02), ()),
    "momentum": (("--momentum", 0.5), ()),
    "weight_decay": (("--wd", 0.1), ()),
    "schedule": (("--schedule", "cosine"), ()),
    "lr_step": (DECAYS, ("--epochs", 2)),
    "lr_decay": ((*DECAYS, "--lr-decay", 0.5), DECAYS),
    "warmup_epochs": (("--warmup-epochs", 1), ()),
    "img_size": (("--img-size", 48), ()),
    "crop_pct": (("--crop-pct", 0.5), ()),
    "interpolation": (("--interpolation", "bicubic"), ()),
    "mean": (("--mean", 0.5), ()),
    "std": (("--std", 0.5), ()),
    "min_scale": (("--min-scale", 0.9), ()),
    "hflip": (("--hflip", 1), ()),
    "vflip": (("--vflip", 0.5), ()),
    "colour": (("--colour", 0.5), ()),
    "label_smoothing": (("--label-smoothing", 0.1), ()),
    "mixup": (("--mixup", 0.5), ()),
    "cutmix": (("--cutmix", 1), ()),
    "auto_augment": (("--auto-augment", "trivial"), ()),
    "random_erasing": (("--random-erasing", 1), ()),
    "ema": (("--ema", 0.9), ()),
    "norm_decay": (("--no-norm-decay",), ()),
    "repeats": (("--repeats", 2), ()),
    "train_size": (("--train-size", 48), ()),
    "accumulate": (("--accumulate", 2), ()),
    "clip_grad": (("--clip-grad", 0.01), ()),
    "sampler": (("--sampler", "balanced"), ()),
    "loss": (("--loss", "bce"), ()),
    "bce_threshold": (
        ("--loss", "bce", "--mixup", 0.5, "--bce-threshold", 0.3),
        ("--loss", "bce", "--mixup", 0.5),
    ),
    "drop_path": (("--drop-path", 0.5), ()),
    "optimizer": (("--optimizer", "adamw"), ()),
    "layer_decay": (("--layer-decay", 0.5), ()),
    "freeze": (("--freeze", "stages:1"), ()),
    "seed": (("--seed", 2), ()),
    "class_weights": (("--class-weights", "w.json"), ()),
}
ELSEWHERE = {  # field: why a run of this size shows nothing, and the test that does
    "early_stop": "test_ways_to_train.py::test_training_ends_without_a_better_top_1",
    "sync_bn": "GPUs alone; test_named_recipes.py::test_bad_values_are_answered_in_one_line",
    "check_val": "reads alone; test_check_val.py",
    "skip_bad_images": "test_faults.py::test_broken_images",
    "identity_start": "test_identity_start.py",
    "grad_checkpointing": "no bit; test_ways_to_train.py",
    "save_every": "test_classification.py::test_a_checkpoint_inside_the_epoch_is_of_the_step",
    "save_minutes": "test_writer.py::test_minutes_between_two_checkpoints",
    "val_split": "for a DATA without val/; test_own_images.py",
    "eval_every": "test_ways_to_train.py::test_some_epochs_are_evaluated",
    "best_by": "test_ways_to_train.py::test_some_epochs_are_evaluated_and_another",
    "log": "sends what is recorded; test_trackers.py",
    "start_epoch": "test_faults_resume.py::test_going_back_leaves_what_followed",
}
SMALL_DETECTOR = (*NETWORK, "--batch-size", 2, "--warmup-steps", 2, "--seed", 1, "--lr", 0.01)
OF_DETECTORS = {
    "arch": (("-a", "faster_rcnn"), ()),
    "backbone": (("-b", "resnet18"), ()),
    "epochs": (("--epochs", 2), ()),
    "batch_size": (("--batch-size", 3), ()),
    "optimizer": (("--optimizer", "adamw"), ()),
    "lr": (("--lr", 0.02), ()),
    "momentum": (("--momentum", 0.5), ()),
    "weight_decay": (("--wd", 0.1), ()),
    "lr_steps": (("--epochs", 2, "--lr-steps", 1), ("--epochs", 2)),
    "lr_decay": (
        ("--epochs", 2, "--lr-steps", 1, "--lr-decay", 0.5),
        ("--epochs", 2, "--lr-steps", 1),
    ),
    "warmup_steps": (("--warmup-steps", 1), ()),
    "clip": (("--clip", 0.01), ()),
    "min_size": (("--min-size", 32), ()),
    "max_size": (("--max-size", 72), ()),
    "hflip": (("--hflip", 1), ("--hflip", 0)),
    "drop_empty": (("--drop-empty",), ()),
    "seed": (("--seed", 2), ()),
}
OF_DETECTORS_ELSEWHERE = {
    name: ELSEWHERE[name]
    for name in ("check_val", "eval_every", "log", "save_every", "save_minutes")
} | {
    "train_images": "test_detect_main_data.py",
    "train_annotations": "test_before_the_first_epoch.py::test_a_detector_begins_from_one_of_other",
    "backbone_weights": "test_detectors.py",
    "detector_weights": "test_before_the_first_epoch.py::test_a_detector_begins_from_one_of_other",
}


def fields_of(parts) -> set[str]:
    recipe = set(flags_of(parts[0]))
    return recipe | {name for name, flag in flags_of(*parts).items() if flag.trains}


def test_each_flag_has_its_test():
    assert fields_of(Config.parts()) == EFFECTS.keys() | ELSEWHERE.keys()
    assert fields_of(DetectionConfig.parts()) == OF_DETECTORS.keys() | OF_DETECTORS_ELSEWHERE.keys()


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """12 training images of three classes."""
    return write_tree(tmp_path_factory.mktemp("few"), train=4, val=2)


@pytest.fixture(scope="module")
def ends():
    """What the runs without a flag end with, by their flags."""
    return {}


@pytest.fixture
def bare(monkeypatch):
    """Runs without their pictures, and without the trial of a network that is known to run."""
    monkeypatch.setattr(RunFiles, "draw", lambda *_: None)
    monkeypatch.setattr(classification, "check_forward", lambda *_: None)


@pytest.mark.parametrize("field", EFFECTS)
def test_a_run_with_it_is_another_one(call, bare, few, tmp_path, ends, field):
    (tmp_path / "w.json").write_text('{"a": 1, "b": 2, "c": 0.5}')

    def end_of(*flags):
        code, _, err = call(*SMALL, "--epochs", 1, *flags, "--output", f"run{len(flags)}", few)
        assert (code, err) == (0, [])
        saved = checkpoint.load(tmp_path / f"run{len(flags)}" / "last.pth")
        return {part: saved[part] for part in ("state_dict", "history")}

    given, without = EFFECTS[field]
    if without not in ends:
        ends[without] = end_of(*without)
    assert not same(end_of(*given), ends[without])


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """6 training images of 48 x 64 pixels, one of them without an object."""
    root = tmp_path_factory.mktemp("objects")
    boxes = [annotation(n, n, (1, 7)[n % 2], (4 * n, 5, 20, 30)) for n in range(1, 6)]
    write_coco(root, boxes, 6, "train")
    return write_coco(root, boxes[:2], 2)


@pytest.mark.slow
@pytest.mark.parametrize("field", OF_DETECTORS)
def test_a_detector_s_run_with_it_is_another_one(detect, objects, tmp_path, ends, field):
    def end_of(*flags):
        output = f"run{len(flags)}{flags[1:]}"
        detect(*SMALL_DETECTOR, "--epochs", 1, *flags, "--output", output, objects)
        saved = checkpoint.load(tmp_path / output / "last.pth")
        return {part: saved[part] for part in ("state_dict", "history")}

    given, without = OF_DETECTORS[field]
    if ("detector", without) not in ends:
        ends["detector", without] = end_of(*without)
    assert not same(end_of(*given), ends["detector", without])
