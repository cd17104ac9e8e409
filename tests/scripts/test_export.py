"""export.py: what is written computes what the checkpoint computes, at any batch and size."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import export
import predict
from models import create_model, weights
from utils.data.user_images import read_batches
from utils.inspection import export_formats, quantisation
from utils.options.parser import run_script
from utils.runs import checkpoint, checkpoint_info, safetensors_file
from utils.system.errors import UserError


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """Runs a script's main in an empty folder and gives (exit code, all that it printed)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, main=export.main):
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            run_script(main)
        return end.value.code, "".join(capsys.readouterr())

    return call


def write_checkpoint(path, name="eca_resnet18", img_size=48, **kwargs):
    """A checkpoint as main.py writes it, of a network whose BatchNorms have seen something."""
    torch.manual_seed(0)
    network = create_model(name, num_classes=3, **kwargs)
    with torch.no_grad():
        network(torch.randn(8, 3, 64, 64) * 2 + 1)
    state = {
        **weights.describe_network(network),
        "classes": ["a", "b", "ü"],
        "img_size": img_size,
        "crop_pct": 0.9,
        "state_dict": network.state_dict(),
    }
    checkpoint.save(path, state)
    return network.eval()


def test_all_formats(cli, tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    pytest.importorskip("safetensors")
    network = write_checkpoint(tmp_path / "best.pth")
    code, text = cli("best.pth")
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

    extra = {export_formats.METADATA: ""}
    program = torch.export.load(tmp_path / "best.pt2", extra_files=extra)
    assert json.loads(extra[export_formats.METADATA])["classes"] == ["a", "b", "ü"]
    for x, y in zip(images, expected, strict=True):
        torch.testing.assert_close(program.module()(x), y, rtol=1e-4, atol=1e-4)

    # safetensors hold the checkpoint's own tensors, and make a checkpoint again.
    loaded = checkpoint.load(tmp_path / "best.safetensors")
    again = weights.network_from_checkpoint(loaded)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in network.state_dict().items())
    assert checkpoint_info.preprocessing(loaded) == (48, 0.9)
    (tmp_path / "x.ppm").write_bytes(b"P6 2 2 255 " + bytes(range(12)))
    one, two = (cli(ckpt, "x.ppm", main=predict.main) for ckpt in ("best.pth", "best.safetensors"))
    assert one == two
    assert one[0] == 0

    # Nothing is overwritten; a missing package is said before any work.
    before = (tmp_path / "best.onnx").read_bytes()
    code, text = cli("best.pth")
    assert (code, "best.onnx: is there already; move it, or choose another --output" in text) == (
        2,
        True,
    )
    assert (tmp_path / "best.onnx").read_bytes() == before
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if "onnx" in name else found(name)
    )
    code, text = cli("best.pth", "--output", "other")
    assert code == 2
    assert text == (
        "error: --to onnx needs onnx, onnxscript, onnxruntime: "
        "pip install -r requirements-export.txt\n"
    )
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("name", "img_size", "flags"),
    [("eca_resnet18", 32, ("--no-fold",)), ("eca_mobilenetv2", 48, ("--img-size", 32))],
)
def test_small_images(cli, tmp_path, name, img_size, flags):
    network = write_checkpoint(tmp_path / "tiny.pth.tar", name, img_size)
    code, text = cli("tiny.pth.tar", "--to", "pt2", "--output", "new/folder", *flags)
    assert code == 0, text
    assert "any batch, 32 x 32 pixels" in text
    extra = {export_formats.METADATA: ""}
    program = torch.export.load(tmp_path / "new/folder/tiny.pt2", extra_files=extra)
    assert json.loads(extra[export_formats.METADATA])["img_size"] == 32
    assert ("batch_norm" in program.graph_module.code) == ("--no-fold" in flags)
    for n in (1, 7):
        images = torch.randn(n, 3, 32, 32)
        torch.testing.assert_close(program.module()(images), network(images), rtol=1e-4, atol=1e-4)


