"""Networks that ECA was put into: what is done with them afterwards, and what they are then."""

import copy
import pickle

import pytest
import torch
import torchvision
from torch import nn

import models
from models.insertion import add_eca


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_exports_and_pickles(name):
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, num_classes=7).eval()
    for insertion in add_eca(network, quiet=True):
        nn.init.normal_(network.get_submodule(insertion.name).conv.weight)
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = network(images)
        exported = torch.export.export(network, (images,)).module()
        torch.testing.assert_close(exported(images), expected, rtol=1e-5, atol=1e-6)
        loaded = pickle.loads(pickle.dumps(network))
        torch.testing.assert_close(loaded(images), expected, rtol=0, atol=0)


def test_a_resnet_becomes_our_eca_resnet():
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=7).eval()
    add_eca(network, ksize=3, identity=False, quiet=True)
    ours = models.create_model("eca_resnet18", "3333", num_classes=7).eval()
    ours.load_state_dict({k.replace("bn2.eca", "eca"): v for k, v in network.state_dict().items()})
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(network(images), ours(images), rtol=1e-5, atol=1e-5)


def test_a_mobilenet_becomes_our_eca_mobilenet_name_by_name():
    torch.manual_seed(0)
    network = torchvision.models.mobilenet_v2(num_classes=7).eval()
    add_eca(network, ksize=3, identity=False, quiet=True)
    ours = models.create_model("eca_mobilenetv2", "33", num_classes=7).eval()
    ours.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(network(images), ours(images), rtol=1e-5, atol=1e-5)


def tuned(network, **settings):
    """The network in eval mode, with ECA whose kernels are not zero."""
    torch.manual_seed(0)
    for insertion in add_eca(network, quiet=True, **settings):
        nn.init.normal_(network.get_submodule(insertion.name).conv.weight)
    return network.eval()


def test_batch_norms_are_converted_before_or_after():
    torch.manual_seed(0)
    plain = torchvision.models.resnet18(num_classes=3).eval()
    network = tuned(copy.deepcopy(plain))
    before = tuned(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain)))
    after = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = network(images)
        assert not torch.allclose(plain(images), expected)
        for synced in (before, after):
            assert not any(isinstance(m, nn.BatchNorm2d) for m in synced.modules())
            torch.testing.assert_close(synced(images), expected)
            assert list(synced.state_dict()) == list(network.state_dict())


def test_keys_stay_in_every_way_of_saving_and_loading():
    plain = torchvision.models.resnet18(num_classes=3)
    network = tuned(copy.deepcopy(plain))
    keys = list(network.state_dict())
    assert [key for key in keys if ".eca." not in key] == list(plain.state_dict())
    assert keys.index("layer1.0.bn2.eca.conv.weight") == keys.index("layer1.0.bn2.weight") + 6
    assert {"layer1.0.bn2", "layer1.0.bn2.eca"} <= network.state_dict()._metadata.keys()
    assert not any("without" in key for key in network.state_dict()._metadata)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())

    missing, unexpected = network.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == []
    assert all(".eca." in key for key in missing)
    assert len(missing) == 16
    some = {k: v for k, v in network.state_dict().items() if k != "layer2.0.bn2.weight"}
    with pytest.raises(RuntimeError, match=r"Missing key.*\"layer2.0.bn2.weight\""):
        network.load_state_dict(some)

    given = {key: torch.full_like(value, 3) for key, value in network.state_dict().items()}
    with torch.device("meta"):
        empty = torchvision.models.resnet18(num_classes=3)
        add_eca(empty, quiet=True)
    empty.load_state_dict(given, assign=True)
    assert all(value.eq(3).all() for value in empty.state_dict().values())
    twin = pickle.loads(pickle.dumps(copy.deepcopy(network)))
    twin.load_state_dict(given)
    assert all(value.eq(3).all() for value in twin.state_dict().values())


def test_a_normalisation_is_read_and_set_through_its_place():
    network = tuned(torchvision.models.resnet18(num_classes=3))
    place = network.layer1[0].bn2
    norm = place.without_eca
    assert isinstance(norm, nn.BatchNorm2d)
    assert place.weight is norm.weight
    assert (place.num_features, place.running_mean is norm.running_mean) == (64, True)
    place.momentum, place.weight = 0.25, nn.Parameter(torch.zeros(64))
    assert norm.momentum == 0.25
    assert norm.weight.eq(0).all()
    assert "weight" not in place._parameters
    network.train()
    assert place.training
    assert norm.training
    with pytest.raises(AttributeError, match="odd"):
        _ = place.odd


class Two(nn.Module):
    """Takes two tensors."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x, y, z=None):
        return self.norm(x + y)


def test_what_cannot_have_a_seat_is_refused():
    network = nn.ModuleDict({"two": Two()})
    with pytest.raises(ValueError, match="two takes more than one tensor"):
        add_eca(network, after="two")
    assert [i.name for i in add_eca(network, after="two.norm", quiet=True)] == ["two.norm.eca"]
    with pytest.raises(ValueError, match="cannot stand behind the whole BatchNorm2d"):
        add_eca(nn.BatchNorm2d(4), after=nn.BatchNorm2d)
