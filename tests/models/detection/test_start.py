"""A detector that begins from a detector of other classes."""

import pytest
import torch

from models.detection.detectors import FIRST_LABEL, create_detector, describe_detector
from models.detection.start import load_detector


def detector(arch, categories, seed, **settings):
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
    old, new = detector(arch, 2, 0), detector(arch, len(classes), 1)
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
    old, new = detector("retinanet", 2, 0), detector("retinanet", 2, 1)
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
    old, new = detector("retinanet", 2, 0), detector("retinanet", 3, 1)
    before = {name: value.clone() for name, value in new.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_detector(new, {**saved(old, ["a", "b"]), **change}, ["a", "b", "c"])
    assert all(torch.equal(v, before[k]) for k, v in new.state_dict().items())