def test_a_file_that_computes_something_else_is_refused():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))

    def check(written):
        return export_formats.largest_difference(written, network, [(2, 2, 2)], "x.onnx")

    assert check(network) == 0
    assert check(lambda x: network(x) * (1 + 5e-5)) == pytest.approx(5e-5, rel=0.1)
    for wrong in (lambda x: network(x) * 1.001, lambda x: network(x) * float("nan")):
        with pytest.raises(UserError, match=r"x\.onnx differs from the network by"):
            check(wrong)
    with pytest.raises(UserError, match=r"does not run at \(2, 3, 2, 2\): .*mat1 and mat2"):
        check(lambda x: network(x[:, 1:]))


@pytest.mark.parametrize("damage", [0, 1])
def test_tensors_that_are_not_the_checkpoints_are_refused(cli, tmp_path, monkeypatch, damage):
    pytest.importorskip("safetensors")
    write_checkpoint(tmp_path / "best.pth")
    write = safetensors_file.to_safetensors
    monkeypatch.setattr(  # one bit of the last tensor's last byte
        safetensors_file,
        "to_safetensors",
        lambda *a: (d := write(*a))[:-1] + bytes([d[-1] ^ damage]),
    )
    code, text = cli("best.pth", "--to", "safetensors")
    assert code == damage, text
    assert (tmp_path / "best.safetensors").exists() == (damage == 0)
    said = "error: best.safetensors does not hold the checkpoint's " in text
    assert said == (damage == 1)


def test_what_is_wrong_is_said_in_one_line(cli, tmp_path):
    write_checkpoint(tmp_path / "best.pth")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    detector = {"format": 1, "state_dict": {}, "arch": "retinanet", "backbone": "resnet18"}
    torch.save(detector, tmp_path / "det.pth")
    for arguments, message in [
        (("nowhere.pth",), "nowhere.pth: no such file"),
        (("nowhere.safetensors",), "nowhere.safetensors: no such file"),
        (("bad.safetensors", "--to", "pt2"), "damaged, or not a safetensors file"),
        (("foreign.safetensors", "--to", "pt2"), "weights of no network known here: x"),
        (("det.pth",), "det.pth: not a detector's checkpoint, as it lacks attention"),
        (
            ("best.pth", "--to", "safetensors", "--no-fold"),
            "--no-fold is for onnx, openvino and pt2",
        ),
        (("best.pth", "--to", "onyx"), "invalid choice: 'onyx'"),
        (("best.pth", "--output", "bad.safetensors"), "choose another --output"),
    ]:
        code, text = cli(*arguments)
        assert (code, message in text) == (2, True), text
        assert len(text.splitlines()) == 1 + text.startswith("network:"), text


def export_flags_that_do_not_fit():
    yield ("--int8", "D", "--to", "pt2"), "--int8 makes onnx and openvino: leave pt2 out"
    yield ("--int8", "D", "--no-fold"), "--int8 needs BatchNorm folded: leave --no-fold out"
    yield ("--max-drop", "2"), "--max-drop goes with --int8 DATA"
    yield ("--calibration-images", "2"), "--calibration-images goes with --int8 DATA"
    yield ("--int8", "nowhere"), "nowhere"


@pytest.mark.parametrize(("flags", "message"), export_flags_that_do_not_fit())
def test_flags_of_int8_that_do_not_fit(cli, tmp_path, flags, message):
    pytest.importorskip("onnxscript")
    write_checkpoint(tmp_path / "best.pth")
    code, text = cli("best.pth", *flags)
    assert (code, message in text.splitlines()[-1]) == (2, True), text


