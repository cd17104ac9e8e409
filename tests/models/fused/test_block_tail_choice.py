"""Where the fused tail stands for the modules, and where they are called themselves."""

import copy

import pytest
import torch
from helpers.tail_cases import RELU, make_input, make_modules, run, saved_bytes
from torch import nn
from torch.autograd import forward_ad

from models.eca_module import ECALayer
from models.fused import block_tail as block_tail_module
from models.fused.block_tail import block_tail, can_fuse, fused_tail

pytestmark = pytest.mark.usefixtures("seeded", "operations")


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


@pytest.mark.parametrize(
    "name", ["bn", "attention", "attention.conv", "attention.avg_pool", "relu"]
)
def test_compiled_code_sees_a_hook_that_is_added_later(name):
    bn, attention = make_modules(8, dtype=torch.float32)
    tail = nn.ModuleDict({"bn": bn, "attention": attention, "relu": nn.ReLU()})
    compiled = torch.compile(block_tail, backend="eager")
    z, calls = torch.randn(2, 8, 5, 5), []
    compiled(z, bn, attention, z, tail["relu"])
    tail.get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
    compiled(z, bn, attention, z, tail["relu"])
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
    given = (bn, attention, z, None, RELU, torch.ones_like(z))
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
        yield "other activation", self.case(activation=nn.GELU())
        six = nn.ReLU6()
        six.max_val = 5.0
        yield "another ceiling", self.case(activation=six)
        yield "other rank", self.case(z=self.z[0], residual=None)
        yield "residual broadcasts", self.case(residual=self.z[:1])
        yield "residual's dtype", self.case(residual=self.z.double())
        yield "residual's device", self.case(residual=self.z.to("meta"))
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
    out = fused_tail(z, bn, attention, ceiling=None)
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


def test_functional_transforms_see_modules():
    """torch.func's grad and vmap, and forward mode either way, which the Function does not know."""
    bn, attention = (m.eval() for m in make_modules(4))
    z, direction = (torch.randn(2, 4, 3, 3, dtype=torch.float64) for _ in range(2))

    def tail(z, fused=True):
        return block_tail(z, bn, attention, z, nn.ReLU(), fused=fused)

    def loss(z):
        return tail(z).square().sum()

    x = z.clone().requires_grad_()
    expected = torch.autograd.grad(tail(x, fused=False).square().sum(), x)[0]
    torch.testing.assert_close(torch.func.grad(loss)(z), expected)
    torch.testing.assert_close(torch.func.vmap(tail)(z[:, None])[:, 0], tail(z))
    _, slope = torch.func.jvp(loss, (z,), (direction,))
    torch.testing.assert_close(slope, (expected * direction).sum())
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(z, direction)
        torch.testing.assert_close(forward_ad.unpack_dual(loss(dual)).tangent, slope)


def test_hooked_modules_are_called():
    given = Refusals().case()
    calls = []
    given["attention"].avg_pool.register_forward_hook(lambda *_: calls.append("pool"))
    z = given.pop("z")
    out = block_tail(z, **given)
    assert calls == ["pool"]
    assert out.shape == z.shape


def test_switch_off(monkeypatch):
    bn, attention = make_modules(4)
    z = make_input((2, 4, 3, 3))
    calls = []
    monkeypatch.setattr(block_tail_module, "fused_tail", lambda *_: calls.append(1))
    block_tail(z, bn, attention, fused=False)
    assert calls == []
    block_tail(z, bn, attention, fused=True)
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
