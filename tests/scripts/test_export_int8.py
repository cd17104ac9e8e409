"""export.py --int8: calibrated, judged on validation images, and refused when it loses."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.classifier_checkpoints import write_checkpoint
from PIL import Image

import export
import predict
from utils.data.transforms import Preprocessing
from utils.inspection import int8
from utils.inspection.predictions import read_batches
from utils.runs import checkpoint

pytestmark = pytest.mark.usefixtures("thin")
GRAPHS: list = []  # what `traced_once` has traced


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--int8", "D", "--to", "pt2"), "--int8 makes onnx and openvino: leave pt2 out"),
        (("--int8", "D", "--no-fold"), "--int8 needs BatchNorm folded: leave --no-fold out"),
        (("--max-drop", "2"), "--max-drop goes with --int8 DATA"),
        (("--calibration-images", "2"), "--calibration-images goes with --int8 DATA"),
        (("--int8", "nowhere"), "nowhere"),
    ],
)
def test_flags_of_int8_that_do_not_fit(export_cli, tmp_path, monkeypatch, flags, message):
    pytest.importorskip("onnxscript")
    write_checkpoint(tmp_path / "best.pth")

    def traced(*_):
        raise AssertionError("minutes of tracing, before the flags were checked")

    monkeypatch.setattr(export.formats, "to_exported", traced)
    code, text = export_cli("best.pth", *flags)
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
    (batch,) = read_batches(
        [bytes(file) for file in files], Preprocessing(48, 0.9), 99, torch.device("cpu")
    )
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


@pytest.fixture
def traced_once(monkeypatch):
    """The first network that is traced stands for those after it: it takes seconds."""
    graph_file = export.graph_file

    def made_once(*settings):
        if not GRAPHS:
            GRAPHS.append(graph_file(*settings))
        return GRAPHS[0]

    monkeypatch.setattr(export, "graph_file", made_once)


def operations_before_the_gates(file):
    """The kinds of operations from each gate's pooling to its sigmoid; in 8 bits there are more."""
    import onnx

    nodes, kinds = onnx.load(file).graph.node, []
    made_by = {output: node for node in nodes for output in node.output}
    for node in (node for node in nodes if node.op_type == "Sigmoid"):
        kinds.append(set())
        while (node := made_by[node.input[0]]).op_type not in ("ReduceMean", "GlobalAveragePool"):
            kinds[-1].add(node.op_type)
    return kinds


def test_int8_is_judged_and_refused_when_it_loses(
    export_cli, tmp_path, small_data, traced_once, monkeypatch
):
    for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    write_fitted_checkpoint(tmp_path / "best.pth", small_data / "train")
    GRAPHS.clear()
    passes = []
    monkeypatch.setattr(
        int8, "read_batches", lambda paths, *a: passes.append(paths) or read_batches(paths, *a)
    )
    code, text = export_cli("best.pth", "--to", "onnx", "openvino", "--int8", "data")
    assert code == 0, text
    assert "int8: calibrated on 18 of 18 training images" in text
    assert "of 12 validation images" in text
    splits = [{Path(os.fsdecode(path)).parts[-3] for path in paths} for paths in passes]
    assert splits == [{"train"}, {"val"}, {"val"}]  # calibrated, then each format evaluated
    for name in ("best.int8.onnx", "best.int8.xml", "best.int8.bin"):
        assert (tmp_path / name).exists()

    # The files give the same figures as predict.py sees them, and say that they are int8.
    code, shown = export_cli("best.int8.onnx", "data/val", "--format", "csv", main=predict.main)
    assert code == 0, shown
    assert "eca_resnet18 from best.int8.onnx, int8, run by onnxruntime" in shown
    rows = [line.split(",") for line in shown.splitlines() if line.startswith("data/val/")]
    right = sum(row[0].split("/")[2] == row[1] for row in rows)
    assert f"{100 * right / 12:.2f} % in int8" in text

    assert operations_before_the_gates(tmp_path / "best.int8.onnx") == 8 * [{"Conv"}]

    # A file that has become another network is not written.
    other = tmp_path / "other"
    quantise, seen = int8.quantise, []

    def spoilt(onnx_file, batches):
        import onnx

        seen[:] = batches
        model = onnx.load_from_string(quantise(onnx_file, iter(seen)))
        for tensor in model.graph.initializer:
            if tensor.name == "fc.bias":
                shifted = onnx.numpy_helper.to_array(tensor) + np.float32([1e3, 0, 0])
                tensor.CopyFrom(onnx.numpy_helper.from_array(shifted, tensor.name))
        return model.SerializeToString()

    assert "onnx: top-1 100.00 % in float32" in text
    monkeypatch.setattr(int8, "quantise", spoilt)
    for limit in (50, 70):
        code, text = export_cli(
            "best.pth", "--int8", "data", "--output", "other", "--max-drop", limit
        )
        assert "onnx: top-1 100.00 % in float32, 33.33 % in int8" in text
        refused = limit < 66.67
        assert code == int(refused), text
        said = "onnx in int8 loses 66.67 points of top-1, more than --max-drop 50: not written"
        assert (said in text) == refused
        assert (other / "best.int8.onnx").exists() != refused
    files = sorted((small_data / "train").rglob("*.png"))
    look = Preprocessing(48, 0.9)
    (batch,) = read_batches([bytes(file) for file in files], look, 99, torch.device("cpu"))
    assert torch.equal(torch.cat(seen), batch.images)  # calibrated on these, not on val's


def test_broken_images_and_other_classes_stop_int8(export_cli, tmp_path, small_data, traced_once):
    pytest.importorskip("onnxscript")
    write_checkpoint(tmp_path / "best.pth")
    (small_data / "val" / "b" / "bad.png").write_bytes(b"no image")
    code, text = export_cli("best.pth", "--int8", "data")
    assert (code, "bad.png: not an image; repair or remove it" in text) == (1, True), text
    (small_data / "train" / "z").mkdir()
    (small_data / "train" / "z" / "x.png").write_bytes(
        (small_data / "train" / "a" / "0.png").read_bytes()
    )
    code, text = export_cli("best.pth", "--int8", "data")
    assert code == 2, text
    assert not list(tmp_path.glob("best.int8*"))
