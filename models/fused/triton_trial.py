"""Tells whether the Triton operators of the fused tail work on a device, by trying them.

Their results are compared with those of PyTorch's own operations in double precision, on shapes
that take every way through the kernels: a wrong number is worse than none. Without Triton's kernels
the modules are called one by one.
"""

import itertools
import math
import threading
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from . import formulas, triton_tail
from .cpu_passes import Wanted

OLDEST = (7, 0)  # compute capability; torch.compile refuses older ones to Triton, too

_reasons: dict[tuple[torch.device, torch.dtype], str | None] = {}
_lock = threading.Lock()


# Dynamo calls it while it traces, and traces the answer.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns None if the operators run on the device in the dtype, otherwise the reason, one line.

    The first call tries them, and compares what they compute with `formulas` in double precision:
    when first used, Triton needs a C compiler, and a driver that takes its code.
    """
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"  # a trial would break it: asked again later
    with _lock:  # DataParallel asks from a thread for each device
        if (device, dtype) not in _reasons:
            _reasons[device, dtype] = _tried(device, dtype)
        return _reasons[device, dtype]


def _tried(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST:
            return "compute capability {}.{}, and Triton needs {}.{}".format(*capability, *OLDEST)
    try:
        # A compiler that asks while it traces has only tensors without numbers.
        with unset_fake_temporarily(), torch.no_grad():
            for shape, layout, form in itertools.product(TRIAL_SHAPES, LAYOUTS, TRIAL_FORMS):
                if wrong := _wrong_result(device, dtype, shape, layout, form):
                    return f"its {wrong} is wrong on this device"
    except Exception as error:  # of Triton, the compilers or the driver: no one list of kinds
        first_line = str(error).strip().partition("\n")[0]
        return f"{type(error).__name__}: {first_line}"
    return None


# More than 128 samples; partial tiles, pixels split among programs, and two blocks of gates.
TRIAL_SHAPES = ((130, 24, 3, 3), (2, 152, 9, 9))
LAYOUTS = (torch.contiguous_format, torch.channels_last)


class Form(NamedTuple):
    eca: bool
    shortcut: bool  # something is added
    batch: bool  # the batch's statistics, not given ones
    ceiling: float | None


TRIAL_FORMS = (
    Form(True, True, True, math.inf),
    Form(True, False, False, None),
    Form(False, False, True, 6.0),
)
# Of the largest value: half a digit of what is rounded once, and sums in float32.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
OF_VECTORS = 2e-5


def _wrong_result(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    layout: torch.memory_format,
    form: Form,
) -> str | None:
    """Returns the name of the first result that is not that of `formulas`; None for none."""
    chance, c = torch.Generator().manual_seed(0), shape[1]  # its own: nobody else's numbers change

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=chance, device="cpu")

    # No channel so narrow about its mean that float32 itself is the error.
    spread, centre = drawn(1, c, 1, 1).abs() + 0.5, drawn(1, c, 1, 1)
    large = [(spread * drawn(*shape) + centre).to(dtype) for _ in range(3)]
    small = [3 * drawn(c), drawn(c), drawn(5), drawn(c), drawn(c).square() + 0.1]
    out, found = _of_triton(
        [x.to(device).to(memory_format=layout) for x in large],
        [x.to(device) for x in small],
        form,
    )
    expected = _exact([x.double() for x in large], [x.double() for x in small], out, form)
    for name, exact in expected.items():
        if exact is None:
            continue  # not computed in this form
        error = (found[name].cpu().double() - exact).abs().max()
        tolerance = TOLERANCES[dtype] if exact.dim() == 4 else OF_VECTORS
        if not error <= tolerance * exact.abs().max():  # also where it is NaN
            return name
    return None


GRADIENTS = ("z", "weight", "bias", "kernel", "residual")


def _of_triton(
    large: list[Tensor],
    small: list[Tensor],
    form: Form,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the operators' output, and every result by its name."""
    (z, residual, grad), (weight, bias, kernel, mean, variance) = large, small
    taps, added = kernel if form.eca else None, residual if form.shortcut else None
    given = (None, None) if form.batch else (mean, variance)
    out, new_mean, unbiased, inverse_std, pooled, gate = triton_tail.tail_forward(
        z, weight, bias, taps, added, given[0], given[1], 1e-5, form.ceiling
    )
    if form.batch:
        mean, variance = new_mean, unbiased
    pooled, gate = (pooled, gate) if form.eca else (None, None)
    masks = None if form.ceiling is None else out
    gradients = triton_tail.tail_backward(
        grad,
        z,
        masks,
        weight,
        bias,
        taps,
        mean,
        inverse_std,
        pooled,
        gate,
        form.batch,
        True,
        form.shortcut,
        form.ceiling,
    )
    named = {f"gradient of {k}": g for k, g in zip(GRADIENTS, gradients, strict=True)}
    if masks is None:
        named["gradient of residual"] = grad  # the operator leaves it out
    return out, {"output": out, "mean": mean, "variance": variance, **named}


def _exact(
    large: list[Tensor],
    small: list[Tensor],
    out: Tensor,
    form: Form,
) -> dict[str, Tensor | None]:
    """Returns the same by PyTorch's own operations, masked by the output that was found."""
    (z, residual, grad), (weight, bias, kernel, mean, variance) = large, small
    taps, added = kernel if form.eca else None, residual if form.shortcut else None
    given = None if form.batch else (mean, variance)
    exact, used, kept = formulas.tail_forward(
        z, weight, bias, taps, added, given, 1e-5, form.ceiling
    )
    masks = None if form.ceiling is None else out.cpu().double()
    every = Wanted(True, True, True, True, form.shortcut)
    gradients = formulas.tail_backward(
        grad, z, masks, weight, bias, taps, kept, form.batch, every, form.ceiling
    )
    named = {f"gradient of {k}": g for k, g in zip(GRADIENTS, gradients, strict=True)}
    return {"output": exact, "mean": kept.mean, "variance": used, **named}
