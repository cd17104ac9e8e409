"""The texts of a Hugging Face folder: config.json and the model card, README.md."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FILES = (CONFIG, WEIGHTS, CARD)  # config.json is written last: whoever reads begins with it
FORMAT = 1

TEMPLATE = """---
license: mit
pipeline_tag: image-classification
tags:
- image-classification
- eca-net
- pytorch
---

# {arch}

An image classifier with efficient channel attention (ECA-Net, CVPR 2020,
[arXiv 1910.03151](https://arxiv.org/abs/1910.03151)).

| | |
|---|---|
| Architecture | {arch} |
| Attention | {attention} |
| ECA's kernel sizes k | {ksize} |
| Parameters | {parameters:,} |
| Classes | {num_classes:,} |
| Licence | MIT |

## Use

```python
import eca_net  # pip install . in a clone of the project; within the clone: import models

network = eca_net.from_pretrained("FOLDER")  # this folder, or OWNER/NAME
logits = network(images)  # (N, 3, {img_size}, {img_size}) float32 -> (N, {num_classes})
```

## Preprocessing

RGB from 0 to 1, the shorter side scaled to {resized} pixels, the middle {img_size} × {img_size}
cut out; then minus the mean {mean}, divided by the standard deviation {std}.
config.json has the names of the classes where they are known.

## Figures

| | top-1 | top-5 | on |
|---|---|---|---|
| These weights | {own} |
| Published for this network | {published} |

{remark}
"""


def config(metadata: Mapping[str, Any]) -> bytes:
    """Returns config.json: the fields that build the network, and its images' preprocessing."""
    fields = {"format": FORMAT, "library_name": "eca_net", **metadata}
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()


def own_figures(checkpoint: Mapping[str, Any]) -> Mapping[str, float] | None:
    """Finds the validation figures of exactly the weights that a checkpoint of a run holds.

    Returns:
        The row of the epoch at whose end it was saved; None if it was saved within an epoch, or
        holds no figures.
    """
    progress, history = checkpoint.get("progress") or {}, checkpoint.get("history") or ()
    if not history or progress.get("step") != 0:
        return None
    row = history[-1]
    whole = row["epoch"] + 1 == progress.get("epoch") and {"val_top1", "val_top5"} <= row.keys()
    return row if whole else None


def model_card(
    fields: Mapping[str, Any],
    published: Sequence[str] | None,
    own: Mapping[str, float] | None,
) -> bytes:
    """Returns README.md.

    Args:
        fields: those of config.json, and `parameters`.
        published: top-1 and top-5 in % on ImageNet, and parameters, as they were printed; None if
            none were for a network of this form.
        own: a row of a run's history; None if these weights were not evaluated.
    """
    not_known, remark = "not known | not known | –", []
    if own is None:
        remark.append("The file that this folder was made from holds no figures of these weights.")
    else:
        remark.append(
            f"These weights' figures are in %, on the run's own validation images, after epoch "
            f"{own['epoch'] + 1:g}. The checkpoint does not say whose images those are."
        )
    if published is None:
        remark.append("No published accuracy of a network of this form is at hand.")
    else:
        remark.append(
            f"Published are {published[2]} parameters (M is 2^20). Published figures are the "
            "authors', and say nothing about these weights."
        )
    size, crop = fields["img_size"], fields["crop_pct"]
    text = TEMPLATE.format(
        **{name: fields[name] for name in ("arch", "attention", "parameters", "num_classes")},
        ksize=", ".join(map(str, fields["ksize"])) if fields["ksize"] else "none",
        img_size=size,
        resized=round(size / crop),
        mean=", ".join(map(str, fields["mean"])),
        std=", ".join(map(str, fields["std"])),
        own=not_known
        if own is None
        else f"{own['val_top1']:.2f} | {own['val_top5']:.2f} | the run's validation images",
        published="not at hand | not at hand | –"
        if published is None
        else f"{published[0]} | {published[1]} | ImageNet",
        remark=" ".join(remark),
    )
    return text.encode()
