"""Wrapping a network for several processes, in a process group of one."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn

import models
from utils import distributed
from utils.distributed import Context
from utils.errors import UserError

CPU, TWO_RANKS = torch.device("cpu"), Context(torch.device("cpu"), 0, 2)


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sync_bn_changes_neither_names_nor_parameters(group):
    """What the optimizer holds and a checkpoint's user reads stay those of the bare network."""
    network = models.create_model("eca_resnet18", num_classes=3)
    before, names = list(network.parameters()), list(network.state_dict())
    with pytest.raises(ValueError, match="GPU modules"):  # torch's, after the conversion
        distributed.wrap(network, TWO_RANKS, sync_bn=True)
    kinds = {type(m) for m in network.modules() if "BatchNorm" in type(m).__name__}
    assert kinds == {nn.SyncBatchNorm}
    assert list(network.state_dict()) == names
    assert all(a is b for a, b in zip(network.parameters(), before, strict=True))


def test_batch_norm_is_each_rank_s_own_unless_asked(group):
    network = models.create_model("resnet18", num_classes=3)
    distributed.wrap(network, TWO_RANKS)
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in network.modules())


def test_gradients_stay_apart_only_where_there_are_others(group):
    network = nn.Linear(2, 2)
    assert isinstance(distributed.apart(network), contextlib.nullcontext)
    wrapped = distributed.wrap(network, TWO_RANKS)
    with distributed.apart(wrapped):
        assert not wrapped.require_backward_grad_sync
    assert wrapped.require_backward_grad_sync


@pytest.mark.parametrize(
    "context", [Context(CPU), TWO_RANKS, Context(torch.device("cuda", 0))], ids=str
)
def test_sync_bn_needs_processes_on_gpus(context):
    with pytest.raises(UserError, match="start them with torchrun, or add --no-sync-bn"):
        distributed.refuse_sync_bn(context)
    distributed.refuse_sync_bn(Context(torch.device("cuda", 0), 0, 2))


def test_rank_0_speaks_and_nothing_is_no_line(capsys):
    Context(CPU).say("a", "b")
    Context(CPU, rank=1, world_size=2).say("c")
    Context(CPU).say()
    assert capsys.readouterr().out == "a\nb\n"
