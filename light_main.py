"""Trains and evaluates ECA-MobileNetV2 with the paper's recipe for it: main.py with other defaults.

examples:
  light_main.py DATA                              ECA-MobileNetV2 by the paper's 400 epochs
  light_main.py -a mobilenetv2 DATA               the same without attention
  light_main.py -e --resume CKPT DATA             evaluate
  light_main.py --recipe modern DATA              the modern recipe's training, on this network
  light_main.py --resume auto                     go on with the newest run
  light_main.py demo:digits                       real images without a download
"""

import utils.system.script_start  # noqa: F401  # isort: skip - what follows takes seconds
from main import SMALLER, main
from utils.config.classification import Recipe
from utils.data import demo_sets
from utils.system.faults import run_script

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
    run_script(lambda: main(RECIPE, DEMOS, __doc__), SMALLER)
