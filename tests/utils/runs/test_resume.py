"""What may change when a run goes on, and what may not."""

import contextlib
from dataclasses import fields, replace
from pathlib import Path

import torch
from helpers.tiny_runs import RECIPE, RUN, tiny_run

from utils.config.classification import Recipe
from utils.config.detection import DetectionRecipe
from utils.config.flags import NEVER, flags_of
from utils.runs.checkpoint import Checkpoint
from utils.runs.resume import Start
from utils.system.errors import UserError

CUDA = torch.device("cuda")  # where the number of threads does not count


def test_each_field_of_a_recipe_is_free_or_refused_inside_an_epoch():
    """What is not listed as free changes an epoch's images or its loss, as will each new field."""
    at_step = tiny_run(progress={**RUN["progress"], "epoch": 1, "step": 2})
    for recipe, free in (
        (Recipe(**RECIPE), "lr epochs early_stop schedule lr_step lr_decay warmup_epochs momentum"),
        (DetectionRecipe(), "lr epochs lr_steps lr_decay warmup_steps momentum clip"),
    ):
        saved = {**at_step, "recipe": recipe.as_dict()}
        run = Checkpoint.of(Path("x"), saved).run
        allowed = set()
        never = {name for name, flag in flags_of(type(recipe)).items() if flag.resume == NEVER}
        of_classifiers = {"norm_decay", "freeze", "layer_decay", "best_by", "val_split"}
        assert never == {"optimizer", *(of_classifiers if type(recipe) is Recipe else ())}
        for field in fields(recipe):
            changed = replace(recipe, **{field.name: "another"})
            with contextlib.suppress(UserError):
                Start(run).refuse_changes(changed, 24, RUN["train_digest"], CUDA)
                allowed.add(field.name)
            if field.name not in never:
                Start(run, at_epoch=1).refuse_changes(changed, 24, RUN["train_digest"], CUDA)
        more = {"weight_decay", "clip_grad", "ema", "accumulate", "sync_bn", "crop_pct"}
        assert allowed == {*free.split(), *more} & {field.name for field in fields(recipe)}
