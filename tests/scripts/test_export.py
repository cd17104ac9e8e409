"""export.py: what is written computes what the checkpoint computes, at any batch and size."""

import importlib.util
import json

import pytest
import torch
from helpers.classifier_checkpoints import write_checkpoint
from torch import nn

import predict
from utils.data.transforms import Preprocessing
from utils.inspection import export as formats
from utils.runs import foreign_files
from utils.runs.checkpoint import Checkpoint
from utils.system.errors import UserError

pytestmark = pytest.mark.usefixtures("thin")


def test_all_formats(export_cli, tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    pytest.importorskip("safetensors")
    network = write_checkpoint(tmp_path / "best.pth")
    code, text = export_cli("best.pth")
    assert code == 0, text
    assert "MB, any batch, any size; logits within" in text
    assert "best.pt2" in text
    assert "sizes above 32" in text

    images = [torch.randn(n, 3, h, w) for n, h, w in ((1, 48, 48), (5, 40, 72), (2, 33, 33))]
    expected = [network(x).detach() for x in images]
    data = (tmp_path / "best.onnx").read_bytes()
    session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])
    assert [x.shape for x in session.get_inputs()] == [["batch", 3, "height", "width"]]
    assert [x.shape for x in session.get_outputs()] == [["batch", 3]]
    for x, y in zip(images, expected, strict=True):
        (found,) = session.run(None, {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), y, rtol=1e-4, atol=1e-4)
    model = onnx.load_from_string(data)
    assert not [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    held = {entry.key: entry.value for entry in model.metadata_props}
    assert held["arch"] == "eca_resnet18"
    assert json.loads(held["classes"]) == ["a", "b", "ü"]
    assert json.loads(held["mean"]) == [0.485, 0.456, 0.406]
    assert (held["img_size"], held["crop_pct"], held["ksize"]) == ("48", "0.9", "[3, 5, 7, 7]")

    extra = {formats.METADATA: ""}
    program = torch.export.load(tmp_path / "best.pt2", extra_files=extra)
    assert json.loads(extra[formats.METADATA])["classes"] == ["a", "b", "ü"]
    assert "batch_norm" not in program.graph_module.code
    for x, y in zip(images, expected, strict=True):
        torch.testing.assert_close(program.module()(x), y, rtol=1e-4, atol=1e-4)

    # safetensors hold the checkpoint's own tensors, and make a checkpoint again.
    loaded = Checkpoint.read(tmp_path / "best.safetensors")
    again = loaded.network()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in network.state_dict().items())
    assert loaded.preprocessing() == Preprocessing(48, 0.9)
    (tmp_path / "x.ppm").write_bytes(b"P6 2 2 255 " + bytes(range(12)))
    one, two = (
        export_cli(ckpt, "x.ppm", main=predict.main) for ckpt in ("best.pth", "best.safetensors")
    )
    assert one == two
    assert one[0] == 0

    # Nothing is overwritten; a missing package is said before any work.
    before = (tmp_path / "best.onnx").read_bytes()
    code, text = export_cli("best.pth")
    assert code == 2
    assert "best.onnx: is there already; move it, or choose another --output" in text
    assert (tmp_path / "best.onnx").read_bytes() == before
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if "onnx" in name else found(name)
    )
    code, text = export_cli("best.pth", "--output", "other")
    assert code == 2
    assert text == (
        "error: --to onnx needs onnx, onnxscript, onnxruntime: "
        "pip install -r requirements-export.txt\n"
    )
    assert not (tmp_path / "other").exists()


def test_a_file_that_computes_something_else_is_refused():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))

    def check(written):
        return formats.largest_difference(written, network, [(2, 2, 2)], "x.onnx")

    assert check(network) == 0
    assert check(lambda x: network(x) * (1 + 5e-5)) == pytest.approx(5e-5, rel=0.1)
    for wrong in (lambda x: network(x) * 1.001, lambda x: network(x) * float("nan")):
        with pytest.raises(UserError, match=r"x\.onnx differs from the network by"):
            check(wrong)
    with pytest.raises(UserError, match=r"does not run at \(2, 3, 2, 2\): .*mat1 and mat2"):
        check(lambda x: network(x[:, 1:]))


