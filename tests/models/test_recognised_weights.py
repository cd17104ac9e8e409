"""Weights of another network are answered with what they are and what to type."""

import pytest
import timm
import torch

import models
from models.classifier import ArgumentError
from models.start import first_network
from models.weights import find_state_dict, load_weights


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
