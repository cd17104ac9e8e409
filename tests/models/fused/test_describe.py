"""What a run's report says of its block tails is how they run."""

from unittest.mock import Mock

import pytest
import torch

import models
from models.detection.detectors import create_detector
from models.fused import block_tail, cpu_passes

pytestmark = pytest.mark.usefixtures("no_compiler")

NO_COMPILER, NOT_FOR_HALF = "no C++ compiler", "compiled passes are not for torch.float16"
MODULES = f"block tails module by module ({NO_COMPILER})"
KERNEL = f"block tails by BatchNorm's own kernel, the rest in place ({NO_COMPILER})"
COMPILED = "fused block tails"
COMPARED = "fused block tails (Triton, compared on this GPU)"


@pytest.mark.parametrize(
    ("name", "native", "dtype", "tails", "of_blocks"),
    [
        ("eca_resnet18", False, torch.float32, MODULES, {}),
        ("eca_resnet18", True, torch.float32, COMPILED, {"fused_tail": 8}),
        ("eca_resnet18", True, torch.float16, MODULES.replace(NO_COMPILER, NOT_FOR_HALF), {}),
        ("resnet18", False, torch.float32, KERNEL, {"_plain_tail": 8}),
        (
            "resnet18",
            True,
            torch.float32,
            COMPILED + ", small ones by BatchNorm's own kernel",
            {"_plain_tail": 8},
        ),
        (
            "resnet18",
            True,
            torch.float16,
            KERNEL.replace(NO_COMPILER, NOT_FOR_HALF),
            {"_plain_tail": 8},
        ),
        ("se_resnet18", True, torch.float32, "block tails module by module (attention se)", {}),
        ("mobilenetv2", False, torch.float32, KERNEL, {"_plain_tail": 10}),
    ],
)
def test_on_a_cpu_the_tails_run_as_described(monkeypatch, name, native, dtype, tails, of_blocks):
    if native:
        monkeypatch.undo()  # what the fixture `no_compiler` has switched off
        if why := cpu_passes.why_not():
            pytest.skip(why)
    paths = {path: Mock(wraps=getattr(block_tail, path)) for path in ("fused_tail", "_plain_tail")}
    for path, counted in paths.items():
        monkeypatch.setattr(block_tail, path, counted)
    network = models.create_model(name, num_classes=2).eval().to(dtype)
    assert models.describe_tails(network, torch.device("cpu"), dtype=dtype) == tails
    with torch.no_grad():
        network(torch.zeros(1, 3, 64, 64, dtype=dtype))
    assert {p: c.call_count for p, c in paths.items() if c.called} == of_blocks


@pytest.mark.parametrize(
    ("name", "device", "triton", "flags", "tails"),
    [
        ("eca_resnet18", "cpu", False, {"fused": False}, "block tails module by module"),
        ("resnet18", "cpu", False, {"compiled": True}, "fused block tails"),
        ("eca_resnet18", "cuda", True, {}, COMPARED),
        (
            "eca_resnet18",
            "cuda",
            True,
            {"sync_bn": True},
            "block tails module by module (SyncBatchNorm)",
        ),
        ("eca_resnet18", "cuda", False, {}, "block tails module by module (no Triton)"),
        ("eca_resnet18", "cuda", False, {"compiled": True}, "fused block tails"),
        ("eca_resnet18", "mps", False, {}, "block tails module by module (no kernels for mps)"),
    ],
)
def test_elsewhere_the_description_says_why(monkeypatch, name, device, triton, flags, tails):
    why_not = None if triton else "no Triton"
    monkeypatch.setattr(block_tail, "why_not_triton", lambda *_: why_not)
    with torch.device("meta"):
        network = models.create_model(name, num_classes=2)
    assert models.describe_tails(network, torch.device(device), **flags) == tails


def test_triton_is_asked_for_the_precision_at_work(monkeypatch):
    """A GPU of before 2020 has no bfloat16 there."""
    monkeypatch.setattr(
        block_tail, "why_not_triton", lambda _, dtype: "old" if dtype == torch.bfloat16 else None
    )
    with torch.device("meta"):
        network = models.create_model("eca_resnet18", num_classes=2)
    for dtype, tails in (
        (torch.bfloat16, "block tails module by module (old)"),
        (torch.float16, COMPARED),
    ):
        assert models.describe_tails(network, torch.device("cuda"), dtype=dtype) == tails


def test_a_detector_s_tails_are_those_of_its_backbone():
    with torch.device("meta"):
        synced, other = (
            create_detector("retinanet", backbone, num_classes=2, norm=norm)
            for backbone, norm in (("eca_resnet18", "sync"), ("se_resnet18", "bn"))
        )
    cpu = torch.device("cpu")
    assert models.describe_tails(synced, cpu).endswith("(SyncBatchNorm)")
    assert models.describe_tails(other, cpu).endswith("(attention se)")