@pytest.mark.parametrize("damage", [0, 1])
def test_tensors_that_are_not_the_checkpoints_are_refused(
    export_cli, tmp_path, monkeypatch, damage
):
    pytest.importorskip("safetensors")
    write_checkpoint(tmp_path / "best.pth")
    write = foreign_files.to_safetensors
    monkeypatch.setattr(  # one bit of the last tensor's last byte
        foreign_files,
        "to_safetensors",
        lambda *a: (d := write(*a))[:-1] + bytes([d[-1] ^ damage]),
    )
    code, text = export_cli("best.pth", "--to", "safetensors")
    assert code == damage, text
    assert (tmp_path / "best.safetensors").exists() == (damage == 0)
    said = "error: best.safetensors does not hold the checkpoint's " in text
    assert said == (damage == 1)


def test_output_may_be_the_file_of_one_format(export_cli, tmp_path):
    """The ending says which; a folder with such a name stays a folder."""
    network = write_checkpoint(tmp_path / "best.pth", "eca_mobilenetv2", 48, width_mult=0.25)
    (tmp_path / "folder.safetensors").mkdir()
    small, tensors = ("--img-size", 32, "--no-fold"), ("--to", "safetensors")
    for output, flags, made in (
        ("folder.safetensors", tensors, "folder.safetensors/best.safetensors"),
        ("folder.v2", tensors, "folder.v2/best.safetensors"),
        ("new ä/bees.v1.pt2", small, "new ä/bees.v1.pt2"),
    ):
        code, text = export_cli("best.pth", *flags, "--output", output)
        assert code == 0, text
        assert (tmp_path / made).is_file()
        assert text.splitlines()[-1].startswith(f"{made}: ")
    # One image size, and BatchNorm as it is.
    assert "any batch, 32 x 32 pixels" in text
    assert {path.name for path in (tmp_path / "new ä").iterdir()} == {"bees.v1.pt2"}
    extra = {formats.METADATA: ""}
    program = torch.export.load(tmp_path / "new ä" / "bees.v1.pt2", extra_files=extra)
    assert json.loads(extra[formats.METADATA])["img_size"] == 32
    assert "batch_norm" in program.graph_module.code
    for n in (1, 7):
        images = torch.randn(n, 3, 32, 32)
        torch.testing.assert_close(program.module()(images), network(images), rtol=1e-4, atol=1e-4)


def test_what_is_wrong_is_said_in_one_line(export_cli, tmp_path):
    write_checkpoint(tmp_path / "best.pth")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    detector = {"format": 1, "state_dict": {}, "arch": "retinanet", "backbone": "resnet18"}
    torch.save(detector, tmp_path / "det.pth")
    for arguments, message in [
        (("nowhere.pth",), "nowhere.pth: no such file"),
        (("bad.safetensors", "--to", "pt2"), "damaged, or not a safetensors file"),
        (("foreign.safetensors", "--to", "pt2"), "weights of no network known here: x"),
        (("det.pth",), "det.pth: not a detector's checkpoint, as it lacks attention"),
        (
            ("best.pth", "--to", "safetensors", "--no-fold"),
            "--no-fold is for onnx, openvino and pt2",
        ),
        (("best.pth", "--output", "x.onnx", "--to", "onnx", "pt2"), "x.onnx is a file, and --to"),
        (("best.pth", "--output", "x.onnx", "--to", "pt2"), "or --to onnx alone"),
        (("best.pth", "--output", "best.pth/x", "--to", "pt2"), "best.pth/x: cannot write to "),
        (("det.pth", "--output", "x.pt2"), "det.pth holds a detector, which is written as onnx"),
        (("best.pth", "--output", "bad.safetensors"), "choose another --output"),
    ]:
        code, text = export_cli(*arguments)
        assert (code, message in text) == (2, True), text
        assert len(text.splitlines()) == 1 + text.startswith("network:"), text
