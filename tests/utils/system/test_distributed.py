"""Wrapping a network for several processes, in a process group of one."""

import contextlib
import platform
import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn

import models
from utils.config.flags import LoaderSettings
from utils.runs import folder
from utils.system import distributed
from utils.system.distributed import Context
from utils.system.errors import UserError

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
    wrapped = distributed.wrap(network, TWO_RANKS)
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in network.modules())
    assert not wrapped.broadcast_buffers  # its statistics, too, until the epoch ends
    network.register_buffer("gate", torch.ones(3))  # which a layer of a user's may read
    assert distributed.wrap(network, TWO_RANKS).broadcast_buffers


def test_buckets_are_settled_before_the_first_step(group):
    """Else a resumed run's first step would sum over the ranks in another order."""
    network = models.create_model("eca_resnet18", num_classes=3)
    network.conv1.requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    wrapped = distributed.wrap(network, TWO_RANKS)
    assert wrapped._has_rebuilt_buckets
    assert wrapped.module is network
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_gradients_stay_apart_only_where_there_are_others(group):
    network = nn.Linear(2, 2)
    assert isinstance(distributed.without_gradient_sync(network), contextlib.nullcontext)
    wrapped = distributed.wrap(network, TWO_RANKS)
    with distributed.without_gradient_sync(wrapped):
        assert not wrapped.require_backward_grad_sync
    assert wrapped.require_backward_grad_sync


@pytest.mark.parametrize(
    "context", [Context(CPU), TWO_RANKS, Context(torch.device("cuda", 0))], ids=str
)
def test_sync_bn_needs_processes_on_gpus(context):
    with pytest.raises(UserError, match="start them with torchrun, or add --no-sync-bn"):
        distributed.refuse_sync_bn(context)
    distributed.refuse_sync_bn(Context(torch.device("cuda", 0), 0, 2))


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine that seems to have two GPUs, for as long as nothing is put on them."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")


@pytest.mark.parametrize(
    ("given", "index", "parallel"),
    [
        (("auto", None), 0, (0, 1)),
        (("cuda", None), 0, (0, 1)),
        (("cuda:1", None), 1, ()),
        (("auto", 1), 1, ()),
    ],
)
def test_without_a_launcher_all_gpus_or_the_named_one(two_gpus, given, index, parallel):
    context = distributed.setup(*given)
    assert context == Context(torch.device("cuda", index), data_parallel=parallel)
    assert context.replicas == len(parallel or (0,))
    written = folder.environment(context)
    assert written["device"] == f"GPU {index}"
    assert (written["world_size"], written["data_parallel"]) == (1, list(parallel))
    assert folder.environment(TWO_RANKS)["device"] in (platform.processor(), "cpu")
    lines = distributed.device_lines(context, "bf16", False, False)
    if parallel:
        assert lines[0].startswith("device: GPU 0 x 2 (DataParallel); bf16")
        assert lines[1:] == ["  torchrun --nproc-per-node=2 is faster"]
        with pytest.raises(UserError, match="torchrun --nproc-per-node=2, or add --gpu 0"):
            distributed.refuse_compile(context)
    else:
        assert len(lines) == 1
        distributed.refuse_compile(context)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("cuda:2", None), "CUDA device 2 asked for, 2 visible"),
        (("auto", 500), "CUDA device 500 asked for, 2 visible"),
        (("cpu", 1), "--gpu 1 and --device cpu contradict each other"),
        *[
            ((name, None), f"--device {name}: not a device; try cpu, cuda, cuda:0 or mps")
            for name in ("meta", "xpu", "cpu:3", "cuda:", "cuda:x", "mps:0", "")
        ],
    ],
)
def test_devices_that_are_not_there(two_gpus, given, message):
    with pytest.raises(UserError, match=message):
        distributed.setup(*given)


@pytest.mark.parametrize(
    ("given", "named"), [(("auto", 1), "--gpu 1"), (("cuda:1", None), "--device cuda:1")]
)
def test_torchrun_chooses_the_gpu(two_gpus, monkeypatch, given, named):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=f"leave {named} out, .* CUDA_VISIBLE_DEVICES"):
        distributed.setup(*given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, None], ids=str)
def test_threads_of_data_parallel_have_the_callers_autocast(monkeypatch, dtype):
    """As on two GPUs but for the copies: torch's own threads, on the CPU."""
    accelerator = {
        "is_available": lambda: True,
        "current_accelerator": lambda: CPU,
        "current_stream": lambda device: contextlib.nullcontext(),
        "device_index": lambda device: contextlib.nullcontext(),
    }
    for name, stand_in in accelerator.items():
        monkeypatch.setattr(torch.accelerator, name, stand_in)
    seen = []

    class Product(nn.Module):
        def forward(self, x):
            seen.append(threading.current_thread())
            return x @ x

    replicas = [Product(), Product()]
    wrapped = distributed.data_parallel(replicas[0], Context(CPU, data_parallel=(0, 1)))
    wrapped.device_ids, wrapped.src_device_obj = [0, 1], CPU  # which torch leaves out without GPUs
    inputs = ((torch.ones(2, 2),),) * 2
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        products = wrapped.parallel_apply(replicas, inputs, ({}, {}))
    assert [y.dtype for y in products] == [dtype or torch.float32] * 2
    assert threading.current_thread() not in seen


def test_ranks_wait_for_each_other_longer_than_for_their_workers(monkeypatch):
    """NCCL's own 10 minutes are --worker-timeout's: which of the two spoke would be chance."""
    waits = []
    for name, result in (
        ("init_process_group", None),
        ("new_group", None),
        ("get_rank", 0),
        ("get_world_size", 2),
    ):
        monkeypatch.setattr(
            dist, name, lambda *_, result=result, **kw: waits.append(kw.get("timeout")) or result
        )
    monkeypatch.setattr(distributed, "end_with_launcher", lambda: None)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    distributed.setup("cpu")
    assert [wait.total_seconds() for wait in filter(None, waits)] == [1800, 1800]
    assert LoaderSettings().worker_timeout < 1800


def test_nccl_is_told_which_gpu_a_rank_has(two_gpus, monkeypatch):
    bound = []
    joined = lambda *_, device_id=None, **__: bound.append(device_id)  # noqa: E731
    for name, result in (
        ("init_process_group", joined),
        ("new_group", lambda **_: None),
        ("get_rank", lambda: 1),
        ("get_world_size", lambda: 2),
    ):
        monkeypatch.setattr(dist, name, result)
    monkeypatch.setattr(distributed, "end_with_launcher", lambda: None)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert distributed.setup("cuda").device == torch.device("cuda", 1)
    distributed.setup("cpu")
    assert bound == [torch.device("cuda", 1), None]


def test_every_rank_gets_the_tensors_of_rank_0(monkeypatch):
    sent = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "broadcast", lambda tensor, source: sent.append((tensor, source)))
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    for share, tensors in (
        (distributed.broadcast_buffers, network.buffers()),
        (distributed.broadcast_state, network.state_dict().values()),
    ):
        sent.clear()
        share(network)
        assert [(t.data_ptr(), 0) for t in tensors] == [(t.data_ptr(), s) for t, s in sent]


def test_rank_0_speaks_and_nothing_is_no_line(capsys):
    Context(CPU).say("a", "b")
    Context(CPU, rank=1, world_size=2).say("c")
    Context(CPU).say()
    assert capsys.readouterr().out == "a\nb\n"
