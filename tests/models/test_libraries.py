"""Networks of timm and torchvision by name: built, saved and rebuilt, or refused in one line."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models import efficientnet_b0

import models
from models import weights
from models.registry import check_forward, image_settings
from models.start import first_network

SMALL = ("timm:test_resnet.r160_in1k", "torchvision:resnet18")
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def saved(network: nn.Module) -> dict:
    return {"format": 1, **weights.describe_network(network), "state_dict": network.state_dict()}


@pytest.mark.parametrize("arch", SMALL)
@pytest.mark.parametrize("attention", ["none", "eca", "timm:gc"])
def test_a_network_is_rebuilt_from_plain_values(arch, attention):
    network = models.create_model(arch, num_classes=7, attention=attention).eval()
    for parameter in network.parameters():  # also the kernels of zeros
        parameter.data.add_(0.01 * torch.randn_like(parameter))
    fields = saved(network)
    again = weights.network_from_checkpoint(copy.deepcopy(fields)).eval()
    assert torch.equal(again(X), network(X))
    assert saved(again).keys() == fields.keys()
    assert weights.describe_network(again) == weights.describe_network(network)
    kinds = (str, int, list, dict, type(None))
    assert all(isinstance(v, kinds) for k, v in fields.items() if k != "state_dict")


def test_without_attention_it_is_the_librarys_own():
    torch.manual_seed(0)
    ours = models.create_model("torchvision:resnet18", num_classes=7).eval()
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=7).eval()
    assert torch.equal(ours(X), theirs(X))
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("arch", SMALL)
def test_eca_starts_as_the_plain_network_unless_told(arch):
    plain = models.create_model(arch, num_classes=7).eval()
    for parameter in plain.parameters():  # timm's branches begin with a BatchNorm of weight 0
        parameter.data.add_(0.01)
    for identity in (None, False):
        told = first_network(arch, 7, attention="eca", identity_start=identity)[0].eval()
        told.load_state_dict(plain.state_dict(), strict=False)
        assert torch.equal(told(X), plain(X)) == (identity is None)


def test_weights_of_other_classes_leave_the_last_layer_new():
    theirs = timm.create_model("mobilenetv2_035", num_classes=5)
    network, notes = first_network(
        "timm:mobilenetv2_035", 7, attention="eca", pretrained=theirs.state_dict(), file="w.pth"
    )
    own, old = network.state_dict(), theirs.state_dict()
    same = [name for name in old if torch.equal(own[name], old[name])]
    assert set(old) - set(same) == {"classifier.weight", "classifier.bias"}
    assert network.head_names == ("classifier.weight", "classifier.bias")
    assert "the weights have 5 classes, the network 7" in "".join(notes)


def test_the_configuration_is_the_librarys():
    config = timm.data.resolve_data_config({}, model=timm.create_model("test_resnet.r160_in1k"))
    found = image_settings("timm:test_resnet.r160_in1k")
    assert found["img_size"] == config["input_size"][-1] == 160
    for name in ("crop_pct", "interpolation", "mean", "std"):
        assert found[name] == config[name]
    preset = torchvision.models.ResNet50_Weights.DEFAULT.transforms()
    found = image_settings("torchvision:resnet50")
    assert round(found["img_size"] / found["crop_pct"]) == preset.resize_size[0] == 232
    assert found["img_size"] == preset.crop_size[0]


@pytest.mark.parametrize(
    ("arch", "arguments", "message"),
    [
        ("timm:resnet81", {}, "timm has no classifier 'resnet81'; did you mean timm:resnet"),
        ("torchvision:fcn_resnet50", {}, "torchvision has no classifier 'fcn_resnet50'"),
        ("torchvision:vgg11", {"attention": "eca"}, "vgg11: found no place for ECA in VGG"),
        ("torchvision:resnet18", {"ksize": 3}, "without attention has no ECA layer"),
        ("timm:resnet18", {"ksize": 3, "attention": "se"}, "with se has no ECA layer"),
        ("timm:resnet18", {"ksize": 3557, "attention": "eca"}, "give one odd number for all"),
        ("torchvision:resnet18", {"identity": True}, "`identity_start=True` is for eca"),
        ("torchvision:resnet18", {"arguments": {"a": 1}}, "cannot be built: .* argument 'a'"),
        ("timm:resnet18", {"arguments": {"checkpoint_path": "x"}}, "leave checkpoint_path out"),
        ("torchvision:resnet18", {"num_classes": 0}, "with 1 class or more"),
        ("timm:ecaresnet26t", {"attention": "eca"}, "has eca already"),
    ],
)
def test_refuses_in_one_line(arch, arguments, message):
    with pytest.raises(ValueError, match=message) as error, torch.device("meta"):
        models.create_model(arch, **arguments)
    assert "\n" not in str(error.value)


def test_says_when_the_library_builds_other_shapes_now():
    fields = saved(models.create_model("torchvision:resnet18", num_classes=7))
    fields["model_kwargs"] = {**fields["model_kwargs"], "version": "0.1"}
    fields["state_dict"]["layer1.0.conv1.weight"] = torch.zeros(3, 3, 3, 3)
    with pytest.raises(ValueError, match=r"1 of another shape.*saved by version 0\.1; .*installed"):
        weights.network_from_checkpoint(fields)


def test_an_image_size_that_the_network_does_not_take_is_refused():
    with torch.device("meta"):
        network = models.create_model("timm:vit_tiny_patch16_224", num_classes=7)
        check_forward(network, [224])
        with pytest.raises(ValueError, match="vit_tiny_patch16_224 fails with images of 64 pixel"):
            check_forward(network, [224, 64])


def test_what_is_frozen_stays_so_in_a_copy():
    network = models.create_model("torchvision:resnet18", num_classes=7, attention="eca")
    models.freeze(network, "backbone")
    network = copy.deepcopy(network).train()
    before = copy.deepcopy(network.state_dict())
    network(X).sum().backward()
    trained = {name for name, p in network.named_parameters() if p.grad is not None}
    assert trained == set(network.head_names) == {"fc.weight", "fc.bias"}
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with pytest.raises(ValueError, match="stages:1 is for our networks"):
        models.freeze(network, "stages:1")
    with pytest.raises(ValueError, match="is for our networks"):
        models.layer_scales(network, 0.5)


@pytest.mark.parametrize(
    ("arch", "reference"),
    [
        ("timm:test_convnext", lambda: timm.create_model("test_convnext", drop_path_rate=0.3)),
        ("torchvision:efficientnet_b0", lambda: efficientnet_b0(stochastic_depth_prob=0.3)),
    ],
)
def test_stochastic_depth_is_the_librarys_own(arch, reference):
    def rates(network):
        return [getattr(m, "drop_prob", getattr(m, "p", None)) for m in network.modules()]

    network, _ = first_network(arch, 7, attention="none", drop_path=0.3)
    assert rates(network) == rates(reference())
    assert rates(network) != rates(models.create_model(arch, num_classes=7))
    again = weights.network_from_checkpoint(saved(network))
    assert rates(again) == rates(network)
    models.set_drop_path(again, 0.3)  # as a run goes on
    with pytest.raises(ValueError, match=r"was built with 0\.3, which stays"):
        models.set_drop_path(again, 0.2)
