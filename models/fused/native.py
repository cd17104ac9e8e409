"""The fused tail's passes for an eager CPU, compiled from native.cpp when first needed.

For each of them PyTorch's own operations need several passes over memory, and copies of bfloat16 in
float32. Compiling takes some seconds, once: the library is kept in `~/.cache/eca-net`, under a name
that changes with the source, the compiler and the processor. If there is no C++ compiler, or
something else is missing, `serves` returns False and `Chunked` does the work.
"""

import ctypes
import functools
import subprocess
from typing import Any

import torch
from torch import Tensor, nn

from . import native_library
from .native_library import BuildError

DTYPES = (torch.float32, torch.bfloat16)
FUNCTIONS = ("moments", "scale_and_add", "gradient_sums", "gradient_input")


@functools.cache
def library() -> ctypes.CDLL | BuildError:
    """Returns the compiled passes, or the reason why there are none."""
    try:
        library = native_library.load([f"eca_{name}" for name in FUNCTIONS])
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().partition("\n")[0]
        return BuildError(f"the C++ compiler failed: {said[:100]}")
    except subprocess.TimeoutExpired:
        return BuildError(f"the C++ compiler took more than {native_library.SECONDS} s")
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
