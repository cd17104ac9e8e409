"""Sets up one process or many, and has the few collectives that a run needs.

Every function works in a single process too, where it does nothing; callers have no second branch.
"""

import os
import re
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from utils.system.errors import UserError
from utils.system.processes import end_with_launcher
from utils.system.signals import lead_to_nowhere
from utils.system.text import counted, printable_lines

PATIENCE = timedelta(minutes=30)  # of ranks with each other; hung workers are told of before it


@dataclass(frozen=True)
class Context:
    """Says where this process runs and among how many."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    data_parallel: tuple[int, ...] = ()  # GPU indices of DataParallel, when it is used
    votes: dist.ProcessGroup | None = None  # host-side group for decisions, see Votes
    trains: bool = False  # its result is its checkpoints: it goes on where stdout cannot be written

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def replicas(self) -> int:
        """Returns the number of devices that a global batch is divided over."""
        return max(self.world_size, len(self.data_parallel), 1)

    def say(self, *lines: str) -> None:
        """Prints the lines at once, on rank 0 only; without lines, nothing."""
        if not self.is_main or not lines:
            return
        try:
            print(*map(printable_lines, lines), sep="\n", flush=True)
        except OSError as error:
            if not self.trains:
                raise
            lead_to_nowhere(sys.stdout.fileno())
            with suppress(OSError):
                print(f"! stdout: {error.strerror}; what follows is not shown", file=sys.stderr)


def is_first() -> bool:
    """Returns whether this process will be rank 0, before `setup` has run."""
    return os.environ.get("RANK", "0") == "0"


def setup(device: str = "auto", gpu: int | None = None) -> Context:
    """Finds the device and, under torchrun, joins the process group.

    Without a launcher all visible GPUs are used through DataParallel, unless `gpu` names one.

    Args:
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        gpu: the same as "cuda:N".

    Raises:
        UserError: the device does not exist here, or torchrun chooses it.
    """
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        raise UserError(f"--device {device}: not a device; try cpu, cuda, cuda:0 or mps")
    if launched and (gpu is not None or ":" in device):
        typed = f"--device {device}" if gpu is None else f"--gpu {gpu}"
        raise UserError(
            f"torchrun chooses each process's GPU: leave {typed} out, and choose among them with "
            "CUDA_VISIBLE_DEVICES"
        )
    if gpu is not None:
        if device not in ("auto", "cuda"):
            raise UserError(f"--gpu {gpu} and --device {device} contradict each other: give one")
        device = f"cuda:{gpu}"
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    kind, _, index = device.partition(":")
    chosen = torch.device(kind)
    if kind == "cuda":
        visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
        number = int(os.environ.get("LOCAL_RANK", 0)) if launched else int(index or 0)
        if number >= visible:
            raise UserError(
                f"CUDA device {number} asked for, {visible} visible; check nvidia-smi and "
                "CUDA_VISIBLE_DEVICES, or use --device cpu"
            )
        several = not index and not launched and visible > 1
        chosen = torch.device("cuda", number)
        torch.cuda.set_device(chosen)
    elif chosen.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: no Apple GPU here; use --device cpu")
    if not launched:
        parallel = tuple(range(visible)) if chosen.type == "cuda" and several else ()
        return Context(chosen, data_parallel=parallel)
    end_with_launcher()  # one that was killed leaves no runs behind
    backend, bound = ("nccl", chosen) if chosen.type == "cuda" else ("gloo", None)
    # NCCL would guess the GPU from the rank.
    dist.init_process_group(backend, timeout=PATIENCE, device_id=bound)
    votes: Any = dist.new_group(backend="gloo", timeout=PATIENCE)
    return Context(chosen, dist.get_rank(), dist.get_world_size(), votes=votes)


def on_one_gpu(context: Context) -> Context:
    """Returns a context without DataParallel, for networks that do not run in it, and says so."""
    gpus = len(context.data_parallel)
    if gpus:
        context.say(
            f"{gpus} GPUs: detectors run on one of them, or on all by torchrun "
            f"--nproc-per-node={gpus}"
        )
    return replace(context, data_parallel=())


def tear_down() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap(network: nn.Module, context: Context, sync_bn: bool = False) -> nn.Module:
    """Returns the network as the step calls it: in DistributedDataParallel or DataParallel, or
    bare.
    """
    if context.world_size > 1:
        on_gpu = context.device.type == "cuda"
        if sync_bn:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        wrapped = nn.parallel.DistributedDataParallel(
            network,
            device_ids=[context.device.index] if on_gpu else None,
            gradient_as_bucket_view=True,
        )
        # Rank 0's count, and a training step reads none of a BatchNorm's: all ranks get them at an
        # epoch's end, before they are evaluated, not in each forward pass. Another layer's may be
        # read. (The constructor's argument has another name in PyTorch 2.14.)
        of_norms = {
            id(buffer)
            for module in network.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            for buffer in module.buffers(recurse=False)
        }
        wrapped.broadcast_buffers = any(id(b) not in of_norms for b in network.buffers())
        _settle_buckets(wrapped, context.device)
        return wrapped
    return data_parallel(network, context)


class _SumOfParameters(nn.Module):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, total: torch.Tensor) -> torch.Tensor:
        for parameter in self.network.parameters():
            if parameter.requires_grad:
                total = total + parameter.sum()
        return total


def _settle_buckets(wrapped: nn.parallel.DistributedDataParallel, device: torch.device) -> None:
    """Makes DistributedDataParallel choose its gradient buckets before the first step.

    It begins with all gradients in one bucket and deals them out anew in the order of the first
    backward pass. A sum over three or more ranks depends, in its last bits, on the position in the
    bucket: the first step of a resumed run would differ from the same step of one that was never
    interrupted. Here a sum of all parameters is passed backward twice: the first time tells an
    order (the last parameter first, as in training but for branches within a block, so reductions
    overlap with the backward pass as before), the second time deals out by it.
    """
    network = wrapped.module
    wrapped.module = _SumOfParameters(network)
    for _ in range(2):
        wrapped(torch.zeros((), device=device)).backward()
    wrapped.module = network
    network.zero_grad()


def refuse_sync_bn(context: Context) -> None:
    """Refuses a run for which SyncBatchNorm would do nothing, or is not made.

    Raises:
        UserError: not several processes on GPUs.
    """
    if context.world_size == 1 or context.device.type != "cuda":
        raise UserError(
            "--sync-bn is for several processes on GPUs: start them with torchrun, or add "
            "--no-sync-bn"
        )


def refuse_compile(context: Context) -> None:
    """Refuses a run in which torch.compile would bind every replica to the first GPU's network.

    Raises:
        UserError: DataParallel would be used.
    """
    if len(context.data_parallel) > 1:
        raise UserError(
            f"--compile does not go with DataParallel over {len(context.data_parallel)} GPUs: "
            f"start with torchrun --nproc-per-node={len(context.data_parallel)}, or add --gpu 0"
        )


def without_gradient_sync(network: nn.Module) -> AbstractContextManager:
    """Returns a context in which backward adds no gradients of other ranks (DDP's `no_sync`)."""
    if isinstance(network, nn.parallel.DistributedDataParallel):
        return network.no_sync()
    return nullcontext()


class _DataParallel(nn.DataParallel):
    """Runs as DataParallel, with its threads in the caller's autocast.

    torch's own enter autocast without the dtype, which is each thread's own: bf16 would be fp16.
    """

    def parallel_apply(self, replicas: Sequence[nn.Module], inputs: Any, kwargs: Any) -> list:
        kind = self.src_device_obj.type
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

        def as_called(replica: nn.Module) -> Any:
            def run(*arguments: Any, **named: Any) -> Any:
                with torch.autocast(kind, dtype=dtype, enabled=enabled):
                    return replica(*arguments, **named)

            return run

        return super().parallel_apply([as_called(r) for r in replicas], inputs, kwargs)


def data_parallel(network: nn.Module, context: Context) -> nn.Module:
    """Returns the network in DataParallel where this process has several GPUs, else as it is."""
    if len(context.data_parallel) > 1:
        return _DataParallel(network, device_ids=list(context.data_parallel))
    return network


def all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
    """Reduces `tensor` in place over all ranks and returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
    return tensor


def broadcast_buffers(network: nn.Module) -> None:
    """Gives every rank rank 0's buffers (BatchNorm statistics differ by rank after a step)."""
    if dist.is_initialized():
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)


