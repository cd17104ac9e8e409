"""A checkpoint as a typed value; a field of the wrong type, or out of range, is one line."""

import copy
import re

import pytest
import torch
from helpers.tiny_runs import RECIPE, ROW, RUN, tiny_run

from utils.command_line.parser import saved_flags, saved_recipe
from utils.config.classification import Config, Recipe
from utils.config.flags import flags_of
from utils.runs import checkpoint, resume
from utils.runs.checkpoint import Checkpoint
from utils.system.errors import UserError

HUGE = 10**400
WRONG = {
    "arch": (7, None),
    "backbone": (7,),
    "attention": (3, ["eca"]),
    "ksize": (7, "3577", [0]),
    "num_classes": ("3", 0, 2.5, 2**40),
    "model_kwargs": (None, {"width_mult": torch.ones(1)}, {"a": {"b": HUGE}}),
    "classes": ("abc", [1, 2]),
    "category_ids": ("12", [1.5]),
    "img_size": ("32", 0, 1.5, 2**40),
    "crop_pct": ("0.8", 0, 2.0, float("nan")),
    "recipe": (None, {1: 2}, {"lr": torch.ones(1)}),
    "args": (None, {1: 2}, {"data": torch.ones(1)}),
    "seed": (None, "1", -1, HUGE),
    "train_digest": (1,),
    "pretrained": (1, ["x"]),
    "train_images": ("24", -1),
    "environment": (None, "torch"),
    "state_dict": ([torch.ones(1)], {"weight": 1.0}, {1: torch.ones(1)}),
    "raw_state_dict": (None, {"weight": 1.0}),
    "averaged_steps": ("4", -1, 1.5),
    "optimizer": (None, [], {"state": [], "param_groups": []}, {"param_groups": [1]}),
    "scaler": (None, [], {"scale": "x"}),
    "history": (None, {}, [1], [{"epoch": "0"}], [{"epoch": 0, "lr": "x"}], [{"epoch": HUGE}]),
}
WRONG_PROGRESS = {
    "epoch": ("1", -1, 1.5, None),
    "step": ("1", -1, None),
    "sums": (None, [0.0], torch.zeros(4)),
    "best": (None, [], {"epoch": "0"}, {"val_top1": "x"}),
    "broken": (None, 3, ["x"], [-1]),
}
CASES = [(name, {name: value}) for name, values in WRONG.items() for value in values]
CASES += [
    ("progress", {"progress": value})
    for value in (
        None,
        [],
        "x",
        *(
            {**RUN["progress"], name: value}
            for name, values in WRONG_PROGRESS.items()
            for value in values
        ),
    )
]
# What a run needs to go on, though each part that there is is right.
LACKING = [
    ("progress", {"progress": {"epoch": 1}}),
    ("optimizer", {"optimizer": {"state": {}}}),
    ("optimizer", {"optimizer": {"state": {}, "param_groups": [{"params": [0]}]}}),
]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(contents):
    checkpoint.save("last.pth", contents)
    return resume.read("last.pth", None, None, None, False, None)


def test_what_a_run_saves_is_read():
    assert read(tiny_run())[0].run.seed == 1
    best = {**ROW, "summaries": {"bbox": {"figures": {"AP": 0.5}, "per_class": {"cat": -1.0}}}}
    assert read(tiny_run(progress={**RUN["progress"], "best": best}))[0] is not None


@pytest.mark.parametrize(("field", "changes"), [*CASES, *LACKING])
def test_a_wrong_field_is_one_line(field, changes):
    with pytest.raises(UserError) as caught:
        read(tiny_run(**copy.deepcopy(changes)))
    message = str(caught.value)
    assert re.match(rf"last\.pth: the field {field}\b\S* cannot be used \(", message)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"history": [ROW, {"epoch": 1, "lr": HUGE}]}, "history[1][...] cannot be used (Expected"),
        ({"ksize": [3, "5"]}, "ksize[1] cannot be used (Expected `int`, got `str`)"),
        ({"progress": {"epoch": "1"}}, "progress.epoch cannot be used (Expected `int`, got `str`)"),
    ],
)
def test_the_line_has_the_path_to_the_wrong_field(changes, said):
    with pytest.raises(UserError) as caught:
        read(tiny_run(**changes))
    assert f"last.pth: the field {said}" in str(caught.value)


