"""The fused tail against the modules it stands for."""

import copy
import itertools
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import models
from models import eca_algebra, eca_fused, eca_native, eca_passes, eca_report
from models.eca_detection import create_detector
from models.eca_fused import block_tail, can_fuse, fused_tail
from models.eca_module import ECALayer

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
FORMS = list(itertools.product((True, False), repeat=3))  # ECA, residual, activation


def make_modules(channels, eca=True, dtype=torch.float64, ksize=3, **bn_options):
    """BatchNorm with affine and running statistics that are not the initial ones, and ECA."""
    bn = nn.BatchNorm2d(channels, **bn_options).to(dtype)
    nn.init.normal_(bn.weight)
    nn.init.normal_(bn.bias)
    if bn.running_mean is not None:
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
    return bn, ECALayer(ksize).to(dtype) if eca else None


def make_input(shape, dtype=torch.float64, memory_format=torch.contiguous_format):
    x = 2 * torch.randn(shape, dtype=torch.float64) + 1
    return x.to(dtype).contiguous(memory_format=memory_format)


def run(fused, bn, attention, z, residual, activation, grad):
    """Output, every gradient and every buffer, by name; the modules given are left as they were."""
    bn, attention = copy.deepcopy((bn, attention))
    z = z.detach().requires_grad_()
    if residual is not None:
        residual = residual.detach().requires_grad_()
    relu = nn.ReLU() if activation else None
    if fused:
        assert can_fuse(z, bn, attention, residual, relu)
    out = fused_tail(z, bn, attention, residual, activation) if fused else block_tail(
        z, bn, attention, residual, relu, fused=False
    )  # fmt: skip
    out.backward(grad.to(out.dtype))
    found = {"out": out.detach(), "z": z.grad, "weight": bn.weight.grad, "bias": bn.bias.grad}
    found |= dict(bn.named_buffers())
    if residual is not None:
        found["residual"] = residual.grad
    if attention is not None:
        found["kernel"] = attention.conv.weight.grad
    return found


def assert_close(found, expected, tolerance):
    """Relative to the largest value of each tensor."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name].double() - value.double()).abs().max()
        scale = value.double().abs().max().clamp_min(1e-12)
        assert error <= tolerance * scale, f"{name}: {(error / scale).item():.1e}"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _operations(monkeypatch):
    """PyTorch's operations everywhere; the compiled passes are for test_eca_native."""
    monkeypatch.setattr(eca_passes, "serves", lambda z: False)
    monkeypatch.setattr(eca_native, "why_not", lambda: "no C++ compiler")


@pytest.fixture
def small_chunks(monkeypatch):
    """So little room that each sample is a chunk of its own."""
    monkeypatch.setattr(eca_passes, "CHUNK_BYTES", 1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("eca", "residual", "activation"), FORMS)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_equals_the_modules_in_double_precision(
    memory_format, eca, residual, activation, training, small_chunks
):
    bn, attention = make_modules(10, eca)
    bn.train(training)
    z, r = (make_input((3, 10, 7, 5), memory_format=FORMATS[memory_format]) for _ in range(2))
    given = (bn, attention, z, r if residual else None, activation, torch.randn_like(z))
    assert_close(run(True, *given), run(False, *given), 1e-12)