def broadcast_state(network: nn.Module) -> None:
    """Gives every rank rank 0's parameters and buffers."""
    if dist.is_initialized():
        for tensor in network.state_dict().values():
            dist.broadcast(tensor, 0)


def share(value: Any, context: Context) -> Any:
    """Returns rank 0's `value` (plain Python objects) on every rank."""
    if context.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, 0, device=context.device)
    return box[0]


def ranks() -> int:
    """Returns the number of processes of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: object) -> list:
    """Returns every rank's `value` (plain Python objects), in the order of ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * ranks()
    dist.all_gather_object(values, value)
    return values


def refuse_differences(**facts: object) -> None:
    """Refuses a run whose processes do not see the same, before they wait for each other in vain.

    Raises:
        UserError: names the first fact that differs, with its value on each rank.
    """
    everywhere = gather(facts)
    for name in facts:
        values = [seen[name] for seen in everywhere]
        if any(value != values[0] for value in values):
            shown = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
            raise UserError(
                f"the processes see different files ({name.replace('_', ' ')}: {shown}): put data "
                "and run folder where every machine reads the same"
            )


class Votes:
    """Answers yes/no questions alike on all ranks: yes where any rank says yes.

    A signal may reach one rank a step before another, and clocks differ; a rank that stopped alone
    would leave the others waiting in a collective. The votes of one step are summed while the next
    one runs, so the answer is one step old and costs no waiting.

    Args:
        group: a host-side (gloo) process group; None in a single process, where the answer to a
            vote is the vote itself.
    """

    def __init__(self, group: dist.ProcessGroup | None):
        self.group = group
        self._pending: tuple[torch.Tensor, dist.Work] | None = None

    def cast(self, *votes: bool) -> list[bool]:
        """Gives this rank's votes and returns the answers that are due."""
        if self.group is None:
            return list(votes)
        due = [False] * len(votes)
        if self._pending is not None:
            tensor, work = self._pending
            work.wait()
            due = [bool(v) for v in tensor.tolist()]
        tensor = torch.tensor(votes, dtype=torch.int32)
        self._pending = (
            tensor,
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group, async_op=True),
        )
        return due

    def settle(self) -> None:
        """Waits for the votes under way; before a collective of another kind, and at the end."""
        if self._pending is not None:
            self._pending[1].wait()
            self._pending = None


def device_lines(
    context: Context, amp: str, channels_last: bool, compiled: bool, tails: str = ""
) -> list[str]:
    """Returns where and how the run computes; `tails` says how the ends of blocks run."""
    name = str(context.device)
    if context.device.type == "cuda":
        name = torch.cuda.get_device_name(context.device)
    elif context.device.type == "cpu":
        name = f"CPU, {counted(torch.get_num_threads(), 'thread')}"
    if context.world_size > 1:
        name += f", {counted(context.world_size, 'process')} (DistributedDataParallel)"
    elif len(context.data_parallel) > 1:
        name += f" x {len(context.data_parallel)} (DataParallel)"
    traits = ["float32" if amp == "off" else amp]
    traits += ["channels_last"] * channels_last + ["compiled"] * compiled
    traits += [tails] if tails else []
    lines = [f"device: {name}; {', '.join(traits)}"]
    if len(context.data_parallel) > 1:
        lines.append(f"  torchrun --nproc-per-node={len(context.data_parallel)} is faster")
    return lines
