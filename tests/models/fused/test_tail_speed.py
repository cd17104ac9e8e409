"""The choice by speed between fused tails and modules, with times from a script."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers.small_runs import thin_networks
from torch import nn

import models
from models.eca_module import ECALayer
from models.fused import block_tail, tail_speed
from models.fused.tail_speed import REPEATS, WARM_UPS, Tail
from utils.config.classification import Config, NetworkSettings
from utils.runs.resume import Start
from utils.system import distributed
from utils.system.distributed import Context
from utils.training import classifier

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
LAYOUT = torch.contiguous_format


@pytest.mark.parametrize("name", ["eca_resnet18", "eca_resnet50", "eca_mobilenetv2"])
def test_every_tail_of_a_network_is_found_with_its_shape(name):
    with thin_networks():
        network = models.create_model(name, num_classes=2)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    found = tail_speed.tails_of(network, (2, 3, 64, 64))
    assert block_tail.listener is None
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    norms, kernels = Counter(), Counter()
    models.set_fused(network, False)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _, given, __: norms.update([given[0].shape]))
        if isinstance(module, ECALayer):
            size = module.conv.weight.numel()
            module.register_forward_hook(
                lambda _, given, __, k=size: kernels.update([(*given[0].shape, k)])
            )
    network(torch.zeros(2, 3, 64, 64))
    shapes, taps = Counter(), Counter()
    for tail, count in found.items():
        shapes[tail.shape] += count
        taps[(*tail.shape, tail.taps)] += count if tail.taps else 0
    assert not shapes - norms  # a shortcut's BatchNorm is no tail
    assert sum((norms - shapes).values()) == (0 if "mobile" in name else 4)
    assert +taps == kernels
    assert any(tail.residual for tail in found)


TAILS = [Tail((2, 8, 5, 5), 3, True, float("inf")), Tail((2, 8, 5, 5), 0, False, 6.0)]


@pytest.mark.parametrize("tail", TAILS)
def test_a_step_runs_the_tail_as_the_network_does(tail, monkeypatch):
    seen = []
    real = block_tail.block_tail
    monkeypatch.setattr(block_tail, "block_tail", lambda *given: seen.append(given) or real(*given))
    state = torch.get_rng_state()
    for fused in (True, False):
        tail_speed._step(tail, fused, torch.float32, torch.channels_last, CPU)()
    assert torch.equal(torch.get_rng_state(), state)
    for fused, (z, bn, eca, residual, activation, switch) in zip((True, False), seen, strict=True):
        assert switch is fused
        assert z.is_contiguous(memory_format=torch.channels_last)
        assert (z.shape, bn.num_features) == (tail.shape, 8)
        assert (0 if eca is None else eca.conv.weight.numel()) == tail.taps
        assert (residual is not None) == tail.residual
        assert block_tail.ceiling_of(activation) == tail.ceiling


def scripted(monkeypatch, times):
    """Lets each step take {(tail, fused): (device, host)}; returns the order in which they ran."""
    calls = []

    def clock(step, device):
        calls.append(step)
        if calls.count(step) <= WARM_UPS:  # as a compiler would
            return 1e3, 1e3
        slow = 50 if calls.count(step) == WARM_UPS + REPEATS else 1  # one disturbance
        return tuple(slow * seconds for seconds in times[step])

    monkeypatch.setattr(tail_speed, "_step", lambda tail, fused, *_: (tail, fused))
    monkeypatch.setattr(tail_speed, "clock", clock)
    monkeypatch.setattr(tail_speed, "tails_of", lambda *_: Counter({"a": 2, "b": 1}))
    return calls


@pytest.mark.parametrize(
    ("times", "speed"),
    [
        # The device decides: 2·1 + 5 = 7 against 2·3 + 4 = 10.
        ({"a": ((1, 0.1), (3, 0.1)), "b": ((5, 0.1), (4, 0.1))}, 10 / 7),
        # The host of the fused ones: 2·6 + 6 = 18 against the modules' device, 12.
        ({"a": ((1, 6), (4, 2)), "b": ((1, 6), (4, 2))}, 12 / 18),
    ],
)
def test_the_larger_of_device_and_host_decides(times, speed, monkeypatch):
    table = {(t, fused): pair[not fused] for t, pair in times.items() for fused in (True, False)}
    calls = scripted(monkeypatch, table)
    found = tail_speed.speed(nn.Identity(), (1, 3, 8, 8), torch.float32, LAYOUT, CPU)
    assert found == pytest.approx(speed)
    assert Counter(calls) == dict.fromkeys(table, WARM_UPS + REPEATS)
    of_a = [fused for t, fused in calls if t == "a"]
    assert of_a[:4] == [True, False, False, True]  # neither is always the first


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that need not be there: sets what its Triton, its clock and the other ranks say."""

    def says(triton=None, speed=None, others=()):
        asked = []
        monkeypatch.setattr(block_tail, "why_not_triton", lambda *_: triton)
        monkeypatch.setattr(tail_speed, "speed", lambda *given: asked.append(given) or speed)
        monkeypatch.setattr(distributed, "gather", lambda mine: [mine, *others])
        monkeypatch.setattr(classifier, "to_device", lambda *_: None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
        return asked

    return says


def built(typed=(), start=None, context=None, **recipe):
    from main import RECIPE

    values = dict(typed) | {"num_classes": 2}
    config = Config.of(RECIPE.override(arch="eca_resnet18", **recipe), values, dict(typed))
    with thin_networks():
        _, config, lines = classifier.build_network(
            config, start or Start(), ["a", "b"], context or Context(GPU)
        )
    return config.saved_flags["fused"], next(line for line in lines if line.startswith("device: "))


COMPARED = "fused block tails (Triton, compared on this GPU)"


@pytest.mark.parametrize(
    ("speed", "fused", "said"),
    [
        (1.3, True, f"{COMPARED}, 1.30 times the modules' speed"),
        (0.985, True, f"{COMPARED}, 0.98 times the modules' speed"),  # within 1.02
        (0.9, False, "block tails module by module (fused ones have 0.90 of their speed)"),
    ],
)
def test_a_new_run_takes_what_is_faster_and_its_checkpoint_says_so(gpu, speed, fused, said):
    asked = gpu(speed=speed)
    found, line = built(batch_size=48, img_size=160, train_size=128)
    assert (found, line) == (fused, f"device: GPU; float32, {said}")
    assert [given[1:] for given in asked] == [((48, 3, 128, 128), torch.float32, LAYOUT, GPU)]


@pytest.mark.parametrize("typed", [{"seed": 1}, {"fused": True}, {"fused": False}])
def test_nothing_is_timed_under_a_seed_or_where_the_choice_is_typed(gpu, typed):
    asked = gpu(speed=0.1)
    fused = typed.get("fused", True)
    found, line = built(typed)
    assert (found, asked) == (fused, [])
    assert line.endswith(COMPARED if fused else "float32, block tails module by module")


def test_nor_in_a_resumed_run_which_keeps_the_first_choice(gpu):
    asked = gpu(speed=0.1)

    class Saved:
        run = None

        def network(self, attention):
            return models.create_model("eca_resnet18", num_classes=2)

    assert built(start=Start(saved=Saved()))[0]
    assert not built({"fused": False}, start=Start(saved=Saved()))[0]
    assert asked == []


def test_all_ranks_take_the_modules_where_one_does(gpu):
    slow = "block tails module by module (no Triton)"
    gpu(speed=1.3, others=[(1.2, COMPARED)])
    assert built()[1].endswith("1.20 times the modules' speed")
    gpu(speed=1.3, others=[(1.2, slow)])
    assert built() == (False, f"device: GPU; float32, {slow}")
    asked = gpu(triton="no Triton", others=[(1.2, COMPARED)])
    assert built() == (False, f"device: GPU; float32, {slow}")
    assert asked == []


def test_data_parallel_runs_the_modules_and_compiled_code_is_not_timed(gpu):
    asked = gpu(speed=0.1)
    several = replace(Context(GPU), data_parallel=(0, 1))
    said = "block tails module by module (DataParallel)"
    assert built(context=several)[1].endswith(said)
    network = models.create_model("eca_resnet18", num_classes=2)
    assert classifier.how_it_runs(network, NetworkSettings(), several)[0].endswith(said)
    assert built({"compile": True})[0]
    assert asked == []
