"""mmdetection v1's checkpoints, on files made here in its layout."""

import pytest
import torch
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from models import create_model
from models.detection.detectors import create_detector, detector_from_checkpoint
from tools.import_mmdetection import convert, main
from utils.system.errors import UserError


def shapes_of_v1(arch, classes, expansion=1):
    """Names and shapes of mmdetection v1's detectors on a ResNet, without the backbone's.

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
    levels = [expansion * width for width in levels]
    for i, width in enumerate(levels):
        conv(f"neck.lateral_convs.{i}.conv", width, c, 1)
        conv(f"neck.fpn_convs.{i}.conv", c, c, 3)
    if arch == "retinanet":
        conv("neck.fpn_convs.3.conv", levels[-1], c, 3)
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


def file_of_v1(arch, classes=2, backbone="eca_resnet18", **kwargs):
    torch.manual_seed(0)
    body = create_model(backbone, num_classes=1, **kwargs)
    expansion = body.fc.in_features // 512
    tensors = {f"backbone.{k}": v for k, v in body.state_dict().items() if k[:3] != "fc."}
    tensors |= {k: 0.02 * torch.randn(s) for k, s in shapes_of_v1(arch, classes, expansion).items()}
    meta = {"mmdet_version": "1.0rc0", "CLASSES": ("cat", "dog"), "epoch": 12, "iter": 99}
    return {"meta": meta, "state_dict": tensors, "optimizer": {}}


@pytest.mark.parametrize("arch", ["faster_rcnn", "mask_rcnn", "retinanet"])
def test_every_tensor_finds_its_place(arch):
    file = file_of_v1(arch, ksize="3577")
    del file["state_dict"]["backbone.bn1.num_batches_tracked"]  # torch 0.4 had none
    fields = {"format": 1, **convert(file)}
    assert fields["arch"] == arch
    assert (fields["backbone"], fields["ksize"]) == ("eca_resnet18", [3, 5, 7, 7])
    assert (fields["classes"], fields["category_ids"]) == (["cat", "dog"], [1, 2])
    detector = detector_from_checkpoint(fields)  # strict: none is missing, none is left over
    assert detector.model_kwargs["legacy"]
    used = {value.data_ptr() for value in fields["state_dict"].values()}
    assert used == {value.data_ptr() for value in file["state_dict"].values()}


@pytest.mark.parametrize("backbone", ["resnet18", "se_resnet34", "eca_resnet50", "eca_resnet101"])
@pytest.mark.parametrize("arch", ["mask_rcnn", "retinanet"])
def test_every_backbone_has_the_tensors_of_ours(arch, backbone):
    with torch.device("meta"):
        fields = convert(file_of_v1(arch, backbone=backbone))
        ours = create_detector(arch, backbone, fields["ksize"], fields["num_classes"])
    assert fields["backbone"] == backbone
    shapes = {name: value.shape for name, value in fields["state_dict"].items()}
    assert shapes == {name: value.shape for name, value in ours.state_dict().items()}


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
        (
            lambda t: t.update({"roi_head.bbox_head.fc_cls.weight": t["rpn_head.rpn_cls.weight"]}),
            "mmdetection 2 or 3",
        ),
        (lambda t: t.update({"extra.weight": t["rpn_head.rpn_cls.weight"]}), "extra.weight: a fas"),
        (lambda t: t.pop("rpn_head.rpn_conv.weight"), "no Faster R-CNN"),
        (lambda t: t.pop("backbone.layer2.1.conv1.weight"), "ResNet of no known depth"),
        (
            lambda t: t.update({"backbone.layer2.1.eca.conv.weight": torch.ones(1, 1, 9)}),
            r"sizes \[5, 9\]",
        ),
        (lambda t: t.update({"rpn_head.rpn_cls.weight": 3}), "rpn_cls.weight: a int, not a tensor"),
        (
            lambda t: [t.pop(f"bbox_head.fc_reg.{part}") for part in ("bias", "weight")],
            "lacks 2 tensors of a faster_rcnn on eca_resnet18, such as .*bbox_pred.bias",
        ),
        (lambda t: t.pop("backbone.layer3.1.conv2.weight"), "lacks 1 .*layer3.1.conv2.weight"),
        (
            lambda t: t.update({"backbone.layer1.0.bn3.weight": torch.ones(64)}),
            "has 1 tensors that a faster_rcnn on eca_resnet18 has not, .*layer1.0.bn3",
        ),
        (lambda t: t.update({"bbox_head.fc_reg.bias": torch.ones(9)}), "1 tensors of other shapes"),
    ],
)
def test_unfit_files_are_refused(change, message):
    with torch.device("meta"):
        file = file_of_v1("faster_rcnn")
    change(file["state_dict"])
    with pytest.raises(UserError, match=message):
        convert(file)


@pytest.mark.parametrize(
    "meta",
    [
        {"mmdet_version": "2.3.0+abc"},
        {"mmdet_version": "3.0.0"},
        {"dataset_meta": {"classes": ("cat", "dog")}},
        {"mmengine_version": "0.7.0"},
    ],
)
def test_files_of_newer_versions_are_refused(meta):
    """A RetinaNet's names are the same in all versions, so its meta must tell."""
    with torch.device("meta"):
        file = file_of_v1("retinanet")
    with pytest.raises(UserError, match=r"its meta says mmdetection [23]"):
        convert({**file, "meta": meta})


@pytest.mark.parametrize("meta", [{"mmdet_version": "0.6.0"}, {"mmdet_version": "1.2.0"}, None])
def test_files_of_version_one_or_of_none_are_taken(meta):
    with torch.device("meta"):
        assert convert({**file_of_v1("retinanet"), "meta": meta})["classes"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("cat", "cat"), "CLASSES names 'cat' twice"),
        (("cat", "dog", "emu"), "names 3 classes and has outputs for 2"),
    ],
)
def test_names_that_are_not_the_classes_are_refused(names, message):
    with torch.device("meta"):
        file = file_of_v1("faster_rcnn")
    file["meta"]["CLASSES"] = names
    with pytest.raises(UserError, match=message):
        convert(file)


def test_the_file_that_is_written_is_a_detector_s(tmp_path, monkeypatch, capsys):
    torch.save(file_of_v1("retinanet"), tmp_path / "theirs.pth")
    words = ["import_mmdetection", str(tmp_path / "theirs.pth"), str(tmp_path / "ours.pth")]
    monkeypatch.setattr("sys.argv", words)
    main()
    assert capsys.readouterr().out.startswith("retinanet on eca_resnet18, ksize 3,5,7,7, 2 classes")
    fields = torch.load(tmp_path / "ours.pth", weights_only=True)
    detector = detector_from_checkpoint(fields, min_size=64).eval()
    with torch.inference_mode():
        (found,) = detector([torch.rand(3, 64, 64)])
    assert set(found) == {"boxes", "scores", "labels"}
    (tmp_path / "ours.pth").rename(tmp_path / "moved.pth")
    (tmp_path / "ours.pth").symlink_to("nowhere")  # is there, too
    with pytest.raises(UserError, match="exists already"):
        main()
    assert not (tmp_path / "nowhere").exists()