def test_each_row_of_a_history_has_its_epoch():
    with pytest.raises(UserError, match=r"last\.pth: cannot be used \(a row of its history lacks"):
        read(tiny_run(history=[{"lr": 0.1}]))


def test_a_run_inside_an_epoch_says_how_many_images_it_has():
    contents = tiny_run(progress={**RUN["progress"], "step": 2})
    del contents["train_images"]
    with pytest.raises(UserError, match=r"last\.pth: cannot be used \(it stopped inside an epoch"):
        read(contents)


def test_with_resume_auto_the_message_names_the_file(tmp_path):
    lacking = tiny_run(progress={"epoch": 1})
    detector = tiny_run(arch="retinanet", backbone="resnet18", progress={"epoch": 1})
    for name, contents in (("a", lacking), ("b", detector)):
        (tmp_path / name).mkdir()
        checkpoint.save(tmp_path / name / "previous.pth", contents)
    with pytest.raises(UserError, match=r"a/previous\.pth: the field progress cannot be used"):
        resume.read("auto", None, None, str(tmp_path / "a"), False, None)
    with pytest.raises(UserError, match=r"b/previous\.pth: the field progress cannot be used"):
        resume.read_detector("auto", None, str(tmp_path / "b"), False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("print_freq", 0),
        ("save_every", -1),
        ("save_minutes", [1]),
        ("amp", "fp8"),
        ("fused", "yes"),
        ("data", "tree\0"),
        ("lr", float("nan")),
        ("arch", "resnet19"),
        ("worker_timeout", "soon"),
    ],
)
def test_saved_flags_are_checked_as_flags_are(name, value):
    with pytest.raises(UserError, match=rf"c.pth: the saved {name.replace('_', '-')} "):
        saved_flags({name: value}, flags_of(*Config.parts()), "c.pth")


def test_a_file_sets_no_flag_of_one_start():
    values = {"data": "tree", "lr": 0.5, "img_size": None, "output": "/elsewhere", "gpu": 9}
    values |= {"evaluate": True, "resume": "x", "workers": 10**6, "help": "x", "no_flag": 1}
    taken = saved_flags(values, flags_of(*Config.parts()), "c.pth")
    assert taken == {"data": "tree", "lr": 0.5}  # None: not set, so the default


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": None}, "the saved recipe lacks epochs"),
        ({"lr": "fast"}, "the saved lr 'fast' is not what --lr takes"),
        ({"batch_size": 0}, "the saved batch-size 0 is not what --batch-size takes"),
    ],
)
def test_a_saved_recipe_is_checked_as_flags_are(changes, message):
    assert saved_recipe(Recipe, RECIPE, "c.pth") == Recipe(**RECIPE)
    with pytest.raises(UserError, match=message):
        saved_recipe(Recipe, {**RECIPE, **changes}, "c.pth")
    without = {name: value for name, value in RECIPE.items() if name != "epochs"}
    with pytest.raises(UserError, match="lacks epochs"):
        saved_recipe(Recipe, without, "c.pth")


def test_a_run_says_where_it_stands(tmp_path):
    fields = {"classes": ["a", "b"], "img_size": 32, "environment": {"cpu_threads": 3}}
    state = tiny_run(**fields, progress={**RUN["progress"], "epoch": 4, "step": 7})
    checkpoint.save(tmp_path / "last.pth", state)
    saved = Checkpoint.read(tmp_path / "last.pth")
    assert (saved.file, saved.classes, saved.img_size) == (tmp_path / "last.pth", ("a", "b"), 32)
    assert saved.run.position == (4, 7)
    assert (saved.run.seed, saved.run.environment["cpu_threads"]) == (RUN["seed"], 3)
    assert saved.run.recipe == RUN["recipe"]
    assert not saved.is_detector
    with pytest.raises(AttributeError):
        saved.run.seed = 1
    checkpoint.save(tmp_path / "d.pth", tiny_run(arch="retinanet", backbone="resnet18"))
    assert Checkpoint.read(tmp_path / "d.pth").is_detector


def test_weights_alone_are_no_run(tmp_path):
    torch.save({"fc.weight": torch.ones(2, 2), "classes": "no names of ours"}, tmp_path / "w.pth")
    saved = Checkpoint.read(tmp_path / "w.pth")
    assert (saved.run, saved.classes, saved.img_size, saved.crop_pct) == (None, None, None, None)
