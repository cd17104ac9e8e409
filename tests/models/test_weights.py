"""Weights in and out of files: the released format, ours, a bare state dict, and what is amiss."""

import pytest
import torch

from models import create_model
from models.weights import (
    FORMAT,
    describe_network,
    describe_weights,
    load_weights,
    network_from_checkpoint,
    read_ksize,
    strip_prefixes,
)


def build(name="eca_resnet18", **kwargs):
    torch.manual_seed(0)
    return create_model(name, **{"num_classes": 3, **kwargs})


def released(network, arch="se_resnet50"):
    """A file as the authors' training script left it: wrapped names, and an arch that is wrong."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    return {
        "epoch": 100,
        "arch": arch,
        "state_dict": {f"module.{name}": t for name, t in network.state_dict().items()},
        "best_prec1": torch.tensor(77.48),
        "optimizer": optimizer.state_dict(),
    }


def ours(network):
    return {"format": FORMAT, "state_dict": network.state_dict(), **describe_network(network)}


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("eca_resnet18", {"ksize": "3,5,9,11"}),
        ("eca_mobilenetv2", {}),
        ("eca_mobilenetv2", {"ksize": "3333355", "width_mult": 0.5}),
    ],
)
def test_released_files_load_as_they_are(tmp_path, monkeypatch, name, kwargs, zip_format):
    network = build(name, **kwargs)
    # saved on a GPU machine: every tensor in the file says cuda:0
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    path = tmp_path / "released.pth.tar"
    torch.save(released(network), path, _use_new_zipfile_serialization=zip_format)
    monkeypatch.undo()
    assert b"cuda:0" in path.read_bytes()

    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    again = network_from_checkpoint(checkpoint)
    assert describe_network(again) == describe_network(network)
    assert_same_weights(again, network)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet18", {}),
        ("eca_resnet18", {"ksize": "adaptive", "num_classes": 1}),
        ("resnet18", {"attention": "eca_ns", "ksize": "1359"}),
        ("se_resnet18", {}),
        ("resnet18", {"attention": "se_var1"}),
        ("resnet18", {"attention": "se_var2"}),
        ("resnet18", {"attention": "se_var3"}),
        ("eca_mobilenetv2", {"width_mult": 0.3, "ksize": "adaptive"}),
    ],
)
def test_our_files_rebuild_the_network(tmp_path, name, kwargs):
    network = build(name, **kwargs)
    torch.save(ours(network), tmp_path / "last.pth")
    again = network_from_checkpoint(torch.load(tmp_path / "last.pth", weights_only=True))
    assert describe_network(again) == describe_network(network)
    assert_same_weights(again, network)


@pytest.mark.parametrize("kind", ["", "eca_", "se_"])
@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_depth_and_attention_are_read_off_the_shapes(kind, depth):
    with torch.device("meta"):
        network = create_model(f"{kind}resnet{depth}", num_classes=9)
    assert describe_weights(network.state_dict()) == describe_network(network)


@pytest.mark.parametrize("attention", ["eca_ns", "se", "se_var2", "se_var3"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2"])
def test_other_attentions_are_read_off_the_shapes(name, attention):
    with torch.device("meta"):
        network = create_model(name, attention=attention)
    found = describe_weights(network.state_dict())
    assert (found["attention"], found["ksize"]) == (attention, describe_network(network)["ksize"])


@pytest.mark.parametrize("width", [0.1, 0.35, 0.5, 0.7, 1.001, 1.4, 2])
def test_width_is_read_off_the_shapes(width):
    with torch.device("meta"):
        network = create_model("eca_mobilenetv2", width_mult=width)
        found = describe_weights(network.state_dict())
        again = create_model(found["arch"], ksize=found["ksize"], **found["model_kwargs"])
    shapes = [{k: v.shape for k, v in n.state_dict().items()} for n in (network, again)]
    assert shapes[0] == shapes[1]


def test_read_ksize():
    assert read_ksize(build().state_dict()) == (3, 5, 7, 7)
    assert read_ksize(released(build())["state_dict"]) == (3, 5, 7, 7)
    assert read_ksize(build("eca_mobilenetv2").state_dict()) == (1, 3)
    # k = 1 at 96 channels too: not what two numbers can say, so seven are read
    assert read_ksize(build("eca_mobilenetv2", ksize="1111133").state_dict()) == (1,) * 5 + (3, 3)
    assert read_ksize(build("resnet18").state_dict()) is None
    mixed = build().state_dict()
    mixed["layer2.1.eca.conv.weight"] = torch.zeros(1, 1, 9)
    with pytest.raises(ValueError, match=r"kernel sizes \[5, 9\] in one stage \(2\)"):
        read_ksize(mixed)


def test_names_are_the_same_under_wrappers():
    network = build()
    plain = list(network.state_dict())
    assert list(strip_prefixes(torch.nn.DataParallel(network).state_dict())) == plain
    assert list(strip_prefixes(torch.compile(network).state_dict())) == plain
    network.layer1 = torch.compile(network.layer1)
    assert list(strip_prefixes(network.state_dict())) == plain
    assert list(strip_prefixes({"module_a.weight": torch.zeros(1)})) == ["module_a.weight"]
    with pytest.raises(ValueError, match=r"fc\.bias twice, with and without a wrapper's prefix"):
        strip_prefixes({"fc.bias": torch.zeros(1), "module.fc.bias": torch.zeros(1)})


def test_load_weights_says_what_it_did():
    source, network = build(), build()
    torch.nn.init.ones_(source.fc.weight)
    assert load_weights(network, source.state_dict()) == ["Loaded 130 tensors into eca_resnet18."]
    assert_same_weights(network, source)
    notes = load_weights(network, released(source)["state_dict"])
    assert notes[1:] == ["Took the wrappers' prefixes off their names."]


def test_replace_head():
    source, network = build(num_classes=5), build()
    torch.nn.init.ones_(source.conv1.weight)
    fresh = network.fc.weight.clone()
    notes = load_weights(network, source.state_dict(), replace_head=True)
    assert notes == [
        "Loaded 128 tensors into eca_resnet18.",
        "Left fc as initialised: the weights have 5 classes, the network 3.",
    ]
    assert torch.equal(network.fc.weight, fresh)
    assert torch.equal(network.conv1.weight, source.conv1.weight)
    # the same number of classes: the head is loaded
    same = build()
    torch.nn.init.ones_(same.fc.weight)
    assert len(load_weights(network, same.state_dict(), replace_head=True)) == 1
    assert network.fc.weight.eq(1).all()


def test_batch_norms_of_old_files_lack_a_step_counter():
    network = build()
    old = {k: v for k, v in network.state_dict().items() if "num_batches_tracked" not in k}
    assert_same_weights(network_from_checkpoint(old), network)


def without(state_dict, *names):
    return {name: t for name, t in state_dict.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: without(w, "bn1.bias", "fc.bias"),
            "do not fit eca_resnet18: 2 missing: bn1.bias, fc.bias$",
        ),
        (lambda w: {**w, "a": w["fc.bias"]}, "do not fit eca_resnet18: 1 unexpected: a$"),
        (
            lambda w: {**w, "fc.weight": torch.zeros(5, 512), "fc.bias": torch.zeros(5)},
            r"2 of another shape: fc.weight \[5, 512\], not \[3, 512\], fc.bias \[5\], not \[3\]$",
        ),
        (
            lambda w: {**w, "fc.bias": w["fc.bias"].long()},
            r"do not fit eca_resnet18: 1 of whole numbers: fc.bias \(int64\)$",
        ),
        (
            lambda w: build(ksize="3333").state_dict(),
            "sizes 3,3,3,3 and eca_resnet18 was built with 3,5,7,7: give `ksize=3,3,3,3`$",
        ),
    ],
)
def test_weights_that_do_not_fit_change_nothing(change, message):
    network, before = build(), build()
    weights = {name: t + 1 for name, t in network.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(network, change(weights))
    assert_same_weights(network, before)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ([1, 2], "no weights here: .* not a list"),
        ({}, "no weights here: .* not an empty dict"),
        ({"epoch": 3, "loss": 0.5}, "no weights here: .* not a dict of epoch, loss"),
        ({"state_dict": {"fc.weight": [1.0]}}, "no weights here: .* not a dict of state_dict"),
        ({"w": torch.zeros(1)}, "weights of no network known here: w"),
        (
            {"format": FORMAT, "state_dict": {"w": torch.zeros(1)}},
            "lacks arch, attention, ksize, …",
        ),
        ({"format": 99, "state_dict": {"w": torch.zeros(1)}}, "format 99 is not 1: update"),
    ],
)
def test_other_files_are_refused_in_one_line(checkpoint, message):
    with pytest.raises(ValueError, match=message) as caught:
        network_from_checkpoint(checkpoint)
    assert "\n" not in str(caught.value)


def test_a_resnet_of_unknown_depth_is_refused():
    weights = {k: v for k, v in build().state_dict().items() if "layer2.1" not in k}
    with pytest.raises(ValueError, match="no known depth: 2,1,2,2 blocks a stage"):
        network_from_checkpoint(weights)
