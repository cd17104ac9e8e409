"""Networks rebuilt for inference against the networks they stand for."""

import copy
import functools
import subprocess
import sys

import pytest
import torch
from torch import nn

import models
from models import inference
from models.eca_resnet import BasicBlock, Bottleneck, ResNet
from models.inference import InferenceBlock, fastest_dtype, optimise_for_inference

NETWORKS = (
    "eca_resnet18",
    "eca_resnet50",
    "resnet18",
    "resnet50",
    "se_resnet18",
    "eca_mobilenetv2",
    "mobilenetv2",
    "se_mobilenetv2",
)


def make_network(name, **kwargs):
    """A network whose BatchNorms have something to fold."""
    torch.manual_seed(0)
    return with_statistics(models.create_model(name, num_classes=7, **kwargs))


def with_statistics(network):
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2)
    return network.eval()


def apart(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", NETWORKS)
def test_computes_the_same_in_single_precision(name):
    network = make_network(name)
    optimised = optimise_for_inference(network, torch.float32)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in optimised.modules())
    for shape in ((2, 3, 64, 64), (1, 3, 75, 50)):
        x = torch.randn(shape)
        with torch.no_grad():
            expected = network(x)
        found = optimised(x)
        assert found.dtype == torch.float32
        assert not found.requires_grad
        assert apart(found, expected) <= 1e-5


@pytest.mark.parametrize("attention", ["eca_ns", "se_var2"])
def test_other_attentions_are_called_as_they_are(attention):
    ksize = "3333" if attention == "eca_ns" else None
    network = make_network("eca_resnet18", attention=attention, ksize=ksize)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert apart(optimise_for_inference(network, torch.float32)(x), network(x)) <= 1e-5


def test_bfloat16_is_near():
    network = make_network("eca_resnet50")
    x = torch.randn(2, 3, 64, 64)
    optimised = optimise_for_inference(network, torch.bfloat16)
    assert {p.dtype for p in optimised.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert apart(optimised(x), network(x)) <= 0.03


def test_gate_first_and_gate_last_agree(monkeypatch):
    optimised = optimise_for_inference(make_network("eca_resnet50"), torch.float32)
    x = torch.randn(2, 3, 64, 64)
    found = []
    for first in (False, True):
        monkeypatch.setattr(InferenceBlock, "_pools_input", lambda *_, first=first: first)
        found.append(optimised(x))
    assert apart(*found) <= 2e-6


def test_the_gate_comes_first_only_where_that_reads_less():
    optimised = optimise_for_inference(make_network("eca_resnet50"), torch.float32).network
    blocks = [optimised.layer1[0], optimised.layer4[1]]
    for batch, chosen in ((1, [True, False]), (64, [True, True])):
        found = []
        for block, side in zip(blocks, (56, 7), strict=True):
            h, z = (torch.empty(batch, c, side, side) for c in block.last.weight.shape[1::-1])
            found.append(block._pools_input(h, z))
        assert found == chosen


def test_the_original_stays_as_it_was():
    network = make_network("eca_resnet18").train()
    before = copy.deepcopy(network.state_dict())
    optimised = optimise_for_inference(network, torch.float32)
    optimised(torch.randn(2, 3, 32, 32))
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    assert network.layer1[0].conv1.weight.is_contiguous()
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    assert optimised.network.arch == "eca_resnet18"


def test_the_input_is_left_alone():
    optimised = optimise_for_inference(make_network("eca_resnet18"), torch.float32)
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    first = optimised(x)
    assert torch.equal(x, before)
    assert torch.equal(optimised(x), first)


def test_dropout_stays_off():
    optimised = optimise_for_inference(make_network("eca_mobilenetv2"), torch.float32).train()
    x = torch.randn(2, 3, 32, 32)
    assert not any(module.training for module in optimised.modules())
    assert torch.equal(optimised(x), optimised(x))


def test_compiles_into_one_graph_of_constants(monkeypatch):
    """Captured whole; what inductor makes of it is not tested here, as that takes a minute."""
    torch.compiler.reset()  # sizes that other tests compiled for would become inputs, too
    inputs = []

    def backend(graph, example_inputs):
        inputs.append([node.name for node in graph.graph.nodes if node.op == "placeholder"])
        return aot_eager(graph, example_inputs)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    captured = functools.partial(torch.compile, backend=backend, fullgraph=True)
    monkeypatch.setattr(inference.torch, "compile", captured)
    network = with_statistics(ResNet(Bottleneck, (1, 1, 1, 1), ksize="3557", num_classes=7))
    x = torch.randn(2, 3, 64, 64)
    found = optimise_for_inference(network, torch.float32, compile=True)(x)
    assert [len(names) for names in inputs] == [1]  # the images; weights are constants
    assert inference._frozen_weights() is inference._frozen_weights()  # another would stay for ever
    assert not torch._inductor.config.freezing  # elsewhere
    with torch.no_grad():
        assert apart(found, network(x)) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["eca_resnet50", "eca_mobilenetv2"])
def test_compiles_for_further_batches_and_sizes(monkeypatch, arch):
    """With the second size torch.compile takes sizes for symbols, and the gate asks about them."""
    torch.compiler.reset()
    captured = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(inference.torch, "compile", captured)
    network = make_network(arch)
    optimised = optimise_for_inference(network, torch.float32, compile=True)
    for size in ((1, 3, 64, 64), (3, 3, 64, 64), (2, 3, 96, 96), (5, 3, 224, 160)):
        x = torch.randn(size)
        with torch.no_grad():
            assert apart(optimised(x), network(x)) <= 1e-5


def test_the_fastest_dtype_is_one_that_the_device_has(monkeypatch):
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert fastest_dtype("cpu") == dtype
        assert optimise_for_inference(make_network("resnet18")).dtype == dtype
    assert fastest_dtype("meta") == torch.float32


@pytest.mark.parametrize("other", [nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(3))])
def test_other_networks_are_refused(other):
    with pytest.raises(ValueError, match=f"create_model.*not {type(other).__name__}"):
        optimise_for_inference(other)


def test_other_blocks_and_norms_are_refused():
    class Block(BasicBlock):
        pass

    network = make_network("resnet18")
    network.layer1[0].__class__ = Block
    with pytest.raises(ValueError, match="a block of type Block cannot be rebuilt"):
        optimise_for_inference(network)
    network = make_network("resnet18")
    network.layer1[0].bn1 = nn.GroupNorm(8, 64)
    with pytest.raises(ValueError, match="GroupNorm cannot be folded"):
        optimise_for_inference(network)


def test_batch_norms_that_were_synchronised_are_folded():
    network = make_network("eca_resnet18")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = network(x)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    assert apart(optimise_for_inference(synced, torch.float32)(x), expected) <= 1e-5


def test_statistics_are_needed():
    network = make_network("resnet18")
    network.bn1 = nn.BatchNorm2d(64, track_running_stats=False)
    with pytest.raises(ValueError, match="running statistics"):
        optimise_for_inference(network)


def test_triton_is_not_imported_where_there_is_no_gpu():
    code = "import sys, models, torch; print('triton' in sys.modules, torch.cuda.is_available())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported, gpu = done.stdout.split()
    assert gpu == "True" or imported == "False"
