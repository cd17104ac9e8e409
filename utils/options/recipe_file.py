"""Finds what --recipe names: a recipe of this project, or a JSON file of a recipe's fields."""

import argparse
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from utils.options.parser import Parser
from utils.recipes.classification import PAPER, RECIPES, Recipe
from utils.system.errors import UserError
from utils.system.small_files import read_json
from utils.system.text import did_you_mean, printable

WANTED = "a JSON object of a recipe's fields, as args.json of each run holds one"


def recipe_name(text: str) -> str:
    """Returns the name of a recipe, or of a file that ends in .json; an argparse type."""
    if text not in RECIPES and not text.lower().endswith(".json"):
        hint = did_you_mean(text, list(RECIPES)) or f"; known: {', '.join(RECIPES)}"
        raise argparse.ArgumentTypeError(f"no recipe {text!r}{hint}, or give a .json file")
    return text


def named_recipe(
    parser: Parser, recipe: Recipe, name: str | None, demo: Mapping[str, object]
) -> Recipe:
    """Returns a script's recipe with the values of the one that --recipe names.

    Args:
        parser: knows what each field may be.
        recipe: the script's.
        name: as `recipe_name` returns it; None for the paper's.
        demo: what demo data needs otherwise; the values of a file go before these.

    Raises:
        UserError: see `read_recipe`.
    """
    if name is None or name in RECIPES:
        values = RECIPES[name or PAPER]
        if values.get("optimizer", "sgd") != "sgd":  # a demo's rates are SGD's
            demo = {k: v for k, v in demo.items() if k not in ("lr", "weight_decay")}
        return recipe.override(**values).override(**demo)
    return recipe.override(**demo).override(**read_recipe(parser, name))


def read_recipe(parser: Parser, file: str) -> dict[str, Any]:
    """Returns the fields of a recipe that a JSON file holds, or of the one in a run's args.json.

    Raises:
        UserError: no such file, no recipe in it, an unknown field, or a value that the field's flag
            would refuse.
    """
    values = read_json(file, WANTED)
    if isinstance(values, dict) and isinstance(values.get("recipe"), dict):
        values = values["recipe"]
    if not isinstance(values, dict) or not values:
        raise UserError(f"{printable(file)}: holds no recipe; give {WANTED}")
    kinds = {field.name: field.type for field in fields(Recipe)}
    for name, value in values.items():
        if name not in kinds:
            hint = did_you_mean(name, list(kinds)) or f"; give {WANTED}"
            raise UserError(
                f"{printable(file)}: a recipe has no field {printable(name)}{printable(hint)}"
            )
        if not parser.takes(name, value):
            raise UserError(
                f"{printable(file)}: {name} is {printable(repr(value))[:60]}, which "
                f"--{name.replace('_', '-')} does not take"
            )
    return {name: float(v) if kinds[name] is float else v for name, v in values.items()}
