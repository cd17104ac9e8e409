"""The fused tail's passes over (N, C, H, W), and the choice of the form that serves a tensor best.

`Native` is for an eager CPU, compiled from native.cpp when first needed. For each of its passes
PyTorch's own operations need several passes over memory, and copies of bfloat16 in float32.
Compiling takes some seconds, once: the library is kept in `~/.cache/eca-net`, under a name that
changes with the source, the compiler and the processor, in a folder that nobody else can write to.
A library is code: one that another user could have put there, or changed, is never loaded. If there
is no C++ compiler, or something else is missing, `serves` returns False and the modules are called
one by one.

`Whole` is for torch.compile, which turns each of its expressions into one loop. Both forms have the
same passes, with the same arguments: z, residual, out and grad are (N, C, H, W) in one dtype and
memory format. All other tensors are (C,), (1, C) or (N, C) in the accumulation dtype: float64 for
float64, otherwise float32.
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
from typing import Any

import torch
from torch import Tensor, nn


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def over_pixels(small: Tensor) -> Tensor:
    """(N or 1, C) → (N or 1, C, 1, 1)."""
    return small[:, :, None, None]


class Whole:
    """Passes that are one expression each; `Native` computes the same."""

    @staticmethod
    def means(z: Tensor) -> Tensor:
        """Computes the means over the pixels: (N, C)."""
        return z.mean((2, 3), dtype=accumulation_dtype(z.dtype))

    @staticmethod
    def moments(z: Tensor, per_sample: bool) -> tuple[Tensor | None, Tensor, Tensor]:
        """Computes the means (N, C), or None; the mean (C,); and the biased variance (C,)."""
        x = z.to(accumulation_dtype(z.dtype))
        means = x.mean((2, 3))
        mean = means.mean(0)
        variance = (x - mean[:, None, None]).square().mean((0, 2, 3))
        return means if per_sample else None, mean, variance

    @staticmethod
    def scale_and_add(
        z: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, activation: bool
    ) -> Tensor:
        """Computes act(z · scale + shift + residual)."""
        y = z.to(scale.dtype) * over_pixels(scale) + over_pixels(shift)
        if residual is not None:
            y = y + residual
        return (y.relu() if activation else y).to(z.dtype)

    @staticmethod
    def gradient_sums(
        grad: Tensor, out: Tensor | None, z: Tensor, mean: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes d, which is grad where out > 0, and Σd and Σd·(z - mean), both (N, C).

        Without out, d is grad. Unless `keep` is set, the first result may be grad instead of d.
        """
        d = grad if out is None else torch.ops.aten.threshold_backward(grad, out, 0)
        wide = d.to(mean.dtype)
        sum_d = wide.sum((2, 3))
        sum_dz = (wide * (z.to(mean.dtype) - mean[:, None, None])).sum((2, 3))
        return (d if keep else grad), sum_d, sum_dz

    @staticmethod
    def gradient_input(
        grad: Tensor,
        out: Tensor | None,
        z: Tensor,
        on_grad: Tensor,
        on_z: Tensor | None,
        constant: Tensor | None,
    ) -> Tensor:
        """Computes ∂z = on_grad · d + on_z · z + constant, with d as above; None is zero."""
        d = grad if out is None else torch.ops.aten.threshold_backward(grad, out, 0)
        dz = d.to(on_grad.dtype) * over_pixels(on_grad)
        if on_z is not None:
            dz = dz + z.to(on_grad.dtype) * over_pixels(on_z)
        if constant is not None:
            dz = dz + over_pixels(constant)
        return dz.to(z.dtype)


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
FUNCTIONS = ("moments", "scale_and_add", "gradient_sums", "gradient_input")


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
    flag, size, pointer = ctypes.c_bool, ctypes.c_int64, ctypes.c_void_p
    shape = [flag, flag, size, size, size]
    arguments: tuple[list[type[Any]], ...] = (
        [pointer] * 3,
        [pointer, pointer, pointer, size, pointer, flag, pointer],
        [pointer] * 7,
        [*[pointer] * 6, size, pointer],
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
    """Tells whether `Native` takes z. The first call compiles the library."""
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
    return z.dtype == torch.bfloat16, not z.is_contiguous(), n, c, h * w


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Native:
    """The passes of `Whole`, with the same arguments, each in one loop over memory."""

    @staticmethod
    def means(z: Tensor) -> Tensor:
        return Native._moments(z)[0]

    @staticmethod
    def moments(z: Tensor, per_sample: bool) -> tuple[Tensor | None, Tensor, Tensor]:
        means, variances = Native._moments(z)
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        return means if per_sample else None, mean, variance

    @staticmethod
    def _moments(z: Tensor) -> tuple[Tensor, Tensor]:
        means = z.new_empty(z.shape[:2], dtype=torch.float32)
        variances = torch.empty_like(means)
        _compiled().eca_moments(*_shape(z), *map(_pointer, (z, means, variances)))
        return means, variances

    @staticmethod
    def scale_and_add(
        z: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        activation: bool,
        out: Tensor | None = None,
    ) -> Tensor:
        """Computes `Whole.scale_and_add`, into `out` if given; `out` may be z itself."""
        out = torch.empty_like(z) if out is None else out
        scale, shift, step = _rows(scale, shift, len(z))
        _compiled().eca_scale_and_add(
            *_shape(z),
            *map(_pointer, (z, scale, shift)),
            step,
            _pointer(residual),
            activation,
            _pointer(out),
        )
        return out

    @staticmethod
    def gradient_sums(
        grad: Tensor, out: Tensor | None, z: Tensor, mean: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        d = torch.empty_like(z) if keep and out is not None else None
        sum_d = z.new_empty(z.shape[:2], dtype=torch.float32)
        sum_dz = torch.empty_like(sum_d)
        tensors = (grad, out, z, mean.contiguous(), d, sum_d, sum_dz)
        _compiled().eca_gradient_sums(*_shape(z), *map(_pointer, tensors))
        return grad if d is None else d, sum_d, sum_dz

    @staticmethod
    def gradient_input(
        grad: Tensor,
        out: Tensor | None,
        z: Tensor,
        on_grad: Tensor,
        on_z: Tensor | None,
        constant: Tensor | None,
    ) -> Tensor:
        dz = torch.empty_like(z)
        constant = torch.zeros_like(on_grad) if constant is None else constant
        on_grad, constant, step = _rows(on_grad, constant, len(z))
        on_z = None if on_z is None else on_z.contiguous()
        _compiled().eca_gradient_input(
            *_shape(z),
            *map(_pointer, (grad, out, z, on_grad, on_z, constant)),
            step,
            _pointer(dz),
        )
        return dz


def _rows(a: Tensor, b: Tensor, n: int) -> tuple[Tensor, Tensor, int]:
    """Returns a and b, (1, C) or (N, C), in one shape, and the step to the next sample's row."""
    if len(a) != len(b):
        a, b = torch.broadcast_tensors(a, b)
    step = a.shape[1] if len(a) == n else 0
    return a.contiguous(), b.contiguous(), step


def passes_for(z: Tensor) -> type[Whole] | type[Native]:
    """Returns the form of the passes that is fastest for z."""
    return Native if serves(z) else Whole


def _is_dense(z: Tensor) -> bool:
    return z.is_contiguous() or z.is_contiguous(memory_format=torch.channels_last)


def pixel_means(z: Tensor) -> Tensor:
    """Computes means over the pixels, (N, C) in the accumulation dtype, for z of any strides."""
    passes = passes_for(z)
    return (passes if passes is not Native or _is_dense(z) else Whole).means(z)


def finish_in_place(
    z: Tensor, scale: Tensor | None, residual: Tensor | None, activation: bool
) -> Tensor:
    """Computes act(z · scale + residual) without gradients; it may overwrite z.

    scale is (N, C) in the accumulation dtype, or None for 1.
    """
    passes = passes_for(z)
    if passes is Native and _is_dense(z) and (residual is None or residual.stride() == z.stride()):
        scale = z.new_ones(1, z.shape[1], dtype=torch.float32) if scale is None else scale
        return Native.scale_and_add(z, scale, torch.zeros_like(scale), residual, activation, z)
    if scale is None:
        y = z if residual is None else z + residual
    else:
        scale = over_pixels(scale.to(z.dtype))
        y = z * scale if residual is None else torch.addcmul(residual, z, scale)
    return y.relu() if activation else y
