"""Files as other programs leave them: plain values are passed over, code is refused by name."""

import argparse
import datetime
import pathlib
import random
import subprocess
import types

import numpy as np
import pytest
import torch
import torchvision

from utils.runs import checkpoint
from utils.runs.checkpoint import CorruptCheckpointError
from utils.system.errors import UserError


@pytest.mark.parametrize("zip_format", [True, False])
def test_plain_values_beside_the_weights_are_passed_over(tmp_path, zip_format):
    weights = {"weight": torch.arange(3.0)}
    whole = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
    kinds = ["bool", *whole, "float16", "float32", "float64"]
    beside = {
        **{kind: np.dtype(kind).type(1) for kind in kinds},
        "str": np.str_("é"),
        "array": np.arange(4),
        "big endian": np.arange(4, dtype=">f4"),
        "random": np.random.RandomState(0).get_state(),
        "python random": random.getstate(),
        "args": argparse.Namespace(lr=0.1, data=pathlib.Path("a/b"), best=np.float64(3)),
        "more": types.SimpleNamespace(x=1),
        "folder": pathlib.PurePosixPath("/x/y"),
    }
    torch.save(
        {"model": weights, **beside}, tmp_path / "a.pth", _use_new_zipfile_serialization=zip_format
    )
    before = set(torch.serialization.get_safe_globals())
    held = checkpoint.load(tmp_path / "a.pth")
    assert held.keys() == {"model", *beside}
    assert torch.equal(held["model"]["weight"], weights["weight"])
    assert {str(held[name]) for name in ("args", "folder")} == {"a value that was not read"}
    assert (
        set(torch.serialization.get_safe_globals()) == before
    )  # for one file, not for the process


class Trap:
    """An object that calls one of the passed names with arguments of an attacker's choice."""

    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


def test_nothing_of_numpy_is_called(tmp_path):
    """numpy itself would refuse eight bytes as a scalar of 16."""
    scalar = np.float64(0).__reduce__()[0]
    torch.save({"x": Trap(scalar, np.dtype("c16"), b"12345678")}, tmp_path / "trap.pth")
    assert str(checkpoint.load(tmp_path / "trap.pth")["x"]) == "a value that was not read"


@pytest.mark.parametrize("zip_format", [True, False])
def test_a_whole_model_is_refused_by_its_class(tmp_path, zip_format):
    network = torchvision.models.mobilenet_v2(num_classes=2)
    torch.save(network, tmp_path / "whole.pth", _use_new_zipfile_serialization=zip_format)
    with pytest.raises(UserError) as caught:
        checkpoint.load(tmp_path / "whole.pth")
    said = str(caught.value)
    assert "an object of torchvision.models.mobilenetv2.MobileNetV2" in said
    assert "torch.save(model.state_dict(), 'weights.pth')" in said
    assert "\n" not in said
    assert not isinstance(caught.value, CorruptCheckpointError)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (datetime.date(2020, 1, 1), "datetime.date"),
        (Trap(subprocess.run, ["true"]), "commands.run"),  # its name in pickle's protocol 2
        (Trap(getattr, "x", "upper"), "getattr"),
    ],
)
def test_other_types_stay_refused(tmp_path, value, name):
    torch.save({"x": value}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=f"holds an object of {name}, which needs code"):
        checkpoint.load(tmp_path / "x.pth")


def test_torchscript_is_refused_with_what_to_do(tmp_path):
    scripted = torch.jit.script(torch.nn.Linear(2, 2))
    scripted.save(tmp_path / "scripted.pt")
    with pytest.raises(UserError, match=r"TorchScript.*torch.jit.load\('scripted.pt'\).state_dict"):
        checkpoint.load(tmp_path / "scripted.pt")


def test_an_exported_program_is_refused_with_what_to_do(tmp_path):
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(program, tmp_path / "program.pt2")
    (tmp_path / "program.pt2").rename(tmp_path / "renamed.pth")
    with pytest.raises(UserError, match=r"a program of torch\.export.* --to onnx writes"):
        checkpoint.load(tmp_path / "renamed.pth")
    (tmp_path / "bees.onnx").touch()
    with pytest.raises(UserError, match=r"a file of export\.py, which predict\.py takes, and main"):
        checkpoint.load(tmp_path / "bees.onnx")


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\x89HDF\r\n\x1a\n...", "Keras or HDF5"),
    ],
)
def test_what_was_downloaded_instead_is_named(tmp_path, start, said):
    (tmp_path / "x.pth").write_bytes(start)
    with pytest.raises(UserError, match=said):
        checkpoint.load(tmp_path / "x.pth")
