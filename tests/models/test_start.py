"""What a run begins with: kernel sizes of weights, what does not fit, other classes."""

import pytest
import torch

from models import create_model
from models.start import first_network, refuse_another
from models.weights import describe_network


def held(name, ksize=None, classes=3, ours=False, **kwargs):
    """A file's contents, on `meta`."""
    with torch.device("meta"):
        network = create_model(name, ksize, classes, **kwargs)
    state = {"state_dict": network.state_dict()}
    if ours:
        names = [f"class {i}" for i in range(classes)]
        return {"format": 1, **describe_network(network), "classes": names, **state}
    return state


def first(arch, pretrained, ksize=None, names=None, **kwargs):
    with torch.device("meta"):
        return first_network(
            arch, 3, ksize, pretrained=pretrained, file="w.pth", names=names, **kwargs
        )


def test_kernel_sizes_are_the_weights_unless_others_are_given():
    weights = held("eca_resnet18", "3333")
    network, notes = first("eca_resnet18", weights)
    assert network.ksize == (3, 3, 3, 3)
    assert notes == ["pretrained: w.pth", "  Loaded 130 tensors into eca_resnet18."]
    with pytest.raises(ValueError, match=r"^w\.pth: .* give `ksize=3,3,3,3`$"):
        first("eca_resnet18", weights, "3557")
    assert first("eca_mobilenetv2", held("eca_mobilenetv2", "33"))[0].ksize == (3, 3)
    plain, notes = first_network("resnet18", 3)
    with pytest.raises(ValueError, match="`num_classes=2`: the data has 3 classes"):
        first_network("resnet18", 2, names="abc")
    assert (plain.ksize, notes) == (None, [])


@pytest.mark.parametrize(
    ("arch", "weights"),
    [
        ("se_resnet18", "eca_resnet18"),
        ("eca_mobilenetv2", "eca_resnet18"),
        ("eca_resnet18", "eca_mobilenetv2"),
        ("eca_resnet18", "se_resnet18"),
        ("eca_resnet18", "resnet34"),
    ],
)
def test_weights_of_another_network_are_named_and_nothing_else(arch, weights):
    """Not a --ksize that nobody gave."""
    with pytest.raises(ValueError, match=rf"^w\.pth: the weights do not fit {arch}: ") as caught:
        first(arch, held(weights))
    assert "ksize" not in str(caught.value)


def test_a_bad_ksize_is_not_the_files_fault():
    with pytest.raises(ValueError, match=r"^resnet18 .*: leave `ksize=3557` out$"):
        first("resnet18", held("resnet18"), "3557")
    with pytest.raises(ValueError, match=r"^w\.pth: no weights here"):
        first("resnet18", {"epoch": 3})


def test_the_last_layer_is_new_where_the_classes_are_others():
    ours = held("resnet18", ours=True)
    assert len(first("resnet18", ours, names=ours["classes"])[1]) == 2
    assert "have other names" in first("resnet18", ours, names=["x", "y", "z"])[1][2]
    assert "have 5 classes, the network 3" in first("resnet18", held("resnet18", classes=5))[1][2]
    assert len(first("resnet18", ours)[1]) == 2  # the data's names are not known yet


def test_what_is_asked_for_is_compared_with_what_is_held():
    for file in (held("eca_resnet18", "3333"), held("eca_resnet18", "3333", ours=True)):
        refuse_another(file, "w.pth")
        refuse_another(file, "w.pth", "eca_resnet18", "3333", "eca", 3)
        with pytest.raises(
            ValueError,
            match=r"^w\.pth holds eca_resnet18, ksize \[3, 3, 3, 3\], "
            "3 classes: leave `ksize=3577`, `num_classes=4` out",
        ):
            refuse_another(file, "w.pth", ksize="3577", num_classes=4)
    detector = {"format": 1, "arch": "mask_rcnn", "state_dict": {}}
    with pytest.raises(ValueError, match=r"w\.pth holds mask_rcnn, which is not for this script"):
        refuse_another(detector, "w.pth")
