"""Hands MobileNetV2's recipe to main.py's entry."""

from main import main
from utils.data import demo_sets
from utils.options.parser import run_script
from utils.recipes.classification import Recipe

RECIPE = Recipe(  # the paper's, for MobileNetV2
    arch="eca_mobilenetv2",
    epochs=400,
    batch_size=96,
    lr=0.045,
    momentum=0.9,
    weight_decay=4e-5,
    schedule="exp",
    lr_decay=0.98,
)
DEMOS = demo_sets.recipes("eca_mobilenetv2", light=True)

if __name__ == "__main__":
    run_script(lambda: main(RECIPE, DEMOS))
