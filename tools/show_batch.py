"""Draws the first batch of a run as the network would get it, without a training.

It takes main.py's flags: what shapes a batch is seen, all others change nothing here.

examples:
  python -m tools.show_batch DATA --recipe a2
  python -m tools.show_batch demo:digits --mixup 0.2 --random-erasing 0.3 --seed 1 --output look
"""

import utils.system.script_start  # noqa: F401  # isort: skip - what follows takes seconds
from main import DEMOS, RECIPE
from utils.command_line.classification import read_command_line
from utils.runs import folder as runs
from utils.system import distributed
from utils.system.errors import EXIT_FAILED, UserError
from utils.system.faults import run_script
from utils.system.files import write_atomically
from utils.training import classifier
from utils.training.classification import Objective, draw_first_batch
from utils.training.classification_data import open_training_data
from utils.training.optim import StepRule


def main() -> int:
    config, start = read_command_line(RECIPE, DEMOS, __doc__)
    context = distributed.setup("cpu")
    recipe, flags, seed = config.recipe, config.network, start.seed(context)
    weights, skip = config.typed.get("class_weights"), config.data.skip_bad_images
    data = open_training_data(config.data, recipe, weights, start, context)
    context.say(*data.lines())
    order = data.order(recipe, seed, context)
    rule = StepRule.of(recipe, order.steps, seed, flags.amp, context)
    outputs = flags.num_classes or len(data.classes)
    aim = Objective.of(recipe, outputs, data.class_weights, context.device)
    loader = classifier.loader_of(config.data, flags, context)
    picture = draw_first_batch(data, order, rule, aim, loader, skip)
    if picture is None:
        raise UserError(
            "an image cannot be read; add --skip-bad-images, or see python -m tools.check_images",
            EXIT_FAILED,
        )
    target = runs.create("batch", config.run.output) / "batch.png"
    write_atomically(target, picture)
    print(f"written to {target}: the first batch of a run with --seed {seed}")
    return 0


if __name__ == "__main__":
    run_script(main)
