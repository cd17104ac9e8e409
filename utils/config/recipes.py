"""The recipes that --recipe names: what each changes of a script's own, the paper's.

docs/RECIPES.md gives every number's source.
"""

import argparse
from types import MappingProxyType

from utils.system.text import did_you_mean

PAPER = "paper"
# fmt: off
MODERN = MappingProxyType({  # torchvision's for its V2 weights
    "epochs": 600, "batch_size": 1024, "lr": 0.5, "weight_decay": 2e-5, "norm_decay": False,
    "schedule": "cosine", "warmup_epochs": 5.0, "label_smoothing": 0.1, "mixup": 0.2, "cutmix": 1.0,
    "auto_augment": "trivial", "random_erasing": 0.1, "repeats": 4, "ema": 0.99997,
    "train_size": 176, "crop_pct": 224 / 232,
})
MODERN_100 = MappingProxyType({  # a hundred epochs with the weaker regularisation of timm's A3
    "epochs": 100, "batch_size": 1024, "lr": 0.5, "weight_decay": 1e-4, "norm_decay": False,
    "schedule": "cosine", "warmup_epochs": 5.0, "mixup": 0.1, "cutmix": 1.0,
    "auto_augment": "rand", "ema": 0.9998, "train_size": 160, "crop_pct": 0.95,
})
# A1, A2 and A3: ResNet strikes back (Wightman et al. 2021), table 2.
A1 = MappingProxyType({
    "epochs": 600, "batch_size": 2048, "optimizer": "lamb", "lr": 5e-3, "weight_decay": 0.01,
    "norm_decay": False, "schedule": "cosine", "warmup_epochs": 5.0, "loss": "bce",
    "bce_threshold": 0.2, "label_smoothing": 0.1, "mixup": 0.2, "cutmix": 1.0,
    "auto_augment": "rand-m7-mstd0.5-inc1", "repeats": 3, "drop_path": 0.05, "crop_pct": 0.95,
})
A2 = MappingProxyType({
    **A1, "epochs": 300, "weight_decay": 0.02, "label_smoothing": 0.0, "mixup": 0.1,
})
A3 = MappingProxyType({
    **A2, "epochs": 100, "lr": 8e-3, "auto_augment": "rand-m6-mstd0.5-inc1", "repeats": 1,
    "drop_path": 0.0, "train_size": 160,
})
FINETUNE = MappingProxyType({  # for few images of one's own, from weights (docs/FINE_TUNING.md)
    "epochs": 30, "batch_size": 32, "lr": 0.01, "schedule": "cosine", "warmup_epochs": 1.0,
    "label_smoothing": 0.1,
})
RECIPES = MappingProxyType({
    PAPER: MappingProxyType({}), "modern": MODERN, "modern100": MODERN_100, "a1": A1, "a2": A2,
    "a3": A3, "finetune": FINETUNE,
})
# fmt: on


def recipe_name(text: str) -> str:
    """Checks --recipe, as an argparse type: a recipe's name, or a file that ends in .json."""
    if text not in RECIPES and not text.lower().endswith(".json"):
        hint = did_you_mean(text, list(RECIPES)) or f"; known: {', '.join(RECIPES)}"
        raise argparse.ArgumentTypeError(f"no recipe {text!r}{hint}, or give a .json file")
    return text
