"""The fused tail on an eager CPU: native.cpp compiled when first needed, and the calls of it.

For each of its passes PyTorch's own operations need several passes over memory, and copies of
bfloat16 in float32. Compiling takes some seconds, once: the library is kept in `~/.cache/eca-net`,
under a name that changes with the source, the compiler and the processor, in a folder that nobody
else can write to. A library is code: one that another user could have put there, or changed, is
never loaded. If there is no C++ compiler, or something else is missing, `serves` returns False and
the modules are called one by one.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of sums and of everything small: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Kept(NamedTuple):
    """The small tensors of a forward pass that its backward pass needs."""

    mean: Tensor  # (C,)
    inverse_std: Tensor  # 1 / √(variance + eps), (C,)
    pooled: Tensor | None  # means over the pixels of normalised z, (N, C); None without ECA
    gate: Tensor | None  # s, (N, C); None without ECA


class Gradients(NamedTuple):
    z: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    kernel: Tensor | None
    residual: Tensor | None


class Wanted(NamedTuple):
    """Which gradients the caller needs."""

    z: bool
    weight: bool
    bias: bool
    kernel: bool
    residual: bool


SOURCE = Path(__file__).with_name("native.cpp")
# No -ffast-math: infinities and NaN must come out as PyTorch's do.
FLAGS = ("-O3", "-march=native", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
X86_FLAGS = ("-mprefer-vector-width=256",)  # measured on Zen 4; also narrow rows fill such vectors
SECONDS = 120  # for the compiler
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class BuildError(Exception):
    """Says why there is no library."""


def _load(functions: Sequence[str]) -> ctypes.CDLL:
    """Returns the library with these functions: the one in the cache, or one compiled now.

    The one in the cache is used if it and its folder belong to this user, nobody else can write to
    either, every byte is as it was written, and it has all `functions`.

    Raises:
        BuildError: no compiler, or the compiled library lacks a function.
        subprocess.SubprocessError: the compiler failed or took too long.
        OSError, RuntimeError: there is no place for the library.
    """
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    compiler = shlex.split(found or "")
    if not compiler:
        raise BuildError("no C++ compiler")
    flags = FLAGS + (X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else ())
    key = hashlib.sha256(SOURCE.read_bytes())
    for part in (*compiler, *flags, torch.__version__, _processor()):
        key.update(part.encode() + b"\0")
    cache: Path | None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eca-net"
    target = cache / f"passes-{key.hexdigest()[:16]}.so"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = cache.stat()
    if not _only_ours(folder):
        if folder.st_uid == os.geteuid():  # closed; what lies in it is replaced, never loaded
            cache.chmod(0o700)
        else:
            cache = None
    elif (library := _kept(target, functions)) is not None:
        return library
    # A temporary folder is made 0700. Loaded from there, because the linker would take a library
    # at a path that it knows for the one that it has loaded already.
    with tempfile.TemporaryDirectory(dir=cache) as place:
        linked = _compile(compiler, flags, Path(place))
        library = ctypes.CDLL(str(linked))
        if not _has_all(library, functions):
            raise BuildError("the compiled library lacks a function")
        if cache is not None:
            os.replace(linked, target)
    return library


def _compile(compiler: list[str], flags: Sequence[str], place: Path) -> Path:
    compiled, linked = place / "passes.o", place / "passes.so"
    # Linked without OpenMP: its functions are found in the copy that torch has loaded. A second
    # copy would keep threads of its own, and the two would take turns waiting.
    commands: tuple[list[str | Path], ...]
    commands = ([*flags, "-c", SOURCE, "-o", compiled], ["-shared", compiled, "-o", linked])
    for command in commands:
        subprocess.run([*compiler, *command], check=True, capture_output=True, timeout=SECONDS)
    content = linked.read_bytes()
    linked.write_bytes(content + hashlib.sha256(content).digest())  # behind what a loader reads
    linked.chmod(0o700)  # whatever the umask
    return linked


def _kept(target: Path, functions: Sequence[str]) -> ctypes.CDLL | None:
    """Loads the library at `target`, or returns None where it must be compiled again."""
    try:
        found = target.lstat()
        if not stat.S_ISREG(found.st_mode) or not _only_ours(found):
            return None
        # Checked before it is loaded: a truncated one ends the process with SIGBUS.
        content = target.read_bytes()
        if hashlib.sha256(content[:-32]).digest() != content[-32:]:
            return None
        library = ctypes.CDLL(str(target))
    except OSError:
        return None
    return library if _has_all(library, functions) else None


def _only_ours(found: os.stat_result) -> bool:
    return found.st_uid == os.geteuid() and not found.st_mode & OTHERS_WRITE


def _has_all(library: ctypes.CDLL, functions: Sequence[str]) -> bool:
    return all(hasattr(library, name) for name in functions)


def _processor() -> str:
    """Describes what -march=native depends on: different machines may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    known = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.split("\t")[0].strip() in known}))


