"""The Triton kernels, compiled ahead of time for GPUs that need not be there.

The operators run on tensors of a CPU, as far as the launches: Triton specialises each kernel for
its arguments as it would on the GPU (integers equal to 1 become constants, divisors of 16 are
noticed), compiles it, and stops there.
"""

import math
import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed here")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from models.fused import triton_tail  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is in the compiler's place"
)
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
PASSES = ("moments", "apply", "gradient_sums", "gradient_input")  # the kernels over large tensors


class FakeGPU:
    """In the place of Triton's driver."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_device(self):
        return -self.capability  # Triton keeps compiled kernels under this number

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)


class Launch(NamedTuple):
    kernel: str
    grid: tuple
    code: dict  # by stage of the compiler: ttir, ttgir, ptx, cubin


@pytest.fixture
def launches(monkeypatch):
    """A function of a shape and form → {kernel: its launch} in a tail's forward and backward."""
    found = {}
    plain_run = JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        compiled = plain_run(self, *args, grid=grid, warmup=True, **kwargs)
        found[self.__name__] = Launch(self.__name__, grid, compiled.asm)

    monkeypatch.setattr(JITFunction, "run", run)

    def launch(
        shape,
        memory_format="nhwc",
        dtype=torch.bfloat16,
        capability=90,
        eca=True,
        residual=True,
        ceiling=math.inf,
        training=True,
        want_residual=True,
    ):
        monkeypatch.setattr(triton.runtime.driver, "_active", FakeGPU(capability))
        found.clear()
        z, r = (torch.empty(shape, dtype=dtype) for _ in range(2))
        z, r = (t.to(memory_format=FORMATS[memory_format]) for t in (z, r))
        vector, kernel = torch.ones(shape[1]), torch.ones(5) if eca else None
        given = (None, None) if training else (vector, vector)
        out, mean, _, inverse_std, pooled, gate = triton_tail.tail_forward(
            z, vector, vector, kernel, r if residual else None, *given, 1e-5, ceiling
        )
        triton_tail.tail_backward(
            r,
            z,
            None if ceiling is None else out,
            vector,
            vector,
            kernel,
            mean if training else vector,
            inverse_std,
            pooled if eca else None,
            gate if eca else None,
            training,
            True,
            residual and want_residual,
            ceiling,
        )
        return dict(found)

    return launch


@pytest.fixture
def stack_bytes(tmp_path):
    """A function of a launch → what a thread keeps in memory because its registers do not suffice.

    Triton brings the tool along that reads this from the machine code.
    """
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"

    def of(launch):
        code = tmp_path / f"{launch.kernel}.cubin"
        code.write_bytes(launch.code["cubin"])
        command = [tool, "--dump-resource-usage", code]
        done = subprocess.run(command, capture_output=True, check=True, text=True)
        return int(re.search(r"STACK:(\d+)", done.stdout)[1])

    return of


def accesses(launch, kind):
    """The widths in which the kernel loads ("ld") or stores ("st"): {"v4.b32", "b32", "b16", …}."""
    return set(re.findall(rf"{kind}\.global\.(\S+)", launch.code["ptx"]))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_even_sizes_move_16_bytes_at_a_time(
    memory_format, dtype, capability, launches, stack_bytes
):
    found = launches((2, 256, 16, 16), memory_format, dtype, capability)
    assert len(found) == 8
    for name in PASSES:
        assert f"sm_{capability}" in found[name].code["ptx"]
        assert stack_bytes(found[name]) == 0
        assert "v4.b32" in accesses(found[name], "ld")
        assert "b16" not in accesses(found[name], "ld") | accesses(found[name], "st")
    for name in ("apply", "gradient_input"):  # nothing small is stored
        assert accesses(found[name], "st") == {"v4.b32"}


@pytest.mark.parametrize(
    ("shape", "memory_format", "width"),
    [
        ((2, 2048, 7, 7), "nchw", "b16"),
        ((2, 1024, 14, 14), "nchw", "v2.b32"),
        ((2, 24, 7, 7), "nhwc", "v4.b32"),
    ],
)
def test_sizes_that_16_does_not_divide(shape, memory_format, width, launches, stack_bytes):
    """No register spills, and a thread moves as many elements at a time as divide a line."""
    found = launches(shape, memory_format)
    for name in PASSES:
        assert stack_bytes(found[name]) == 0
        assert width in accesses(found[name], "ld")
    assert accesses(found["apply"], "st") == accesses(found["gradient_input"], "st") == {width}


@pytest.mark.parametrize("shape", [(1, 3, 7, 7), (2, 1, 4, 4), (3, 33, 1, 1)])
def test_integers_equal_to_1(shape, launches):
    """A batch of one, one channel, one pixel, one split: constants in the kernels' code."""
    assert len(launches(shape)) == 8


def test_evaluation_and_no_attention(launches):
    found = launches((1, 24, 7, 7), training=False)
    assert len(re.findall("tt.reduce.return", found["moments"].code["ttir"])) == 2  # no squares
    assert set(launches((1, 24, 7, 7), training=False, eca=False)) == {
        "apply",
        "gradient_sums",
        "parameter_gradients",
        "gradient_input",
    }


def test_float16(launches):
    found = launches((2, 256, 16, 16), dtype=torch.float16)
    assert all(".f16" in found[name].code["ptx"] for name in PASSES)


def large(launch, operation):
    """How often the kernel loads or stores a tile of a large tensor."""
    code = launch.code["ttir"]
    return len(re.findall(rf"tt\.{operation} .*tensor<\d+x\d+x!tt\.ptr<bf16>>", code))


def test_backward_moves_seven_tensors(launches):
    """With a residual's gradient, which one kernel writes and the other reads, and without: then
    both mask the output's gradient."""
    for want_residual, reads, writes in ((True, (3, 2), (1, 1)), (False, (3, 3), (0, 1))):
        found = launches((2, 64, 8, 8), want_residual=want_residual)
        kernels = [found[name] for name in ("gradient_sums", "gradient_input")]
        assert tuple(large(kernel, "load") for kernel in kernels) == reads
        assert tuple(large(kernel, "store") for kernel in kernels) == writes


def test_threads_meet_once_a_program(launches):
    """No sum over a tile inside the loop over tiles, where it would hold the loads up."""
    found = launches((2, 64, 32, 32))
    for name in ("moments", "gradient_sums"):
        code = found[name].code["ttir"]
        loop = re.search(r"^( +)\S[^\n]* = scf\.for .*?^\1}", code, re.DOTALL | re.MULTILINE)[0]
        assert "tt.load" in loop
        assert "tt.reduce" in code
        assert "tt.reduce" not in loop


def test_programs_fill_a_large_gpu_several_times():
    for memory_format in FORMATS:
        found = {}
        for c, size in ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)):
            z = torch.empty(256, c, size, size, device="meta")
            z = z.to(memory_format=FORMATS[memory_format])
            parts, splits = triton_tail.Grid.of(z, triton_tail.REDUCE).programs
            found[c] = parts * splits
            assert splits <= 5  # one after the other are they merged
        assert min(found.values()) >= 1056, found
