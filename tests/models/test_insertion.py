"""ECA in other people's networks: where it goes, what stays, and that it can be trained."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from models.eca_module import ECALayer
from models.insertion import SQUEEZES, InsertedECA, _is_known, add_eca

timm = pytest.importorskip("timm")
NETWORKS = pytest.importorskip("helpers.foreign_networks").NETWORKS


def trained_looking(network):
    """`network` with scales that are not zero or tiny: some start so, to silence the branches."""
    for parameter in network.parameters():
        if parameter.squeeze().dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return network.eval()


def without_squeezes(network):
    """The network with an identity wherever it had squeeze-and-excitation."""
    bare = copy.deepcopy(network)
    for name, module in list(bare.named_modules()):
        if type(module).__name__ in SQUEEZES:
            parent, _, own = name.rpartition(".")
            setattr(bare.get_submodule(parent), own, nn.Identity())
    return bare


@torch.no_grad()
def compile_each_kind(network, done, images):
    """Compiles one block of each kind that has ECA: a whole network would take seconds."""
    blocks = {}
    for insertion in done:
        path = insertion.name.split(".")
        above = [".".join(path[:i]) for i in range(len(path), 0, -1)]
        name = next(name for name in above if _is_known(network.get_submodule(name)))
        block = network.get_submodule(name)
        blocks.setdefault((type(block), insertion.name[len(name) :]), block)
    seen = {}
    for block in blocks.values():
        block.register_forward_pre_hook(lambda m, inputs: seen.update({m: inputs[0].clone()}))
    network(images)
    for block in blocks.values():
        block._forward_pre_hooks.clear()
        expected = block(seen[block].clone())
        compiled = torch.compile(block, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(seen[block]), expected, rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


# One of each kind of block; the others are looked at with the slow tests.
QUICK = ("resnet18", "regnet_y_400mf", "mobilenet_v2", "mobilenet_v3_small", "convnext_tiny")
QUICK = (*(f"torchvision {name}" for name in QUICK), "timm resnet10t", "timm seresnet18")
QUICK += ("timm tf_efficientnetv2_b0", "timm convnext_atto")
ALL = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NETWORKS]


@pytest.mark.parametrize("name", ALL)
def test_on(name):
    build, layers, squeezes = NETWORKS[name]
    torch.manual_seed(0)
    network = trained_looking(build())
    before = copy.deepcopy(network.state_dict())
    images = torch.randn(2, 3, 40, 48)
    with torch.no_grad():
        expected = without_squeezes(network)(images)

    done = add_eca(network, replace_se=True, quiet=True)
    assert len(done) == layers
    assert sum("in place of" in insertion.place for insertion in done) == squeezes
    assert not any(type(m).__name__ in SQUEEZES for m in network.modules())
    with torch.no_grad():
        torch.testing.assert_close(network(images), expected, rtol=0, atol=0)

    # Every name and value that was there is there, but for those of squeeze-and-excitation.
    after = network.state_dict()
    replaced = tuple(insertion.name + "." for insertion in done if "place of" in insertion.place)
    kept = {k: v for k, v in before.items() if not k.startswith(replaced)}
    assert all(torch.equal(after[key], value) for key, value in kept.items())
    new = {f"{insertion.name}.{key}" for insertion in done for key in ("conv.weight", "gain")}
    assert after.keys() - kept.keys() == new

    # A second call finds nothing to do, whatever it is asked to do with squeeze-and-excitation.
    assert add_eca(network, quiet=True) == add_eca(network, replace_se=True, quiet=True) == []
    assert network.state_dict().keys() == after.keys()

    # Gradients reach every kernel, and one step changes the output.
    network.train()(images).square().sum().backward()
    for insertion in done:
        weight = network.get_submodule(insertion.name).conv.weight
        assert weight.shape == (1, 1, insertion.kernel_size)
        assert weight.grad.isfinite().all()
        assert (weight.grad != 0).all(), insertion
        weight.data.sub_(weight.grad.sign())
    network.eval()
    with torch.no_grad():
        out = network(images)
        assert (out - expected).abs().max() > 1e-3 * expected.abs().max()

        # What was trained goes into a new network of the same make, and into a copy.
        again = build()
        add_eca(again, replace_se=True, quiet=True)
        again.load_state_dict(network.state_dict())
        torch.testing.assert_close(again.eval()(images), out, rtol=0, atol=0)
        twin = copy.deepcopy(network)
        for insertion in done:
            nn.init.zeros_(network.get_submodule(insertion.name).conv.weight)
        torch.testing.assert_close(twin(images), out, rtol=0, atol=0)
    compile_each_kind(twin, done, images)


DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "ECA_ANYWHERE.md"
ROW = re.compile(r"\| ((?:torchvision|timm) `.*?) \| (\d+) \| (.*?) \| ([\d,]+) \| ([\d,]+) \|")
ROWS = ROW.findall(DOCUMENT.read_text())


def test_the_table_of_the_document_is_read():
    assert len(ROWS) >= 11


@pytest.mark.parametrize(
    ("library", "name", "row"),
    [(*pair, row) for row in ROWS for pair in re.findall(r"(torchvision|timm) `(\w+)`", row[0])],
)
def test_the_table_of_the_document(library, name, row):
    _, layers, place, before, after = row
    build = torchvision.models.get_model if library == "torchvision" else timm.create_model
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # RegNet computes its widths
        network = build(name)
    assert sum(p.numel() for p in network.parameters()) == int(before.replace(",", ""))
    done = add_eca(network, replace_se=True, quiet=True)
    assert len(done) == int(layers)
    assert sum(p.numel() for p in network.parameters()) == int(after.replace(",", ""))
    instead = re.match(r"(\d*) ?in place of", place)
    squeezes = int(instead[1] or layers) if instead else 0
    assert sum("in place of" in insertion.place for insertion in done) == squeezes


# Further kinds of networks in torchvision; layers, or 0 where a line refuses it.
KINDS = {
    "densenet121": 0,
    "mnasnet0_5": 16,
    "shufflenet_v2_x0_5": 0,  # its blocks are called residual, and concatenate
    "swin_t": 0,
    "vgg11_bn": 0,
    "vit_b_16": 0,
    "efficientnet_v2_s": 40,
    "mc3_18": 8,
    "r2plus1d_18": 8,
    "r3d_18": 8,
    "s3d": 0,
    "deeplabv3_resnet50": 16,
    "lraspp_mobilenet_v3_large": 15,
}
VIDEO = ("mc3_18", "r2plus1d_18", "r3d_18")


@pytest.mark.parametrize("name", KINDS)
def test_what_is_put_in_runs_and_the_rest_is_refused(name):
    backbone = {"weights_backbone": None} if name.startswith(("deeplab", "fcn", "lraspp")) else {}
    with torch.device("meta"):
        network = torchvision.models.get_model(name, weights=None, **backbone).eval()
        images = torch.empty(2, 3, *((4, 32, 32) if name in VIDEO else (64, 64)))
    if not KINDS[name]:
        with pytest.raises(ValueError, match=r"^[^\n]*ECA[^\n]*give the type of the blocks[^\n]*$"):
            add_eca(network, quiet=True)
        return
    assert len(add_eca(network, quiet=True)) == KINDS[name]
    network(images)


@pytest.mark.parametrize("name", VIDEO)
def test_a_video_s_channels_are_attended(name):
    """Gates from means over time and both axes of the image, by the layer that takes any rank."""
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, num_classes=5).eval()
    clips = torch.randn(2, 3, 4, 16, 16)
    with torch.no_grad():
        expected = network(clips)
        done = add_eca(network, quiet=True)
        torch.testing.assert_close(network(clips), expected, rtol=0, atol=0)
        layer = network.get_submodule(done[0].name)
        nn.init.normal_(layer.conv.weight)
        plain = ECALayer(3)
        plain.conv = layer.conv
        x = torch.randn(2, 64, 3, 4, 5)
        torch.testing.assert_close(layer(x), 2 * plain(x))
        assert not torch.allclose(network(clips), expected)
        torch.testing.assert_close(torch.fx.symbolic_trace(network)(clips), network(clips))
    assert network.load_state_dict(network.state_dict()).missing_keys == []
    with pytest.raises(
        ValueError, match=r"\(N, 64, T, H, W\) was expected and \(2, 64, 4, 5\) came"
    ):
        layer(x[:, :, 0])


def test_the_axes_are_read_where_the_normalisation_does_not_tell_them():
    for axes, conv in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1):
        network = nn.Sequential(conv(3, 8, 1), nn.GroupNorm(2, 8), conv(8, 8, 1))
        (insertion,) = add_eca(network, after="1", quiet=True)
        assert network.get_submodule(insertion.name).axes == axes
        network(torch.randn(2, 3, *[4] * axes))
    mixed = nn.ModuleDict({"eca": ECALayer(3), "norm": nn.GroupNorm(2, 8)})
    (insertion,) = add_eca(mixed, after="norm", quiet=True)
    assert mixed.get_submodule(insertion.name).axes == 2  # not that of ECA's own convolution


@pytest.mark.parametrize("name", [name for name, (_, _, squeezes) in NETWORKS.items() if squeezes])
def test_by_default_squeeze_and_excitation_stays(name):
    """With its trained weights."""
    torch.manual_seed(0)
    network = trained_looking(NETWORKS[name][0]())
    before = copy.deepcopy(network.state_dict())
    images = torch.randn(2, 3, 40, 48)
    with torch.no_grad():
        expected = network(images)
        done = add_eca(network, quiet=True)
        torch.testing.assert_close(network(images), expected, rtol=0, atol=0)
    after = network.state_dict()
    assert done
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_replaced_attentions_are_counted_and_said(capsys):
    network = torchvision.models.mobilenet_v3_small()
    add_eca(network, replace_se=True)
    assert "! 9 squeeze-and-excitation layers were replaced" in capsys.readouterr().out
    add_eca(torchvision.models.mobilenet_v3_small())
    assert "!" not in capsys.readouterr().out


def test_convnext_is_attended_in_the_layout_of_the_addition():
    torch.manual_seed(0)
    block = torchvision.models.convnext_tiny().features[1][0].eval()
    branch = copy.deepcopy(block.block)
    holder = nn.ModuleDict({"only": block})
    (insertion,) = add_eca(holder, quiet=True)
    layer = holder.get_submodule(insertion.name)
    nn.init.normal_(layer.conv.weight)
    plain = ECALayer(layer.conv.kernel_size[0])
    plain.conv = layer.conv
    x = torch.randn(2, 96, 9, 7)
    expected = x + block.layer_scale * 2 * plain(branch(x))
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-6)

    block = timm.create_model("convnext_atto", drop_path_rate=0.5).stages[1].blocks[1]
    (insertion,) = add_eca(nn.ModuleDict({"only": block}), quiet=True)
    assert list(dict(block.drop_path.named_children())) == ["eca", "drop"]


def test_places_by_name_and_by_type(capsys):
    torch.manual_seed(0)
    network = torchvision.models.resnet18().double().eval()
    done = add_eca(network, after="layer[34].*.bn2", ksize=7)
    assert [insertion.name for insertion in done] == [
        "layer3.0.bn2.eca",
        "layer3.1.bn2.eca",
        "layer4.0.bn2.eca",
        "layer4.1.bn2.eca",
    ]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ResNet: 4 ECA layers put in, 28 parameters"
    assert lines[-1] == "  ECA k=7 on 512 channels after layer4.1.bn2"
    assert network.layer4[1].bn2.eca.conv.weight.dtype == torch.float64
    assert not network.layer4[1].bn2.eca.training
    assert add_eca(network, after="layer[34].*.bn2", quiet=True) == []
    # The others are still without; of the insides of an ECA layer none counts as a place.
    block = torchvision.models.resnet.BasicBlock
    assert len(add_eca(network, after=block, quiet=True)) == 4
    assert add_eca(network, after="layer*.*.bn2.*", quiet=True) == []

    mobile = torchvision.models.mobilenet_v2()
    assert len(add_eca(mobile, after="features.*.conv.3", quiet=True)) == 16
    assert len(add_eca(mobile, after="features.*.conv.3", quiet=True)) == 0


def test_weights_with_a_gain_are_not_taken_for_plain_ones():
    plain, gained = ECALayer(3), InsertedECA(8, 3)
    with pytest.raises(RuntimeError, match="gain"):
        plain.load_state_dict(gained.state_dict())
    with pytest.raises(RuntimeError, match="gain"):
        gained.load_state_dict(plain.state_dict())
    assert InsertedECA(8, 3, identity=False).state_dict().keys() == plain.state_dict().keys()


class PreAct(nn.Sequential):
    """A block that does not end with its normalisation."""


def test_refuses_in_one_line_and_changes_nothing():
    network = nn.ModuleDict(
        {
            "stem": nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)),
            "act": nn.ReLU(),
            "block": PreAct(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)),
            "bare": nn.Sequential(nn.ReLU()),
        }
    )
    keys = list(network.state_dict())
    for wrong, message in [
        ({}, "found no place for ECA in ModuleDict"),
        ({"after": "stem.bn*"}, "found no place"),
        ({"after": (nn.Sequential, PreAct)}, "block .PreAct. does not end with its normalisation"),
        ({"after": nn.ReLU}, "has no normalisation"),
        ({"after": "a*"}, "cannot tell how many channels act puts out"),
        ({"after": [nn.ReLU]}, "neither a name nor a type"),
        ({"after": "stem.1", "ksize": 4}, "odd positive integer"),
        ({"after": "stem.1", "ksize": "3"}, "odd positive integer"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            add_eca(network, **wrong)
        assert "\n" not in str(error.value)
    assert list(network.state_dict()) == keys

    # A layout with the channels last is known only when it comes.
    block = torchvision.models.convnext_tiny().features[1][0]
    add_eca(block, after="block.2", quiet=True)
    with pytest.raises(ValueError, match=r"\(N, 96, H, W\) was expected and \(1, 8, 8, 96\) came"):
        block(torch.randn(1, 96, 8, 8))