@pytest.fixture
def small_data(tmp_path):
    """A folder with train/ and val/ of three classes, in plain colours with noise."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 4)):
        for label, name in enumerate("abü"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 60, (60, 50, 3), dtype=np.uint8)
                pixels[..., label] += 150
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "data"


def write_fitted_checkpoint(path, train):
    """A checkpoint whose last layer was fitted to the images of a folder, so that it is right."""
    network = write_checkpoint(path)
    files = sorted(train.rglob("*.png"))
    (batch,) = read_batches([bytes(file) for file in files], 48, 0.9, 99, torch.device("cpu"))
    kept = []
    hook = network.fc.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    with torch.no_grad():
        network(batch.images)
    hook.remove()
    features = torch.cat([kept[0], torch.ones(len(files), 1)], 1).double()
    truth = torch.eye(3)[["abü".index(file.parent.name) for file in files]].double()
    solution = torch.linalg.pinv(features, rtol=1e-4) @ (10 * truth)
    state = checkpoint.load(path)
    state["state_dict"]["fc.weight"] = solution[:-1].T.float().contiguous()
    state["state_dict"]["fc.bias"] = solution[-1].float()
    checkpoint.save(path, state)


def test_int8_is_judged_and_refused_when_it_loses(cli, tmp_path, small_data, monkeypatch):
    for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    write_fitted_checkpoint(tmp_path / "best.pth", small_data / "train")
    code, text = cli("best.pth", "--to", "onnx", "openvino", "--int8", "data")
    assert code == 0, text
    assert "int8: calibrated on 18 of 18 training images" in text
    assert "of 12 validation images" in text
    for name in ("best.int8.onnx", "best.int8.xml", "best.int8.bin"):
        assert (tmp_path / name).exists()

    # The files give the same figures as predict.py sees them, and say that they are int8.
    code, shown = cli("best.int8.onnx", "data/val", "--format", "csv", main=predict.main)
    assert code == 0, shown
    assert "eca_resnet18 from best.int8.onnx, int8, run by onnxruntime" in shown
    rows = [line.split(",") for line in shown.splitlines() if line.startswith("data/val/")]
    right = sum(row[0].split("/")[2] == row[1] for row in rows)
    assert f"{100 * right / 12:.2f} % in int8" in text

    # A file that has become another network is not written.
    other = tmp_path / "other"
    quantise = quantisation.quantise

    def spoilt(onnx_file, batches):
        import onnx

        model = onnx.load_from_string(quantise(onnx_file, batches))
        for tensor in model.graph.initializer:
            if tensor.name == "fc.bias":
                shifted = onnx.numpy_helper.to_array(tensor) + np.float32([1e3, 0, 0])
                tensor.CopyFrom(onnx.numpy_helper.from_array(shifted, tensor.name))
        return model.SerializeToString()

    assert "onnx: top-1 100.00 % in float32" in text
    monkeypatch.setattr(quantisation, "quantise", spoilt)
    for limit in (50, 70):
        code, text = cli("best.pth", "--int8", "data", "--output", "other", "--max-drop", limit)
        assert "onnx: top-1 100.00 % in float32, 33.33 % in int8" in text
        refused = limit < 66.67
        assert code == int(refused), text
        said = "onnx in int8 loses 66.67 points of top-1, more than --max-drop 50: not written"
        assert (said in text) == refused
        assert (other / "best.int8.onnx").exists() != refused


def test_broken_images_and_other_classes_stop_int8(cli, tmp_path, small_data):
    pytest.importorskip("onnxscript")
    write_checkpoint(tmp_path / "best.pth")
    (small_data / "val" / "b" / "bad.png").write_bytes(b"no image")
    code, text = cli("best.pth", "--int8", "data")
    assert (code, "bad.png: not an image; repair or remove it" in text) == (1, True), text
    (small_data / "train" / "z").mkdir()
    (small_data / "train" / "z" / "x.png").write_bytes(
        (small_data / "train" / "a" / "0.png").read_bytes()
    )
    code, text = cli("best.pth", "--int8", "data")
    assert code == 2, text
    assert not list(tmp_path.glob("best.int8*"))
