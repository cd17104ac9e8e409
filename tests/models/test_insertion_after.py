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
def test_compiles_exports_and_pickles(name):
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, num_classes=7).eval()
    for insertion in add_eca(network, quiet=True):
        nn.init.normal_(network.get_submodule(insertion.name).conv.weight)
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = network(images)
        compiled = torch.compile(network, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), expected, rtol=1e-5, atol=1e-6)
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


def test_batch_norms_are_converted_before_eca_is_put_in():
    torch.manual_seed(0)
    plain = torchvision.models.resnet18(num_classes=3).eval()
    network = copy.deepcopy(plain)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network))
    for each in (network, synced):
        assert len(add_eca(each.eval(), quiet=True)) == 8
        for name, parameter in each.named_parameters():
            if "eca" in name:
                nn.init.ones_(parameter)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert not torch.allclose(plain(x), network(x))
        torch.testing.assert_close(synced(x), network(x))
