"""Weights of another network are answered with what they are and what to type."""

import pytest
import timm
import torch
import torchvision

import models
from models.classifier import ArgumentError
from models.start import first_network
from models.weights import describe_weights, find_state_dict, load_weights

OF_TIMM = (
    "ecaresnet26t ecaresnet50d ecaresnet101d ecaresnetlight seresnet50 resnet18d resnet50d "
    "seresnext50_32x4d mobilenetv3_large_100 mobilenetv3_small_100 efficientnet_b0 "
    "efficientnetv2_s"
)
OF_TORCHVISION = (
    "resnext50_32x4d resnext101_64x4d wide_resnet50_2 mobilenet_v3_large mobilenet_v3_small "
    "efficientnet_b1 efficientnet_b2 efficientnet_v2_m"
)
CASES = [("timm", timm.create_model, n) for n in OF_TIMM.split()]
CASES += [("torchvision", torchvision.models.get_model, n) for n in OF_TORCHVISION.split()]


@pytest.mark.parametrize(("library", "create", "name"), CASES)
def test_a_library_s_network_is_named(library, create, name):
    with torch.device("meta"):
        weights = find_state_dict(create(name).state_dict())
        network = models.create_model("eca_resnet50")
    said = (
        f"those of {library}'s {name}, which create_model and main.py -a build as {library}:{name}"
    )
    with pytest.raises(ValueError, match=f"do not fit eca_resnet50: they are {said}$"):
        load_weights(network, weights, replace_head=True, add_attention=True)
    if "resne" not in name:
        with pytest.raises(ValueError, match=f"weights of no network known here: {said}$"):
            describe_weights(weights)


@pytest.mark.parametrize(
    ("own", "other", "arch"),
    [
        ("resnet34", "eca_resnet50", "eca_resnet34"),
        ("eca_resnet34", "resnet50", "eca_resnet34"),
        ("mobilenetv2", "resnet50", "mobilenetv2"),
        ("se_resnet18", "eca_resnet50", "se_resnet18"),
    ],
)
def test_another_network_of_ours_is_named(own, other, arch):
    with torch.device("meta"):
        weights = models.create_model(own, num_classes=7).state_dict()
        with pytest.raises(ArgumentError, match=f"they are {arch}'s: give `arch={arch}`") as caught:
            first_network(other, 7, pretrained=weights, file="w.pth")
        assert caught.value.arguments == {"arch": arch}
        first_network(arch, 7, pretrained=weights, file="w.pth")  # what it says works


def test_what_is_of_no_known_network_is_counted():
    with torch.device("meta"):
        network = models.create_model("resnet50")
        weights = {**network.state_dict(), "more.weight": torch.empty(1)}
        pruned = timm.create_model("ecaresnet50d_pruned").state_dict()
    with pytest.raises(ValueError, match=r"1 unexpected: more\.weight"):
        load_weights(network, weights)
    with pytest.raises(ValueError, match=r"do not fit resnet50: .* missing: conv1\.weight"):
        load_weights(network, find_state_dict(pruned))
