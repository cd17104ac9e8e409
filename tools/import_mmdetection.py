"""Turns a detector's checkpoint of mmdetection v1 into one of ours.

The authors' detectors were trained with mmdetection 1, whose files mmdetection 2 and 3 no longer
read. Each tensor's name is mapped to torchvision's. Names and shapes tell what the network is
(detector, depth, kernel sizes, classes), and a file that does not hold exactly that network's
tensors is refused. mmdetection 1 had another geometry than torchvision, so the checkpoint that is
written asks for models/detection's legacy geometry.
"""

import utils.system.script_start  # noqa: F401  # isort: skip - what follows takes seconds
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from models.detection.detectors import create_detector
from models.weights import describe_weights
from utils.command_line.parser import Parser
from utils.runs import checkpoint
from utils.runs.checkpoint import Checkpoint
from utils.system.errors import UserError, as_user_error
from utils.system.faults import run_script
from utils.system.files import check_new_file

# mmdetection v1's names, and torchvision's. The first that matches a whole name counts.
COMMON = (
    (
        r"backbone\.((?:conv1|bn1|layer[1-4]\.\d+\.(?:conv[123]|bn[123]|downsample\.[01]|eca\.conv"
        r"|se\.fc\.[02]))\.(?:weight|bias|running_mean|running_var|num_batches_tracked))",
        r"backbone.body.\1",
    ),
    (r"neck\.lateral_convs\.(\d+)\.conv\.(weight|bias)", r"backbone.fpn.inner_blocks.\1.0.\2"),
)
PYRAMID = r"neck\.fpn_convs\.(\d+)\.conv\.(weight|bias)"
TWO_STAGES = (
    (PYRAMID, r"backbone.fpn.layer_blocks.\1.0.\2"),
    (r"rpn_head\.rpn_conv\.(.+)", r"rpn.head.conv.0.0.\1"),
    (r"rpn_head\.rpn_cls\.(.+)", r"rpn.head.cls_logits.\1"),
    (r"rpn_head\.rpn_reg\.(.+)", r"rpn.head.bbox_pred.\1"),
    (r"bbox_head\.shared_fcs\.0\.(.+)", r"roi_heads.box_head.fc6.\1"),
    (r"bbox_head\.shared_fcs\.1\.(.+)", r"roi_heads.box_head.fc7.\1"),
    (r"bbox_head\.fc_cls\.(.+)", r"roi_heads.box_predictor.cls_score.\1"),
    (r"bbox_head\.fc_reg\.(.+)", r"roi_heads.box_predictor.bbox_pred.\1"),
    (r"mask_head\.convs\.(\d)\.conv\.(.+)", r"roi_heads.mask_head.\1.0.\2"),
    (r"mask_head\.upsample\.(.+)", r"roi_heads.mask_predictor.conv5_mask.\1"),
    (r"mask_head\.conv_logits\.(.+)", r"roi_heads.mask_predictor.mask_fcn_logits.\1"),
)
ONE_STAGE = (
    (r"neck\.fpn_convs\.([012])\.conv\.(weight|bias)", r"backbone.fpn.layer_blocks.\1.0.\2"),
    (r"neck\.fpn_convs\.3\.conv\.(.+)", r"backbone.fpn.extra_blocks.p6.\1"),
    (r"neck\.fpn_convs\.4\.conv\.(.+)", r"backbone.fpn.extra_blocks.p7.\1"),
    (r"bbox_head\.cls_convs\.(\d)\.conv\.(.+)", r"head.classification_head.conv.\1.0.\2"),
    (r"bbox_head\.reg_convs\.(\d)\.conv\.(.+)", r"head.regression_head.conv.\1.0.\2"),
    (r"bbox_head\.retina_cls\.(.+)", r"head.classification_head.cls_logits.\1"),
    (r"bbox_head\.retina_reg\.(.+)", r"head.regression_head.bbox_reg.\1"),
)
RETINA_ANCHORS = 9  # on a cell: 3 sizes of 3 shapes

Tensors = Mapping[str, torch.Tensor]


