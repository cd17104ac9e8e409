"""The detectors: names, freezing, BatchNorm, precision, weights in and out."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import detection as reference

from models import create_model
from models.detection.detectors import (
    DETECTORS,
    FIRST_LABEL,
    create_detector,
    describe_detector,
    detector_from_checkpoint,
    load_backbone,
    load_detector,
)

SMALL = {"backbone": "eca_resnet18", "min_size": 64, "max_size": 64}
FEW = {
    "rpn_post_nms_top_n_train": 30,
    "rpn_post_nms_top_n_test": 10,
    "box_batch_size_per_image": 32,
    "box_detections_per_img": 5,
}


def small_detector(arch="mask_rcnn", categories=2, **kwargs):
    torch.manual_seed(0)
    settings = {**SMALL, **kwargs}
    if arch != "retinanet":
        settings = {**FEW, **settings}
    return create_detector(arch, num_classes=categories + FIRST_LABEL[arch], **settings)


def small_batch(arch="mask_rcnn", n=2):
    torch.manual_seed(1)
    box = torch.tensor([[8.0, 8.0, 40.0, 48.0]])
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[:, 8:48, 8:40] = 1
    target = {"boxes": box, "labels": torch.tensor([FIRST_LABEL[arch] + 1]), "masks": mask}
    return [torch.rand(3, 64, 64) for _ in range(n)], [dict(target) for _ in range(n)]


def statistics(detector):
    names = ("running_mean", "running_var")
    return {k: v.clone() for k, v in detector.state_dict().items() if k.endswith(names)}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("arch", DETECTORS)
def test_trains_and_predicts(arch, legacy):
    detector = small_detector(arch, legacy=legacy)
    images, targets = small_batch(arch)
    losses = detector.train()(images, targets)
    sum(losses.values()).backward()
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    with torch.inference_mode():
        (found, _) = detector.eval()(images)
    assert found["boxes"].shape == (len(found["scores"]), 4)
    if arch == "mask_rcnn":
        assert found["masks"].shape == (len(found["scores"]), 1, 64, 64)


@pytest.mark.parametrize("arch", DETECTORS)
def test_an_image_without_objects_trains(arch):
    detector = small_detector(arch)
    images, targets = small_batch(arch)
    for key in targets[1]:
        targets[1][key] = targets[1][key][:0]
    losses = detector.train()(images, targets)
    assert sum(losses.values()).isfinite()


@pytest.mark.parametrize(
    ("arch", "builder", "classes"),
    [
        ("faster_rcnn", reference.fasterrcnn_resnet50_fpn, 5),
        ("mask_rcnn", reference.maskrcnn_resnet50_fpn, 5),
        ("retinanet", reference.retinanet_resnet50_fpn, 4),
    ],
)
def test_names_are_torchvisions(arch, builder, classes):
    with torch.device("meta"):
        theirs = builder(weights=None, weights_backbone=None, num_classes=classes)
        ours = create_detector(arch, "resnet50", num_classes=classes)
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_computes_what_torchvision_computes():
    theirs = reference.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=128, score_thresh=0.0
    ).eval()
    ours = create_detector("retinanet", "resnet50", num_classes=3, min_size=128, score_thresh=0.0)
    # P6 from P5 in torchvision's, from C5 in the published networks
    ours.backbone.fpn.extra_blocks = copy.deepcopy(theirs.backbone.fpn.extra_blocks)
    ours.load_state_dict(theirs.state_dict())
    theirs.detections_per_img = ours.detections_per_img
    image = [torch.rand(3, 128, 128)]
    with torch.inference_mode():
        (expected,), (found,) = theirs(image), ours.eval()(image)
    assert len(found["boxes"]) == 100
    for key in expected:
        torch.testing.assert_close(found[key], expected[key])


@pytest.mark.parametrize("attention", ["none", "se", "eca_ns", "eca"])
def test_attentions(attention):
    ksize = "3333" if attention.startswith("eca") else None
    detector = small_detector("retinanet", attention=attention, ksize=ksize)
    assert detector.attention == attention
    assert detector.ksize == (ksize and (3, 3, 3, 3))


@pytest.mark.parametrize(
    ("norm", "moving", "trained"),
    [("eval", False, True), ("frozen", False, False), ("bn", True, True), ("sync", True, True)],
)
def test_norm(norm, moving, trained):
    detector = small_detector("retinanet", norm=norm)
    before = statistics(detector)
    images, targets = small_batch("retinanet")
    detector.train().backbone.body.train()  # a second reach for the statistics
    sum(detector(images, targets).values()).backward()
    after = statistics(detector)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    deep = {name for name in before if any(f".layer{i}." in name for i in (2, 3, 4))}
    assert moved == (deep if moving else set())
    norms = [m for m in detector.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with_grad = sum(m.weight.grad is not None for m in norms)
    assert with_grad == (sum(name.endswith("mean") for name in deep) if trained else 0)


def test_frozen_layers():
    for layers, frozen in [(0, 6), (3, 3), (4, 2), (5, 0)]:
        detector = small_detector("retinanet", trainable_layers=layers)
        body = detector.backbone.body
        still = [n for n, m in body.items() if not any(p.requires_grad for p in m.parameters())]
        still = [n for n in still if any(True for _ in body[n].parameters())]
        assert still == ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"][:frozen]


@pytest.mark.parametrize("arch", DETECTORS)
def test_head_outputs_stay_float32_under_autocast(arch):
    unsure = "score_thresh" if arch == "retinanet" else "box_score_thresh"
    detector = small_detector(arch, **{unsure: 0.0}).eval()
    seen = {}

    def note(name):
        def hook(module, inputs, output):
            seen[name] = output.dtype

        return hook

    outputs = (
        "head.classification_head.cls_logits",
        "head.regression_head.bbox_reg",
        "rpn.head.cls_logits",
        "rpn.head.bbox_pred",
        "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred",
        "roi_heads.mask_predictor.mask_fcn_logits",
    )
    for name, module in detector.named_modules():
        if name in (*outputs, "backbone.fpn.inner_blocks.0"):
            module.register_forward_hook(note(name))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        (found,) = detector([torch.rand(3, 64, 64)])
    # Else autocast was not on at all.
    assert seen.pop("backbone.fpn.inner_blocks.0") == torch.bfloat16
    assert len(seen) == {"faster_rcnn": 4, "mask_rcnn": 5, "retinanet": 2}[arch]
    assert set(seen.values()) == {torch.float32}
    boxes = found["boxes"]
    assert boxes.dtype == torch.float32
    assert not torch.equal(boxes, boxes.bfloat16().float())


def test_backbone_weights():
    donor = create_model("eca_resnet18", num_classes=7)
    detector = small_detector("retinanet")
    wrapped = {f"module.{name}": value for name, value in donor.state_dict().items()}
    said = load_backbone(detector, {"state_dict": wrapped, "epoch": 3})
    body = detector.backbone.body.state_dict()
    assert said.startswith(f"Loaded {len(donor.state_dict()) - 2} tensors")
    assert all(torch.equal(value, donor.state_dict()[name]) for name, value in body.items())


def test_unfit_backbone_weights_are_refused():
    detector = small_detector("retinanet")
    donor = create_model("eca_resnet18").state_dict()
    lacking = {k: v for k, v in donor.items() if k != "layer3.0.conv1.weight"}
    before = copy.deepcopy(detector.state_dict())
    with pytest.raises(ValueError, match=r"1 missing: layer3.0.conv1.weight$"):
        load_backbone(detector, lacking)
    with pytest.raises(ValueError, match="give `ksize=5,5,5,5`"):
        load_backbone(detector, create_model("eca_resnet18", "5555").state_dict())
    with pytest.raises(ValueError, match="missing"):
        load_backbone(detector, create_model("resnet18").state_dict())
    assert all(torch.equal(v, before[k]) for k, v in detector.state_dict().items())


@pytest.mark.parametrize("arch", DETECTORS)
def test_rebuilt_from_a_checkpoint(arch):
    detector = small_detector(arch, legacy=True, anchor_scale=2.0).eval()
    checkpoint = {
        "format": 1,
        **describe_detector(detector),
        "state_dict": {f"module.{k}": v for k, v in detector.state_dict().items()},
    }
    again = detector_from_checkpoint(checkpoint).eval()
    images, _ = small_batch()
    with torch.inference_mode():
        for one, other in zip(detector(images), again(images), strict=True):
            assert all(torch.equal(one[key], other[key]) for key in one)
    assert detector_from_checkpoint(checkpoint, min_size=32).transform.min_size == (32,)


def test_foreign_checkpoints_are_refused():
    detector = small_detector("retinanet")
    checkpoint = {"format": 1, **describe_detector(detector), "state_dict": detector.state_dict()}
    with pytest.raises(ValueError, match="lacks backbone"):
        detector_from_checkpoint({k: v for k, v in checkpoint.items() if k != "backbone"})
    with pytest.raises(ValueError, match="format 9"):
        detector_from_checkpoint({**checkpoint, "format": 9})
    with pytest.raises(ValueError, match="do not fit retinanet"):
        detector_from_checkpoint({**checkpoint, "num_classes": 5})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"arch": "yolo"}, "unknown detector 'yolo'"),
        ({"backbone": "eca_mobilenetv2"}, "takes a ResNet"),
        ({"norm": "batch"}, "norm must be"),
        ({"trainable_layers": 6}, "trainable_layers must be 0 to 5"),
        ({"ksize": "3344"}, "odd kernel sizes"),
        ({"num_classes": 1}, "no category"),
        ({"arch": "retinanet", "minsize": 64}, "no setting 'minsize'"),
    ],
)
def test_bad_arguments(kwargs, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        create_detector(**{"arch": "mask_rcnn", "backbone": "eca_resnet18", **kwargs})


def test_defaults_are_the_published_networks():
    with torch.device("meta"):
        detector = create_detector("mask_rcnn")
    assert (detector.arch, detector.backbone_arch) == ("mask_rcnn", "eca_resnet50")
    assert (detector.ksize, detector.num_classes) == ((3, 3, 7, 7), 81)


def narrow_detector(arch, categories, seed, **settings):
    torch.manual_seed(seed)
    given = {"backbone": "eca_resnet18", "width": 16, **settings}
    return create_detector(arch, num_classes=categories + FIRST_LABEL[arch], **given)


def saved(network, classes):
    fields = {"format": 1, **describe_detector(network), "classes": classes}
    return {**fields, "state_dict": network.state_dict()}


@pytest.mark.parametrize(
    ("arch", "fresh"),
    [
        ("faster_rcnn", {"cls_score", "bbox_pred"}),
        ("mask_rcnn", {"cls_score", "bbox_pred", "mask_fcn_logits"}),
        ("retinanet", {"cls_logits"}),
    ],
)
@pytest.mark.parametrize("classes", [["cat", "dog", "cow"], ["dog", "cat"]])
def test_class_layers_alone_are_fresh(arch, fresh, classes):
    old, new = narrow_detector(arch, 2, 0), narrow_detector(arch, len(classes), 1)
    with torch.no_grad():
        for value in old.parameters():
            value.add_(1)
    before = {name: value.clone() for name, value in new.state_dict().items()}
    said = load_detector(new, saved(old, ["cat", "dog"]), classes)
    kept = 0
    for name, value in new.state_dict().items():
        parts = name.split(".")
        # the region proposals have layers of the same names, for one class: any object
        if parts[-2] in fresh and parts[0] != "rpn":
            assert torch.equal(value, before[name]), name
        else:
            assert torch.equal(value, old.state_dict()[name]), name
            kept += 1
    assert said == (
        f"{kept} tensors of a trained detector kept; {2 * len(fresh)} of the class layers fresh"
    )


def test_the_same_classes_are_kept():
    old, new = narrow_detector("retinanet", 2, 0), narrow_detector("retinanet", 2, 1)
    assert load_detector(new, saved(old, ["a", "b"]), ["a", "b"]).endswith("same classes")
    assert all(torch.equal(v, new.state_dict()[k]) for k, v in old.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 9}, "not a detector's checkpoint"),
        ({"arch": "faster_rcnn"}, "holds arch faster_rcnn, not retinanet"),
        ({"model_kwargs": {"legacy": True}}, "holds legacy True, not False"),
        ({"model_kwargs": {"anchor_scale": 2.0}}, "holds anchor_scale 2.0, not 4"),
        ({"state_dict": {"backbone.x": torch.ones(1)}}, "conv1.weight is missing"),
    ],
)
def test_unfit_checkpoints_change_nothing(change, message):
    old, new = narrow_detector("retinanet", 2, 0), narrow_detector("retinanet", 3, 1)
    before = {name: value.clone() for name, value in new.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_detector(new, {**saved(old, ["a", "b"]), **change}, ["a", "b", "c"])
    assert all(torch.equal(v, before[k]) for k, v in new.state_dict().items())
