"""What our networks offer under timm's names: heads, features, and blocks that are recomputed."""

import copy

import pytest
import torch
from torch import nn

from models import FeatureMaps, create_model
from models.classifier import take_indices, unchanged_statistics
from models.eca_resnet import BasicBlock, ResNet
from models.start import first_network, refuse_another
from models.weights import describe_network, load_weights, network_from_checkpoint

NAMES = ("eca_resnet18", "eca_mobilenetv2")
WIDTHS = {"eca_resnet18": (64, 64, 128, 256, 512), "eca_mobilenetv2": (16, 24, 32, 96, 320)}


def small(name, **kwargs):
    torch.manual_seed(0)
    return create_model(name, **{"num_classes": 7, **kwargs})


@pytest.mark.parametrize("name", [*NAMES, "resnet50", "se_mobilenetv2"])
def test_without_classes_a_network_puts_out_what_its_last_layer_takes(name):
    full, bare = small(name).eval(), small(name, num_classes=0).eval()
    keys = full.state_dict().keys()
    assert keys - bare.state_dict().keys() == {f"{full.head}.weight", f"{full.head}.bias"}
    assert bare.num_classes == 0
    assert type(bare.get_classifier()) is nn.Identity
    note = load_weights(bare, full.state_dict())
    assert note[-1] == f"Left {full.head} out: the network has no last layer."
    images = torch.randn(2, 3, 40, 48)
    with torch.no_grad():
        features = bare(images)
        assert features.shape == (2, full.num_features)
        assert full.num_features == full.head_hidden_size == full.get_classifier().in_features
        assert torch.equal(full.get_classifier()(features), full(images))
        maps = full.forward_features(images)
        assert torch.equal(full.forward_head(maps, pre_logits=True), features)
        assert torch.equal(full.forward_head(maps), full(images))


@pytest.mark.parametrize("name", NAMES)
def test_another_last_layer(name):
    network = small(name).double().eval()
    body = copy.deepcopy(network.state_dict())
    network.reset_classifier(3)
    layer = network.get_classifier()
    assert (layer.out_features, layer.weight.dtype, layer.training) == (3, torch.float64, False)
    images = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    assert network(images).shape == (2, 3)
    again = network_from_checkpoint(
        {**describe_network(network), "format": 1, "state_dict": network.float().state_dict()}
    )
    assert again.num_classes == 3
    network.reset_classifier(0, "")
    assert network(images.float()).shape == (2, network.num_features, 2, 2)
    assert all(torch.equal(v, body[k].to(v.dtype)) for k, v in network.state_dict().items())
    network.reset_classifier(2, "avg")
    assert network(images.float()).shape == (2, 2)
    for wrong, message in [
        ((5, ""), "5 classes need pooled features"),
        ((5, "max"), "global_pool 'max' is not known"),
        ((-1,), "num_classes must be 1 or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            network.reset_classifier(*wrong)
        assert network(images.float()).shape == (2, 2)


@pytest.mark.parametrize("name", NAMES)
def test_feature_maps_are_those_of_the_modules_named(name):
    network = small(name).eval()
    images = torch.randn(1, 3, 64, 96)
    seen = {}
    for module in network.feature_info.module_name():
        hook = lambda m, i, out, module=module: seen.update({module: out.clone()})  # noqa: E731
        network.get_submodule(module).register_forward_hook(hook)
    with torch.no_grad():
        last, maps = network.forward_intermediates(images)
        assert torch.equal(last, network.forward_features(images))
        assert [m.shape[1] for m in maps] == network.feature_info.channels() == [*WIDTHS[name]]
        assert [96 // m.shape[3] for m in maps] == network.feature_info.reduction()
        for one, other in zip(maps, seen.values(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        for choice in (2, [3, 4], (-2, -1), [4, 3]):
            some = network.forward_intermediates(images, choice, intermediates_only=True)
            assert all(map(torch.equal, some, maps[3:]))
            only = create_model(name, features_only=True, out_indices=choice).eval()
            assert only.feature_info.channels() == [*WIDTHS[name][3:]]
            load_weights(only.network, network.state_dict())
            assert all(map(torch.equal, only(images), maps[3:]))
    for wrong in ([5], [-6], 6, 0, []):
        with pytest.raises(ValueError, match=r"feature maps .* use some of 0 to 4"):
            take_indices(wrong, 5)
    with pytest.raises(ValueError, match="output_fmt 'NHWC'"):
        network.forward_intermediates(images, output_fmt="NHWC")


def test_nothing_is_computed_beyond_the_last_map_wanted():
    only = create_model("eca_resnet18", features_only=True, out_indices=(0, 2)).eval()
    calls = []
    for name in ("layer1", "layer2", "layer3", "layer4", "fc"):
        only.network.get_submodule(name).register_forward_hook(lambda m, i, o: calls.append(m))
    only(torch.randn(1, 3, 32, 32))
    assert calls == [only.network.layer1, only.network.layer2]
    assert isinstance(only, FeatureMaps)


@pytest.mark.parametrize("name", NAMES)
def test_recomputed_blocks_change_no_bit(name):
    """Two steps: weights, running statistics and the numbers of batches, dropout's masks too."""
    plain = small(name)
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    kept = {}
    for step in range(2):
        images = torch.randn(4, 3, 32, 32)
        for network in (plain, saving):
            torch.manual_seed(step)
            kept[network] = 0

            def count(tensor, network=network):
                kept[network] += tensor.numel()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
                loss = network(images).square().sum()
            loss.backward()
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.sub_(1e-3 * parameter.grad)
                    parameter.grad = None
    own = saving.state_dict()
    assert all(torch.equal(own[key], value) for key, value in plain.state_dict().items())
    assert {own[key].item() for key in own if key.endswith("num_batches_tracked")} == {2}
    assert kept[saving] < kept[plain] / 3

    saving.set_grad_checkpointing(False)
    assert not any(getattr(m, "grad_checkpointing", False) for m in saving.modules())


@pytest.mark.slow
def test_recomputed_blocks_compile():
    images = torch.randn(2, 3, 32, 32)
    torch.manual_seed(0)
    networks = [ResNet(BasicBlock, (1, 1, 1, 1), ksize="3333", num_classes=5)]
    networks.append(copy.deepcopy(networks[0]))
    networks[1].set_grad_checkpointing()
    for network in networks:
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
        compiled(images).square().sum().backward()
        torch.compiler.reset()
    for one, other in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    for one, other in zip(networks[0].buffers(), networks[1].buffers(), strict=True):
        assert torch.equal(one, other)


def test_statistics_come_back_after_an_error():
    norm = nn.BatchNorm2d(2)
    own = norm.running_mean
    with pytest.raises(ValueError, match="expected 4D"), unchanged_statistics(norm):
        norm(norm(torch.randn(4, 2, 3, 3))[0])
    assert norm.running_mean is own
    assert own.eq(0).all()


def test_a_run_needs_classes():
    with pytest.raises(ValueError, match="`num_classes=0`: a run trains a last layer"):
        first_network("eca_resnet18", num_classes=0, names=None)
    held = {**describe_network(small("eca_resnet18")), "format": 1, "state_dict": {}}
    with pytest.raises(ValueError, match="leave `num_classes=0` out"):
        refuse_another(held, "best.pth", num_classes=0)