@pytest.mark.parametrize("shape", [(1, 3, 7, 7), (2, 1, 4, 4), (5, 33, 1, 1), (1, 70, 1, 9)])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_equals_the_modules_at_odd_shapes(memory_format, shape):
    bn, attention = make_modules(shape[1], ksize=5)
    z, r = (make_input(shape, memory_format=FORMATS[memory_format]) for _ in range(2))
    given = (bn, attention, z, r, True, torch.randn_like(z))
    assert_close(run(True, *given), run(False, *given), 1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_single_precision(memory_format, training):
    bn, attention = make_modules(64, dtype=torch.float32)
    bn.train(training)
    z, r = (make_input((4, 64, 14, 14), torch.float32, FORMATS[memory_format]) for _ in range(2))
    given = (bn, attention, z, r, True, torch.randn_like(z))
    assert_close(run(True, *given), run(False, *given), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_half_precision_rounds_once(memory_format, dtype):
    """Against the modules in double precision on the same rounded inputs; no activation, whose
    mask would flip where rounding moves a value over zero."""
    bn, attention = make_modules(64, dtype=torch.float32)
    z, r = (make_input((4, 64, 14, 14), dtype, FORMATS[memory_format]) for _ in range(2))
    grad = torch.randn_like(z)
    found = run(True, bn, attention, z, r, False, grad)
    wide = copy.deepcopy((bn, attention))
    exact = run(False, wide[0].double(), wide[1].double(), z.double(), r.double(), False, grad)
    assert found["out"].dtype == found["z"].dtype == dtype
    assert found["weight"].dtype == torch.float32
    large = {name: found.pop(name) for name in ("out", "z", "residual")}
    half_a_digit = torch.finfo(dtype).eps / 2
    assert_close(large, {name: exact.pop(name) for name in large}, 1.01 * half_a_digit)
    assert_close(found, exact, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_whole_and_chunked_passes_agree(memory_format, dtype, small_chunks, monkeypatch):
    bn, attention = make_modules(16, dtype=torch.float32)
    z, r = (make_input((3, 16, 5, 6), dtype, FORMATS[memory_format]) for _ in range(2))
    grad = torch.randn_like(z)
    for residual, activation in itertools.product((r, None), (True, False)):
        given = (True, bn, attention, z, residual, activation, grad)
        chunked = run(*given)
        with monkeypatch.context() as patch:
            patch.setattr(eca_algebra, "passes_for", lambda z: eca_passes.Whole)
            whole = run(*given)
        assert_close(chunked, whole, 1e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("eca", "residual", "activation"), FORMS)
def test_gradcheck(eca, residual, activation, training):
    bn, attention = make_modules(4, eca)
    bn.train(training)
    z, r = (make_input((2, 4, 3, 2)).requires_grad_() for _ in range(2))
    r = r if residual else None
    kernel = attention.conv.weight if eca else None

    def tail(z, r, *_):
        return fused_tail(z, bn, attention, r, activation)

    assert torch.autograd.gradcheck(tail, (z, r, bn.weight, bn.bias, kernel))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_no_cancellation_where_the_mean_dwarfs_the_deviation(memory_format):
    bn, attention = make_modules(16, dtype=torch.float32)
    z = (torch.randn(4, 16, 14, 14) + 4096).contiguous(memory_format=FORMATS[memory_format])
    given = (bn, attention, z, None, False, torch.randn_like(z))
    found = run(True, *given)
    wide = copy.deepcopy((bn, attention))
    exact = run(False, wide[0].double(), wide[1].double(), z.double(), *given[3:])
    # z's own grid is 2^-11 of a deviation here; Σz² - (Σz)²/M in float32 would be off by about 1.
    assert_close(found, exact, 2e-3)


def test_running_statistics_follow_every_kind_of_momentum():
    for momentum in (0.1, 1.0, None):
        bn, attention = make_modules(6, momentum=momentum)
        plain = copy.deepcopy(bn)
        for _ in range(3):
            z = make_input((2, 6, 4, 4))
            fused_tail(z, bn, attention)
            plain(z)
        for found, expected in zip(bn.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(found, expected)
    assert bn.num_batches_tracked == 3


def test_running_statistics_cost_two_operations():
    """On a GPU each is a launch, and there are dozens of these layers."""

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function.overloadpacket.__name__)
            return function(*args, **kwargs or {})

    bn, called = nn.BatchNorm2d(6), []
    with Recorder():
        eca_fused._update_running_statistics(bn, torch.ones(6), torch.ones(6))
    assert [name for name in called if name != "ones"] == ["add_", "_foreach_lerp_"]


def test_without_running_statistics_the_batch_serves_in_eval_mode_too():
    bn, attention = make_modules(6, track_running_stats=False)
    z = make_input((2, 6, 4, 4))
    for training in (True, False):
        bn.train(training)
        given = (bn, attention, z, None, True, torch.randn_like(z))
        assert_close(run(True, *given), run(False, *given), 1e-12)


def test_eval_mode_leaves_the_running_statistics_alone():
    bn, attention = make_modules(6)
    bn.eval()
    before = copy.deepcopy(list(bn.buffers()))
    fused_tail(make_input((2, 6, 4, 4)), bn, attention)
    assert all(map(torch.equal, before, bn.buffers()))


def test_frozen_parameters_get_no_gradient():
    bn, attention = make_modules(6)
    bn.requires_grad_(False)
    z = make_input((2, 6, 4, 4))
    fused_tail(z, bn, attention).sum().backward()  # nothing but the kernel wants one
    assert bn.weight.grad is None
    assert bn.bias.grad is None
    assert attention.conv.weight.grad.abs().sum() > 0


def test_weight_zero_still_has_its_gradient():
    bn, attention = make_modules(6)
    nn.init.zeros_(bn.weight)
    z, r = make_input((2, 6, 4, 4)), make_input((2, 6, 4, 4))
    given = (bn, attention, z, r, True, torch.randn_like(z))
    found = run(True, *given)
    assert_close(found, run(False, *given), 1e-12)
    assert found["weight"].abs().sum() > 0


def test_memory_format_is_kept_for_inputs_of_any_stride():
    bn, attention = make_modules(6)
    wide = make_input((4, 6, 8, 8), memory_format=torch.channels_last)
    cases = {
        "nhwc rows": (wide[:, :, ::2], torch.channels_last),
        "nchw rows": (wide.contiguous()[:, :, :, 1::2], torch.contiguous_format),
        "expanded": (wide[:1].expand(4, -1, -1, -1), torch.channels_last),
    }
    for z, memory_format in cases.values():
        r = torch.randn_like(z)
        given = (bn, attention, z, r, True, torch.randn(1, 1, 1, 1).double().expand_as(z))
        found = run(True, *given)
        assert found["out"].is_contiguous(memory_format=memory_format)
        assert_close(found, run(False, *given), 1e-12)


def test_same_bits_every_time():
    bn, attention = make_modules(32, dtype=torch.float32)
    z, r = (make_input((4, 32, 14, 14), torch.float32) for _ in range(2))
    given = (True, bn, attention, z, r, True, torch.randn_like(z))
    first, second = run(*given), run(*given)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_autocast_accumulates_in_single_precision():
    bn, attention = make_modules(16, dtype=torch.float32)
    conv = nn.Conv2d(8, 16, 1, bias=False)
    x = torch.randn(2, 8, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        z = conv(x)
        out = fused_tail(z, bn, attention)
    assert z.dtype == out.dtype == torch.bfloat16
    outside = fused_tail(z.detach(), bn, attention)
    assert torch.equal(out, outside)
    out.sum().backward()
    assert conv.weight.grad.dtype == attention.conv.weight.grad.dtype == torch.float32


def saved_bytes(function):
    """Bytes that autograd keeps for backward, each storage once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    del out
    return sum(storage.nbytes() for storage in storages.values())


def test_keeps_its_input_its_output_and_vectors():
    bn, attention = make_modules(8, dtype=torch.float32)
    z, r = (torch.randn(2, 8, 16, 16, requires_grad=True) for _ in range(2))
    vectors = 16 * 2 * 8  # a few of N·C or C values, whatever the image's size
    for residual, activation in itertools.product((r, None), (True, False)):
        kept = saved_bytes(lambda: fused_tail(z, bn, attention, residual, activation))  # noqa: B023
        large = (1 + activation) * z.nbytes
        assert large < kept <= large + 4 * vectors


def test_second_derivatives_are_refused():
    bn, attention = make_modules(4)
    z = make_input((2, 4, 3, 3)).requires_grad_()
    with pytest.raises(RuntimeError, match="set_fused"):
        torch.autograd.grad(fused_tail(z, bn, attention).sum(), z, create_graph=True)


def test_compiles_into_one_graph():
    bn, attention = make_modules(8, dtype=torch.float32)
    relu = nn.ReLU()
    eager = copy.deepcopy((bn, attention))
    z, r = (torch.randn(2, 8, 5, 5, requires_grad=True) for _ in range(2))
    compiled = torch.compile(block_tail, backend="aot_eager", fullgraph=True)
    for training in (True, False):
        bn.train(training)
        eager[0].train(training)
        out = compiled(z, bn, attention, r, relu)
        expected = block_tail(z, *eager, r, relu)
        torch.testing.assert_close(out, expected)
        wanted = (z, r, bn.weight, attention.conv.weight)
        grads = torch.autograd.grad(out.square().sum(), wanted)
        wanted = (z, r, eager[0].weight, eager[1].conv.weight)
        expected_grads = torch.autograd.grad(expected.square().sum(), wanted)
        torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bn.running_var, eager[0].running_var)


def test_compiled_code_sees_a_hook_that_is_added_later():
    bn, attention = make_modules(8, dtype=torch.float32)
    compiled = torch.compile(block_tail, backend="eager")
    z = torch.randn(2, 8, 5, 5)
    compiled(z, bn, attention)
    calls = []
    attention.register_forward_hook(lambda *_: calls.append(1))
    compiled(z, bn, attention)
    assert calls == [1]


def test_replicas_of_data_parallel():
    """A replica is a shallow copy with plain tensors in the place of its parameters."""

    def replica(module):
        copied = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            setattr(copied, name, replica(child))
        for name, parameter in module._parameters.items():
            setattr(copied, name, None if parameter is None else parameter * 1)
        for name, buffer in module._buffers.items():
            copied._buffers[name] = buffer
        return copied

    bn, attention = make_modules(8)
    z = make_input((2, 8, 3, 3))
    given = (bn, attention, z, None, True, torch.ones_like(z))
    expected = run(True, *given)
    relu = nn.ReLU()
    replicas = [replica(module) for module in (bn, attention, relu)]
    assert can_fuse(z, replicas[0], replicas[1], None, replicas[2])
    fused_tail(z, *replicas[:2]).sum().backward()
    torch.testing.assert_close(bn.weight.grad, expected["weight"])
    torch.testing.assert_close(attention.conv.weight.grad, expected["kernel"])
    torch.testing.assert_close(bn.running_var, expected["running_var"])
    assert bn.num_batches_tracked == 1


class Refusals:
    """Where the modules must be called; each case is (z, bn, attention, residual, activation)."""

    z = torch.zeros(2, 4, 3, 3)

    class OtherNorm(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1

    class OtherAttention(ECALayer):
        def forward(self, x):
            return super().forward(x) + 1

    def case(self, **changes):
        given = {"z": self.z, "bn": nn.BatchNorm2d(4), "attention": ECALayer(3)}
        return {**given, "residual": self.z, "activation": nn.ReLU(), **changes}

    def hooked(self, name, register):
        given = self.case()
        getattr(given[name], register)(lambda *_: None)
        return given

    def cases(self):
        yield "SyncBatchNorm", self.case(bn=nn.SyncBatchNorm(4))
        yield "a subclass with a forward", self.case(bn=self.OtherNorm(4))
        yield "no affine", self.case(bn=nn.BatchNorm2d(4, affine=False))
        yield "other norm", self.case(bn=nn.GroupNorm(2, 4))
        yield "other attention", self.case(attention=self.OtherAttention(3))
        yield "other activation", self.case(activation=nn.ReLU6())
        yield "other rank", self.case(z=self.z[0], residual=None)
        yield "residual broadcasts", self.case(residual=self.z[:1])
        yield "residual's dtype", self.case(residual=self.z.double())
        yield "one value a channel", self.case(z=self.z[:1, :, :1, :1], residual=None)
        for name in ("bn", "attention", "activation"):
            for register in (
                "register_forward_hook",
                "register_forward_pre_hook",
                "register_full_backward_hook",
                "register_full_backward_pre_hook",
            ):
                yield f"{name} {register}", self.hooked(name, register)
        patched = self.case()
        patched["bn"].forward = lambda x: x
        yield "forward replaced", patched
        inner = self.case()
        inner["attention"].conv.register_forward_hook(lambda *_: None)
        yield "hook inside the attention", inner


REFUSALS = dict(Refusals().cases())


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses(name):
    assert can_fuse(**Refusals().case())
    assert not can_fuse(**REFUSALS[name])


def test_subclasses_and_parametrised_weights_that_keep_forward_are_served():
    class FixedNorm(nn.BatchNorm2d):
        def train(self, mode=True):
            return super().train(False)

    _, attention = make_modules(6)
    nn.utils.parametrizations.weight_norm(attention.conv)
    bn = FixedNorm(6).double().train()
    z = make_input((2, 6, 4, 4))
    assert can_fuse(z, bn, attention)
    out = fused_tail(z, bn, attention, activation=False)
    torch.testing.assert_close(out, attention(bn(z)))
    assert bn.num_batches_tracked == 0


def test_one_value_a_channel_is_an_error_in_training_as_before():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block_tail(torch.zeros(1, 4, 1, 1), nn.BatchNorm2d(4))


def test_global_hooks_and_tracing_see_modules():
    given = Refusals().case()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not can_fuse(**given)
    finally:
        handle.remove()
    assert can_fuse(**given)

    class Tail(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(4).eval()
            self.eca = ECALayer(3)

        def forward(self, z):
            return block_tail(z, self.bn, self.eca)

    exported = torch.export.export(Tail().eval(), (torch.randn(2, 4, 3, 3),))
    assert "conv1d" in exported.graph_module.code
    traced = torch.jit.trace(Tail().eval(), torch.randn(2, 4, 3, 3))
    assert "sigmoid" in str(traced.inlined_graph)


def test_hooked_modules_are_called():
    given = Refusals().case()
    calls = []
    given["attention"].avg_pool.register_forward_hook(lambda *_: calls.append("pool"))
    z = given.pop("z")
    out = block_tail(z, **given)
    assert calls == ["pool"]
    assert out.shape == z.shape


def test_switch_off():
    bn, attention = make_modules(4)
    calls = []
    plain_forward = ECALayer.forward
    z = make_input((2, 4, 3, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ECALayer, "forward", lambda self, x: calls.append(1) or plain_forward(self, x)
        )
        block_tail(z, bn, attention, fused=True)
        assert calls == []
        block_tail(z, bn, attention, fused=False)
        assert calls == [1]


@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_without_attention_an_eager_cpu_runs_batch_norms_own_kernel(residual, activation):
    bn, _ = make_modules(8, eca=False, dtype=torch.float32)
    z, r = (torch.randn(2, 8, 16, 16, requires_grad=True) for _ in range(2))
    before = z.detach().clone(), r.detach().clone()
    given = (z, bn, None, r if residual else None, nn.ReLU() if activation else None)
    expected = block_tail(*given, fused=False)
    bn.reset_running_stats()
    kept = saved_bytes(lambda: block_tail(*given))
    assert z.nbytes < kept <= (1 + activation) * z.nbytes + 64 * 8
    assert torch.equal(block_tail(*given), expected)
    assert torch.equal(z, before[0])
    assert torch.equal(r, before[1])


def test_matches_functional_batch_norm_alone():
    bn, _ = make_modules(5, eca=False)
    z = make_input((2, 5, 4, 3))
    expected = F.batch_norm(z, None, None, bn.weight, bn.bias, True, 0.1, bn.eps)
    torch.testing.assert_close(fused_tail(z, bn, activation=False), expected)


def train_step(network, x):
    """Logits, gradients and buffers after one step's forward and backward."""
    network = copy.deepcopy(network).train()
    torch.manual_seed(3)  # dropout
    logits = network(x)
    logits.square().mean().backward()
    found = {name: p.grad for name, p in network.named_parameters()}
    return {**found, **dict(network.named_buffers()), "logits": logits.detach()}


@pytest.mark.parametrize(
    "name", ["eca_resnet18", "eca_resnet50", "resnet18", "se_resnet18", "eca_mobilenetv2"]
)
def test_networks_compute_the_same_with_and_without(name):
    network = models.create_model(name, num_classes=5).double()
    x = torch.randn(2, 3, 64, 48, dtype=torch.float64).to(memory_format=torch.channels_last)
    fused = train_step(network, x)
    assert models.set_fused(network, False) > 0
    plain = train_step(network, x)
    assert fused.keys() == plain.keys()
    for key, value in plain.items():
        torch.testing.assert_close(fused[key], value, rtol=1e-7, atol=1e-9, msg=key)


def test_the_switch_reaches_every_block_and_leaves_the_keys_alone():
    network = models.create_model("eca_resnet18", num_classes=2)
    keys = list(network.state_dict())
    assert models.set_fused(network, False) == 9  # 8 blocks and the stem
    assert not any(block.fused for block in (network, *network.layer1))
    assert models.set_fused(network, True) == 9
    assert all(block.fused for block in network.layer4)
    assert list(network.state_dict()) == keys


OPERATIONS = "fused block tails by PyTorch's operations (no C++ compiler)"
KERNEL = "block tails by BatchNorm's own kernel, the rest in place (no C++ compiler)"
COMPILED = "fused block tails"


@pytest.mark.parametrize(
    ("name", "native", "tails", "of_blocks"),
    [
        ("eca_resnet18", False, OPERATIONS, {"fused_tail": 8}),
        ("eca_resnet18", True, COMPILED, {"fused_tail": 8}),
        ("resnet18", False, KERNEL, {"_plain_tail": 8}),
        ("resnet18", True, COMPILED + ", small ones by BatchNorm's own kernel", {"_plain_tail": 8}),
        ("se_resnet18", True, "block tails module by module (attention se)", {}),
        ("eca_mobilenetv2", False, OPERATIONS, {"fused_tail": 17}),
        ("mobilenetv2", False, KERNEL, {"_plain_tail": 17}),
    ],
)
def test_on_a_cpu_the_tails_run_as_described(monkeypatch, name, native, tails, of_blocks):
    if native:
        monkeypatch.undo()  # what the fixture above has switched off
        if why := eca_native.why_not():
            pytest.skip(why)
    paths = {path: Mock(wraps=getattr(eca_fused, path)) for path in ("fused_tail", "_plain_tail")}
    for path, counted in paths.items():
        monkeypatch.setattr(eca_fused, path, counted)
    network = models.create_model(name, num_classes=2).eval()
    assert models.describe_tails(network, torch.device("cpu")) == tails
    with torch.no_grad():
        network(torch.zeros(1, 3, 64, 64))
    assert {p: c.call_count for p, c in paths.items() if c.called} == of_blocks


@pytest.mark.parametrize(
    ("name", "device", "triton", "flags", "tails"),
    [
        ("eca_resnet18", "cpu", False, {"fused": False}, "block tails module by module"),
        ("resnet18", "cpu", False, {"compiled": True}, "fused block tails"),
        ("eca_resnet18", "cuda", True, {}, "fused block tails (Triton)"),
        ("resnet18", "cuda", True, {"compiled": True}, "fused block tails (Triton)"),
        ("eca_resnet18", "cuda", True, {"sync_bn": True},
         "block tails module by module (SyncBatchNorm)"),
        ("eca_resnet18", "cuda", False, {}, "block tails module by module (no Triton)"),
        ("eca_resnet18", "cuda", False, {"compiled": True}, "fused block tails"),
        ("eca_resnet18", "mps", False, {}, "block tails module by module (no kernels for mps)"),
        ("eca_resnet18", "mps", False, {"compiled": True}, "fused block tails"),
    ],
)  # fmt: skip
def test_elsewhere_the_description_says_why(monkeypatch, name, device, triton, flags, tails):
    why_not = None if triton else "no Triton"
    monkeypatch.setattr(eca_report, "why_not_triton", lambda device: why_not)
    with torch.device("meta"):
        network = models.create_model(name, num_classes=2)
    assert models.describe_tails(network, torch.device(device), **flags) == tails


def test_a_detector_s_tails_are_those_of_its_backbone():
    with torch.device("meta"):
        synced, other = (
            create_detector("retinanet", backbone, num_classes=2, norm=norm)
            for backbone, norm in (("eca_resnet18", "sync"), ("se_resnet18", "bn"))
        )
    cpu = torch.device("cpu")
    assert models.describe_tails(synced, cpu).endswith("(SyncBatchNorm)")
    assert models.describe_tails(other, cpu).endswith("(attention se)")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_keeps_what_resnet50_keeps(dtype):
    """The issue's bound, at its batch of 16 and 224×224, on tensors without storage."""
    import torchvision

    x = torch.empty(16, 3, 224, 224, device="meta", dtype=dtype)
    with torch.device("meta"):
        plain = torchvision.models.resnet50()
        eca = models.create_model("eca_resnet50")
    kept = {}
    for label, network in (("plain", plain), ("fused", eca)):
        kept[label] = saved_bytes(lambda: network.to(dtype).train()(x))  # noqa: B023
    models.set_fused(eca, False)
    kept["modules"] = saved_bytes(lambda: eca(x))
    assert kept["fused"] <= 1.005 * kept["plain"]
    assert kept["modules"] > 1.2 * kept["plain"]