DTYPES = (torch.float32, torch.bfloat16)
FUNCTIONS = ("moments", "scale_and_add", "tail_forward", "tail_backward")


@functools.cache
def library() -> ctypes.CDLL | BuildError:
    """Returns the compiled passes, or the reason why there are none."""
    try:
        library = _load([f"eca_{name}" for name in FUNCTIONS])
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().partition("\n")[0]
        return BuildError(f"the C++ compiler failed: {said[:100]}")
    except subprocess.TimeoutExpired:
        return BuildError(f"the C++ compiler took more than {SECONDS} s")
    # RuntimeError: a user without a home folder, as in some containers.
    except (OSError, RuntimeError, BuildError) as error:
        return BuildError(str(error))
    flag: type[Any]
    size: type[Any]
    pointer: type[Any]
    number: type[Any]
    flag, size, pointer, number = ctypes.c_bool, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
    shape = [flag, flag, size, size, size]
    tail = [pointer, pointer, pointer, pointer, size, pointer, pointer]
    arguments: tuple[list[type[Any]], ...] = (
        [pointer] * 3,
        [pointer, pointer, pointer, size, pointer, flag, pointer],
        [*tail, flag, pointer, pointer, number, number, flag, number, pointer],
        [*tail, pointer, number, flag, *[pointer] * 5],
    )
    for name, others in zip(FUNCTIONS, arguments, strict=True):
        function = getattr(library, f"eca_{name}")
        function.argtypes, function.restype = shape + others, None
    return library


def why_not(dtype: torch.dtype = torch.float32) -> str | None:
    """Returns the reason why there are no compiled passes for `dtype`, or None if there are."""
    if dtype not in DTYPES:
        return f"compiled passes are not for {dtype}"
    found = library()
    return str(found) if isinstance(found, BuildError) else None


def serves(z: Tensor) -> bool:
    """Tells whether the compiled passes take z. The first call compiles the library."""
    return (
        z.device.type == "cpu"
        and z.dtype in DTYPES
        and not torch.compiler.is_compiling()
        and type(z) in (Tensor, nn.Parameter)  # a fake tensor has no memory to point at
        and why_not() is None
    )


def _compiled() -> ctypes.CDLL:
    found = library()
    assert not isinstance(found, BuildError)  # `serves` is asked first
    return found