def convert(file: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the fields of a checkpoint of detect_main.py from a loaded file of mmdetection v1.

    Args:
        file: {"state_dict", "meta"} or a bare state dict.

    Returns:
        arch, backbone, attention, ksize, num_classes, model_kwargs, classes, category_ids and
        state_dict.
    """
    tensors = file["state_dict"] if isinstance(file.get("state_dict"), Mapping) else file
    tensors = {str(name).removeprefix("module."): value for name, value in tensors.items()}
    _refuse_newer(file.get("meta"), tensors)
    arch = _arch(tensors)
    named = rename(tensors, arch)
    if arch == "retinanet":
        outputs = len(named["head.classification_head.cls_logits.weight"]) // RETINA_ANCHORS
    else:
        outputs = len(named["roi_heads.box_predictor.cls_score.weight"])
    classes, ids = _classes(file.get("meta"), outputs - (arch != "retinanet"))
    network = {"arch": arch, **_backbone(named), "num_classes": outputs}
    with torch.device("meta"), as_user_error():
        shapes = {k: v.shape for k, v in create_detector(**network).state_dict().items()}
    _check_all(named, shapes, f"{arch} on {network['backbone']}")
    return {
        **network,
        "model_kwargs": {"legacy": True},
        "classes": classes,
        "category_ids": ids,
        "state_dict": named,
    }


def version(meta: Any) -> str | None:
    """Reads from a file's "meta" which version of mmdetection wrote it; None where it names none.

    mmdetection 3 writes a description of the data set, or mmengine's version, in its place.
    """
    if not isinstance(meta, Mapping):
        return None
    if "dataset_meta" in meta or "mmengine_version" in meta:
        return "3"
    return str(meta["mmdet_version"]) if meta.get("mmdet_version") else None


def _refuse_newer(meta: Any, tensors: Tensors) -> None:
    number = re.match(r"v?(\d+)", version(meta) or "")
    newer = [name for name in tensors if name.startswith("roi_head.")]
    if newer or (number and int(number[1]) > 1):
        sign = f"its meta says mmdetection {version(meta)}"
        if not number or int(number[1]) == 1:
            sign = f"{newer[0]} is a name of mmdetection 2 or 3"
        raise UserError(
            f"{sign}, whose geometry and order of classes differ from version 1's: use the tools "
            "of that version"
        )


def rename(tensors: Tensors, arch: str) -> dict[str, torch.Tensor]:
    """Returns the same tensors under torchvision's names.

    Args:
        arch: the detector that they belong to, a key of `DETECTORS`.
    """
    table = COMMON + (ONE_STAGE if arch == "retinanet" else TWO_STAGES)
    named = {}
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{name}: a {type(value).__name__}, not a tensor; not imported")
        matches = ((re.fullmatch(pattern, name), new) for pattern, new in table)
        theirs = next((match.expand(new) for match, new in matches if match), None)
        if theirs is None:
            raise UserError(f"{name}: a {arch} of mmdetection v1 has no such tensor; not imported")
        named[theirs] = value
    return named


def _arch(tensors: Tensors) -> str:
    if "bbox_head.retina_cls.weight" in tensors:
        return "retinanet"
    if "rpn_head.rpn_conv.weight" in tensors and "bbox_head.fc_cls.weight" in tensors:
        masks = any(name.startswith("mask_head.") for name in tensors)
        return "mask_rcnn" if masks else "faster_rcnn"
    first = ", ".join(list(tensors)[:3])
    raise UserError(
        f"no Faster R-CNN, Mask R-CNN or RetinaNet of mmdetection v1: tensors begin with {first}"
    )


def _backbone(named: Tensors) -> dict[str, Any]:
    """Reads a checkpoint's fields backbone, attention and ksize off names and shapes."""
    prefix = "backbone.body."
    body = {k.removeprefix(prefix): v for k, v in named.items() if k.startswith(prefix)}
    with as_user_error("the backbone: "):
        fields = describe_weights({**body, "fc.weight": torch.empty(1, 1)})
    return {"backbone": fields["arch"], **{name: fields[name] for name in ("attention", "ksize")}}


def _check_all(named: Tensors, shapes: Mapping[str, torch.Size], network: str) -> None:
    # torch fills in these counters where a file has none, as files of torch 0.4 do
    needed = {name for name in shapes if not name.endswith(".num_batches_tracked")}
    reshaped = {n for n, shape in shapes.items() if n in named and named[n].shape != shape}
    for names, which in (
        (needed - named.keys(), f"lacks %d tensors of a {network}"),
        (named.keys() - shapes.keys(), f"has %d tensors that a {network} has not"),
        (reshaped, f"has %d tensors of other shapes than a {network}'s"),
    ):
        if names:
            example = f"such as {min(names)} (torchvision's name); not imported"
            raise UserError(f"the file {which % len(names)}, {example}")


def _classes(meta: Any, count: int) -> tuple[list[str], list[int]]:
    """Reads the names of the classes, and gives each a category id.

    COCO's names and ids where there are 80 outputs and the file names COCO's classes or none; else
    the file's names (numbers, where it has none) and the ids from 1.
    """
    coco = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    ids = [i for i, name in enumerate(coco) if name not in ("__background__", "N/A")]
    coco = [coco[i] for i in ids]
    names = meta.get("CLASSES") or [] if isinstance(meta, Mapping) else []
    names = [names] if isinstance(names, str) else [str(name) for name in names]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"CLASSES names {twice[0]!r} twice: labels would mean two things")
    spelt = [name.replace("_", " ") for name in names]  # v1 wrote traffic_light
    if count == len(ids) and (not names or spelt == coco):
        return coco, ids
    if names and len(names) != count:
        raise UserError(f"the file names {len(names)} classes and has outputs for {count}")
    return names or [str(i) for i in range(count)], list(range(1, count + 1))


def main() -> None:
    parser = Parser(prog="python -m tools.import_mmdetection", description=__doc__)
    parser.add_argument("file", metavar="FILE", help="checkpoint of mmdetection v1")
    parser.add_argument("out", metavar="OUT", help="where ours goes; must not exist")
    args = parser.parse_args()
    check_new_file(args.out)
    file = Checkpoint.read(Path(args.file)).contents
    fields = convert(file)
    size = checkpoint.save(args.out, fields)
    ksize = f", ksize {','.join(map(str, fields['ksize']))}" if fields["ksize"] else ""
    print(
        f"{fields['arch']} on {fields['backbone']}{ksize}, {len(fields['classes'])} classes, "
        f"{len(fields['state_dict'])} tensors"
    )
    if version(file.get("meta")) is None:
        print("! the file does not say which mmdetection wrote it: taken for version 1")
    print(f"written to {args.out} ({size / 1e6:,.1f} MB); evaluate it with")
    print(f"  python detect_main.py -e --resume {args.out} DATA")


if __name__ == "__main__":
    run_script(main)
