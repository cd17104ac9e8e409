"""mmdetection v1's checkpoints, on files made here in its layout."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from models.eca_detection import create_detector, detector_from_checkpoint
from utils.errors import UserError
from utils.import_mmdet import convert

ROOT = Path(__file__).resolve().parent.parent


def shapes_of_v1(arch, classes):
    """Names and shapes of mmdetection v1's detectors on a ResNet-18, without the backbone's.

    Written down from its modules (FPN, RPNHead, SharedFCBBoxHead, FCNMaskHead, RetinaHead), apart
    from the importer's table.
    """
    c = 256
    shapes = {}

    def conv(name, inputs, outputs, k):
        shapes[f"{name}.weight"] = (outputs, inputs, k, k)
        shapes[f"{name}.bias"] = (outputs,)

    def linear(name, inputs, outputs):
        shapes[f"{name}.weight"] = (outputs, inputs)
        shapes[f"{name}.bias"] = (outputs,)

    levels = [128, 256, 512] if arch == "retinanet" else [64, 128, 256, 512]
    for i, width in enumerate(levels):
        conv(f"neck.lateral_convs.{i}.conv", width, c, 1)
        conv(f"neck.fpn_convs.{i}.conv", c, c, 3)
    if arch == "retinanet":
        conv("neck.fpn_convs.3.conv", 512, c, 3)
        conv("neck.fpn_convs.4.conv", c, c, 3)
        for i in range(4):
            conv(f"bbox_head.cls_convs.{i}.conv", c, c, 3)
            conv(f"bbox_head.reg_convs.{i}.conv", c, c, 3)
        conv("bbox_head.retina_cls", c, 9 * classes, 3)
        conv("bbox_head.retina_reg", c, 9 * 4, 3)
        return shapes
    conv("rpn_head.rpn_conv", c, c, 3)
    conv("rpn_head.rpn_cls", c, 3, 1)
    conv("rpn_head.rpn_reg", c, 12, 1)
    linear("bbox_head.shared_fcs.0", c * 49, 1024)
    linear("bbox_head.shared_fcs.1", 1024, 1024)
    linear("bbox_head.fc_cls", 1024, classes + 1)
    linear("bbox_head.fc_reg", 1024, 4 * (classes + 1))
    if arch == "mask_rcnn":
        for i in range(4):
            conv(f"mask_head.convs.{i}.conv", c, c, 3)
        shapes["mask_head.upsample.weight"] = (c, c, 2, 2)
        shapes["mask_head.upsample.bias"] = (c,)
        conv("mask_head.conv_logits", c, classes + 1, 1)
    return shapes


def file_of_v1(arch, classes=2, **kwargs):
    torch.manual_seed(0)
    body = create_detector("faster_rcnn", "eca_resnet18", **kwargs).backbone.body.state_dict()
    tensors = {f"backbone.{name}": value for name, value in body.items()}
    tensors |= {k: 0.02 * torch.randn(s) for k, s in shapes_of_v1(arch, classes).items()}
    meta = {"mmdet_version": "1.0rc0", "CLASSES": ("cat", "dog"), "epoch": 12, "iter": 99}
    return {"meta": meta, "state_dict": tensors, "optimizer": {}}


@pytest.mark.parametrize("arch", ["faster_rcnn", "mask_rcnn", "retinanet"])
def test_every_tensor_finds_its_place(arch):
    file = file_of_v1(arch, ksize="3577")
    fields = {"format": 1, **convert(file)}
    assert fields["arch"] == arch
    assert (fields["backbone"], fields["ksize"]) == ("eca_resnet18", [3, 5, 7, 7])
    assert (fields["classes"], fields["category_ids"]) == (["cat", "dog"], [1, 2])
    detector = detector_from_checkpoint(fields)  # strict: none is missing, none is left over
    assert detector.model_kwargs["legacy"]
    used = {value.data_ptr() for value in fields["state_dict"].values()}
    assert used == {value.data_ptr() for value in file["state_dict"].values()}


def test_tensors_with_one_shape_are_not_swapped():
    """The pairs that a wrong table could exchange unnoticed."""
    retina = file_of_v1("retinanet")
    named, given = convert(retina)["state_dict"], retina["state_dict"]
    for name, old in {
        "head.classification_head.conv.2.0.weight": "bbox_head.cls_convs.2.conv.weight",
        "head.regression_head.conv.2.0.weight": "bbox_head.reg_convs.2.conv.weight",
        "backbone.fpn.layer_blocks.1.0.weight": "neck.fpn_convs.1.conv.weight",
        "backbone.fpn.extra_blocks.p7.weight": "neck.fpn_convs.4.conv.weight",
    }.items():
        assert named[name] is given[old]
    mask = file_of_v1("mask_rcnn")
    named, given = convert(mask)["state_dict"], mask["state_dict"]
    for name, old in {
        "roi_heads.mask_head.3.0.weight": "mask_head.convs.3.conv.weight",
        "rpn.head.conv.0.0.weight": "rpn_head.rpn_conv.weight",
        "backbone.fpn.layer_blocks.3.0.weight": "neck.fpn_convs.3.conv.weight",
    }.items():
        assert named[name] is given[old]


@pytest.mark.parametrize("spelling", [None, "_", " "])
def test_eighty_classes_are_cocos(spelling):
    file = file_of_v1("faster_rcnn", classes=80)
    del file["meta"]["CLASSES"]
    if spelling:
        known = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:]
        names = tuple(name.replace(" ", spelling) for name in known if name != "N/A")
        file["meta"]["CLASSES"] = names
    fields = convert(file)
    assert len(fields["classes"]) == 80
    assert fields["classes"][0] == "person"
    assert fields["classes"][9] == "traffic light"
    assert (fields["category_ids"][0], fields["category_ids"][-1]) == (1, 90)
    assert fields["num_classes"] == 81


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"roi_head.bbox_head.fc_cls.weight": t["rpn_head.rpn_cls.weight"]}),
         "mmdetection 2 or 3"),
        (lambda t: t.update({"extra.weight": t["rpn_head.rpn_cls.weight"]}), "extra.weight: a fas"),
        (lambda t: t.pop("rpn_head.rpn_conv.weight"), "no Faster R-CNN"),
        (lambda t: t.pop("backbone.layer2.1.conv1.weight"), "no ResNet known here"),
        (lambda t: t.update({"backbone.layer2.1.eca.conv.weight": torch.ones(1, 1, 9)}),
         r"sizes \[5, 9\]"),
    ],
)  # fmt: skip
def test_unfit_files_are_refused(change, message):
    file = file_of_v1("faster_rcnn")
    change(file["state_dict"])
    with pytest.raises(UserError, match=message):
        convert(file)


def test_wrong_number_of_class_names():
    with pytest.raises(UserError, match="names 2 classes and has outputs for 5"):
        convert(file_of_v1("faster_rcnn", classes=5))


def test_as_a_user_runs_it(tmp_path):
    torch.save(file_of_v1("retinanet"), tmp_path / "theirs.pth")
    command = [sys.executable, "-m", "utils.import_mmdet", tmp_path / "theirs.pth"]
    command += [tmp_path / "ours.pth"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("retinanet on eca_resnet18, ksize 3,5,7,7, 2 classes, ")
    fields = torch.load(tmp_path / "ours.pth", weights_only=True)
    detector = detector_from_checkpoint(fields, min_size=64).eval()
    with torch.inference_mode():
        (found,) = detector([torch.rand(3, 64, 64)])
    assert set(found) == {"boxes", "scores", "labels"}

    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert again.returncode == 2
    assert again.stderr.startswith("error: ")
    assert "exists already" in again.stderr
