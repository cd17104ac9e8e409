"""--recipe FILE.json: a run's own args.json, or a few values, through the flags' types."""

import json

import pytest
from helpers.kill_driver import same

from main import DEMOS, RECIPE
from utils.command_line.classification import named_recipe
from utils.runs import checkpoint

pytestmark = pytest.mark.usefixtures("thin")

SMALL = ("-a", "eca_resnet18", "--img-size", 32, "-b", 8, "--lr", 0.01, "-j", 0, "--seed", 1)


def test_a_recipe_of_a_file_is_that_of_the_run(call, tree, tmp_path):
    """A run's args.json is enough for another one; flags go before it, it before a demo's."""
    flags = (*SMALL, "--epochs", 1, "--schedule", "exp", "--lr-decay", 0.5, "--no-norm-decay")
    assert call(*flags, "--output", "first", tree)[0] == 0
    args = json.loads((tmp_path / "first" / "args.json").read_text())
    again = ("--recipe", "first/args.json", "--seed", 1, "-j", 0)
    code, out, err = call(*again, "--output", "second", tree)
    assert (code, err) == (0, [])
    assert any(line.startswith("recipe first/args.json: 1 epoch, batch 8") for line in out)
    one, other = (checkpoint.load(tmp_path / name / "last.pth") for name in ("first", "second"))
    assert one["recipe"] == other["recipe"]
    assert json.loads(json.dumps(one["recipe"])) == args["recipe"]
    assert same(one["state_dict"], other["state_dict"])
    # Some fields alone; a whole number stands for one with a point.
    (tmp_path / "some.json").write_text('{"lr": 1, "warmup_epochs": 1, "clip_grad": 1}')
    flags = (*SMALL, "--recipe", "some.json", "--clip-grad", 2, "--epochs", 1, "--lr", 0.5)
    assert call(*flags, "--output", "third", tree)[0] == 0
    recipe = checkpoint.load(tmp_path / "third" / "last.pth")["recipe"]
    assert (recipe["lr"], recipe["warmup_epochs"], recipe["clip_grad"]) == (0.5, 1.0, 2.0)
    assert isinstance(recipe["warmup_epochs"], float)
    # The run goes on with what it has saved, under the same name alone.
    code, out, _ = call("--resume", "auto", *flags, "--output", "third", tree)
    assert (code, [line for line in out if "some.json holds" in line]) == (0, [])
    # A file that has changed changes nothing, and that is said; a flag that is typed goes before.
    (tmp_path / "some.json").write_text('{"lr": 2, "warmup_epochs": 3, "norm_decay": false}')
    code, out, _ = call("--resume", "auto", *flags, "--epochs", 2, "--output", "third", tree)
    assert code == 0
    assert (
        "! some.json holds warmup_epochs 3.0, norm_decay False, and the run goes on with its own "
        "warmup_epochs 1.0, norm_decay True: give flags to change single values"
    ) in out
    assert checkpoint.load(tmp_path / "third" / "last.pth")["recipe"] == {**recipe, "epochs": 2}
    code, _, err = call("--resume", "third/last.pth", "--recipe", "first/args.json")
    assert code == 2
    assert err == [
        "error: the run's recipe is some.json: leave --recipe first/args.json out (flags such as "
        "--epochs change single values)"
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "r.json: No such file or directory; give a JSON object of a recipe's fields"),
        ("{", "r.json: no usable JSON"),
        ("{}", "r.json: holds no recipe"),
        ('{"recipe": {"epoch": 3}}', "a recipe has no field epoch; did you mean epochs?"),
        ('{"data": "x"}', "a recipe has no field data; give a JSON object"),
        ('{"epochs": "3"}', "epochs is '3', which --epochs does not take"),
        ('{"epochs": true}', "epochs is True, which --epochs does not take"),
        ('{"lr": NaN}', "lr is nan, which --lr does not take"),
        ('{"norm_decay": 0}', "norm_decay is 0, which --norm-decay does not take"),
        ('{"arch": "resnet51"}', "arch is 'resnet51', which --arch does not take"),
        ('{"lr": 1, "lr": 2}', "'lr' stands there twice"),
    ],
)
def test_a_recipe_s_file_that_will_not_do_is_answered_in_one_line(call, tmp_path, text, said):
    if text is not None:
        (tmp_path / "r.json").write_text(text)
    code, _, err = call("--recipe", "r.json", "data")
    assert code == 2
    assert len(err) == 1
    assert said in err[0]
    assert not (tmp_path / "runs").exists()


def test_a_file_s_values_go_before_a_demo_s(tmp_path):
    (tmp_path / "r.json").write_text('{"epochs": 3}')
    demo = DEMOS["demo:digits"]
    found = named_recipe(RECIPE, str(tmp_path / "r.json"), demo)
    assert found == RECIPE.override(**demo).override(epochs=3)
    assert named_recipe(RECIPE, None, demo) == RECIPE.override(**demo)


def test_another_recipe_than_the_runs_is_refused_in_an_evaluation_too(call, run_folder, tree):
    """It would change nothing: sizes and crop are those that the run was saved with."""
    flags = ("-e", "--resume", run_folder / "best.pth", "--recipe", "modern", "-j", 0)
    code, _, errors = call(*flags, tree)
    assert code == 2
    assert len(errors) == 1
    assert "the run's recipe is paper: leave --recipe modern out" in errors[0]