def _shape(z: Tensor) -> tuple[bool, bool, int, int, int]:
    n, c, h, w = z.shape
    nhwc = h * w == 1 or not z.is_contiguous()  # one pixel is both: rows are then of all channels
    return z.dtype == torch.bfloat16, nhwc, n, c, h * w


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class _Tail(torch.autograd.Function):
    """One native call forward and one backward: on small tensors Python's time counts."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        weight: Tensor,
        bias: Tensor,
        kernel: Tensor | None,
        residual: Tensor | None,
        bn: nn.BatchNorm2d,
        ceiling: float | None,
    ) -> Tensor:
        shape = _shape(z)
        n, c = shape[2:4]
        batch = bn.training or bn.running_mean is None
        statistics, momentum = _statistics(bn)
        dense = [None if t is None else _dense(t) for t in statistics]
        parameters = [None if t is None else _dense(t) for t in (weight, bias, kernel)]
        taps = 0 if kernel is None else kernel.numel()
        # For backward: mean and 1/σ, (C,); with ECA also the pooled values and the gate, (N, C).
        kept = z.new_empty(2 * c if kernel is None else 2 * (n + 1) * c, dtype=torch.float32)
        out = torch.empty_like(z)
        _compiled().eca_tail_forward(
            *shape,
            z.data_ptr(),
            *map(_pointer, parameters),
            taps,
            kept.data_ptr(),
            _pointer(residual),
            batch,
            *map(_pointer, dense),
            momentum,
            bn.eps,
            ceiling is not None,
            ceiling or 0.0,
            out.data_ptr(),
        )
        for new, old in zip(dense, statistics, strict=True):
            if batch and old is not None and new is not None:
                if new is not old:
                    old.copy_(new)
                increment_version(old)  # what has kept it for a backward pass is told
        ctx.save_for_backward(z, None if ceiling is None else out, weight, bias, kernel, kept)
        ctx.rest = shape, batch, ceiling
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, out, weight, bias, kernel, kept = ctx.saved_tensors
        shape, batch, ceiling = ctx.rest
        refuse_second_derivative()
        of_z, _, _, _, of_residual = ctx.needs_input_grad[:5]
        if grad.stride() != z.stride():
            grad = grad.contiguous(memory_format=format_of(z))
        parameters = [None if t is None else _dense(t) for t in (weight, bias, kernel)]
        gradients = [None if t is None else torch.empty_like(t) for t in parameters]
        d = torch.empty_like(z) if of_residual and out is not None else None
        dz = torch.empty_like(z) if of_z else None
        _compiled().eca_tail_backward(
            *shape,
            z.data_ptr(),
            *map(_pointer, parameters),
            0 if kernel is None else kernel.numel(),
            kept.data_ptr(),
            grad.data_ptr(),
            _pointer(out),
            ceiling or 0.0,
            batch,
            _pointer(d),
            *map(_pointer, gradients),
            _pointer(dz),
        )
        if weight.dtype is not torch.float32:
            gradients = [None if g is None else g.to(weight.dtype) for g in gradients]
        return dz, *gradients, grad if d is None and of_residual else d, None, None


def tail(
    z: Tensor,
    bn: nn.BatchNorm2d,
    kernel: Tensor | None,
    residual: Tensor | None,
    ceiling: float | None,
) -> Tensor:
    """Computes `block_tail.fused_tail`; z and residual are dense in one format."""
    return cast(Tensor, _Tail.apply(z, bn.weight, bn.bias, kernel, residual, bn, ceiling))


def _statistics(bn: nn.BatchNorm2d) -> tuple[tuple[Tensor | None, Tensor | None], float]:
    """Returns the running statistics to read or to move, and how far; counts the batch."""
    momentum, batches = bn.momentum, bn.num_batches_tracked
    if bn.training:
        if not bn.track_running_stats or bn.running_mean is None:
            return (None, None), 0.0
        if batches is not None:
            batches.add_(1)
            if momentum is None:
                momentum = 1 / int(batches)  # the average over all batches
        elif momentum is None:
            return (None, None), 0.0
    return (bn.running_mean, bn.running_var), momentum or 0.0


def refuse_second_derivative() -> None:
    """Raises ValueError inside a backward pass with create_graph=True."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise ValueError(
            "a fused block tail has no second derivative (create_graph=True): call"
            " models.set_fused(network, False) before the forward pass"
        )


def format_of(z: Tensor) -> torch.memory_format:
    """Returns z's memory format; if z has gaps, the format that its dense copy should have."""
    nhwc = z.stride(1) == 1 and not z.is_contiguous()
    return torch.channels_last if nhwc else torch.contiguous_format


def _dense(small: Tensor) -> Tensor:
    """Returns `small` in float32 without gaps: a parameter may be a strided view."""
    ready = small.dtype is torch.float32 and small.is_contiguous()
    return small if ready else small.to(torch.float32).contiguous()


def _is_dense(z: Tensor) -> bool:
    return z.is_contiguous() or z.is_contiguous(memory_format=torch.channels_last)


def pixel_means(z: Tensor) -> Tensor:
    """Computes means over the pixels, (N, C) in the accumulation dtype, for z of any strides."""
    if not (serves(z) and _is_dense(z)):
        return z.mean((2, 3), dtype=accumulation_dtype(z.dtype))
    means, variances = z.new_empty((2, *z.shape[:2]), dtype=torch.float32).unbind()
    _compiled().eca_moments(*_shape(z), *map(_pointer, (z, means, variances)))
    return means


def finish_in_place(
    z: Tensor, scale: Tensor | None, residual: Tensor | None, activation: bool
) -> Tensor:
    """Computes act(z · scale + residual) without gradients, act being ReLU; it may overwrite z.

    scale is (N, C) in the accumulation dtype, or None for 1.
    """
    same = residual is None or residual.stride() == z.stride()
    if serves(z) and _is_dense(z) and same:
        if scale is None:
            scale = z.new_ones(1, z.shape[1], dtype=torch.float32)
        scale, shift = scale.contiguous(), torch.zeros_like(scale)
        step = z.shape[1] if len(scale) == len(z) else 0
        _compiled().eca_scale_and_add(
            *_shape(z),
            *map(_pointer, (z, scale, shift)),
            step,
            _pointer(residual),
            activation,
            z.data_ptr(),
        )
        return z
    if scale is None:
        y = z if residual is None else z + residual
    else:
        scale = scale.to(z.dtype)[:, :, None, None]
        y = z * scale if residual is None else torch.addcmul(residual, z, scale)
    return y.relu() if activation else y
