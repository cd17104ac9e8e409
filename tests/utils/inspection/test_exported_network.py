"""Files of export.py as networks again, and the refusal of what could run code or mislead."""

import io
import json
import platform
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from helpers.trees import ROOT

from models import create_model
from models.inference import optimise_for_inference
from models.weights import describe_network
from utils.inspection import export_formats, exported_network, program_checks, quantisation
from utils.system.errors import UserError

MEAN, STD = export_formats.MEAN_AND_STD


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a.onnx, a.pt2, a.xml and a.bin, and the network that they came from."""
    for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    torch.manual_seed(0)
    network = create_model("eca_resnet18", num_classes=3).eval().requires_grad_(False)
    metadata = {
        **describe_network(network),
        "classes": ["a", "b", "ü"],
        "img_size": 64,
        "crop_pct": 0.8,
        "mean": MEAN,
        "std": STD,
    }
    form = optimise_for_inference(network, torch.float32).network
    graph = export_formats.to_exported(form, (64, 96))
    folder = tmp_path_factory.mktemp("exported")
    onnx_file = export_formats.to_onnx(graph, metadata)
    (folder / "a.onnx").write_bytes(onnx_file)
    (folder / "a.pt2").write_bytes(export_formats.to_pt2(graph, metadata))
    parts = export_formats.to_openvino(onnx_file, metadata)
    for ending, part in zip(("xml", "bin"), parts, strict=True):
        (folder / f"a.{ending}").write_bytes(part)
    return folder, network


@pytest.mark.parametrize("ending", exported_network.ENDINGS)
def test_a_file_computes_what_its_network_does(made, ending):
    folder, network = made
    found = exported_network.load(folder / f"a{ending}")
    assert (found.arch, found.num_classes, found.fixed_size) == ("eca_resnet18", 3, None)
    assert found.metadata["classes"] == ["a", "b", "ü"]
    assert (found.metadata["img_size"], found.metadata["crop_pct"]) == (64, 0.8)
    for shape in ((1, 3, 64, 64), (5, 3, 70, 99)):
        x = torch.randn(shape)
        torch.testing.assert_close(found.eval()(x), network(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ending", exported_network.ENDINGS)
def test_damage_is_told_in_one_line(made, tmp_path, ending):
    folder, _ = made
    data = (folder / f"a{ending}").read_bytes()
    target = tmp_path / f"bad{ending}"
    with pytest.raises(UserError, match="no such file"):
        exported_network.load(target)
    target.with_suffix(".bin").write_bytes(b"")
    for damaged in (b"", b"no", data[: len(data) // 2]):
        target.write_bytes(damaged)
        with pytest.raises(UserError, match=r"damaged|does not say") as error:
            exported_network.load(target)
        assert "\n" not in str(error.value)
    if ending == ".xml":
        target.write_bytes(data)
        target.with_suffix(".bin").unlink()
        with pytest.raises(UserError, match=r"bad\.bin must lie beside it"):
            exported_network.load(target)


def test_a_strangers_onnx_file_is_refused(made, tmp_path):
    import onnx

    model = onnx.load(made[0] / "a.onnx")
    kept = {entry.key: entry.value for entry in model.metadata_props}
    for change, message in [
        ({"mean": None}, "does not say mean"),
        ({"mean": "[0.5, 0.5, 0.5]"}, "mean and deviation other than"),
        ({"img_size": '"64"'}, "metadata are not those of export.py"),
        ({"crop_pct": "7"}, "metadata are not those of export.py"),
        ({"num_classes": "4"}, r"shape \(1, 3\) for 1 images, not \(1, 4\)"),
    ]:
        del model.metadata_props[:]
        for key, value in {**kept, **change}.items():
            if value is not None:
                model.metadata_props.add(key=key, value=value)
        onnx.save(model, tmp_path / "x.onnx")
        with pytest.raises(UserError, match=message):
            exported_network.load(tmp_path / "x.onnx")


def rewritten(source, target, change, added=None):
    """Copies a .pt2 with `change` applied to (name, contents) of each of its files."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
        for name, data in (added or {}).items():
            new.writestr(name, data)


def swap(old, new, where="model.json"):
    def change(name, data):
        if name.endswith(where):
            assert old in data
            return data.replace(old, new, 1)
        return data

    return change


def test_a_pt2_that_could_run_code_is_refused(made, tmp_path):
    source, target = made[0] / "a.pt2", tmp_path / "x.pt2"
    program_checks.refuse_code(source)

    class Trap:
        def __reduce__(self):
            return (exec, ("raise SystemExit('ran')",))

    pickled = io.BytesIO()
    torch.save(Trap(), pickled)

    def trapped_inputs(name, data):
        return pickled.getvalue() if name.endswith("sample_inputs/model.pt") else data

    def guard(name, data):
        if not name.endswith("model.json"):
            return data
        return json.dumps({**json.loads(data), "guards_code": ["__import__('os')"]}).encode()

    same = lambda _, data: data  # noqa: E731
    pickles = swap(b'"use_pickle": false', b'"use_pickle": true', "weights_config.json")
    call = swap(b"torch.ops.aten.relu.default", b"torch.hub.load")
    size = swap(b"Integer(1)", b"exit(3)")
    for change, added, message in [
        (pickles, None, "pickled objects"),
        (call, None, r"the operation 'torch\.hub\.load'"),
        (size, None, "the expression"),
        (guard, None, "the expression"),
        (trapped_inputs, None, "example inputs that are no plain tensors"),
        (same, {"a/data/aotinductor/model/x.so": b""}, "a file "),
    ]:
        rewritten(source, target, change, added)
        with pytest.raises(UserError, match=f"holds {message}.*; refused"):
            exported_network.load(target)


def test_another_size_than_the_files_own_is_refused(made, tmp_path):
    _, network = made
    form = optimise_for_inference(network, torch.float32).network
    metadata = {**exported_network.load(made[0] / "a.pt2").metadata, "img_size": 32}
    graph = export_formats.to_exported(form, (32, 32), any_size=False)
    (tmp_path / "small.pt2").write_bytes(export_formats.to_pt2(graph, metadata))
    found = exported_network.load(tmp_path / "small.pt2")
    assert found.fixed_size == (32, 32)
    with pytest.raises(UserError, match="images of 32 x 32 pixels, not 40 x 40"):
        found(torch.zeros(1, 3, 40, 40))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="chosen for x86")
def test_int8_is_computed_in_8_bits_by_onnxruntime(made, tmp_path):
    """All convolutions but the gates and the first, ReLU included, as its optimised graph shows."""
    import onnx
    import onnxruntime

    data = quantisation.quantise((made[0] / "a.onnx").read_bytes(), [torch.randn(4, 3, 64, 64)])
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3  # it says that such a file is for this machine alone
    onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimised.onnx").graph.node
    kinds = [node.op_type for node in nodes]
    convolutions = sum(node.op_type == "Conv" for node in onnx.load_from_string(data).graph.node)
    assert kinds.count("QLinearConv") == convolutions - 8 - 1
    assert "Relu" not in kinds


def test_int8_keeps_gates_and_the_first_convolution_in_float(made):
    import onnx

    folder, network = made
    chance = torch.Generator().manual_seed(1)
    batches = [torch.randn(4, 3, 64, 64, generator=chance) for _ in range(3)]
    source = (folder / "a.onnx").read_bytes()
    data = quantisation.quantise(source, batches)
    model = onnx.load_from_string(data)
    made_by = {output: node for node in model.graph.node for output in node.output}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    in_int8 = [made_by.get(c.input[1]) is not None for c in convolutions]
    gates = sum(node.op_type == "Sigmoid" for node in model.graph.node)
    assert gates == 8
    assert in_int8.count(False) == gates + 1
    assert not in_int8[0]
    weights = {
        tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer
    }
    for conv, quantised in zip(convolutions, in_int8, strict=True):
        if quantised:
            dequantise = made_by[conv.input[1]]
            assert weights[dequantise.input[0]].dtype == np.int8
            assert weights[dequantise.input[1]].shape == weights[dequantise.input[0]].shape[:1]
    assert len(data) < 0.35 * len(source)
    logits = torch.cat([export_formats.run_onnx(data)(x) for x in batches])
    expected = torch.cat([network(x) for x in batches])
    assert (logits - expected).abs().max() < 0.1 * expected.abs().max()


def test_judging_counts_by_hand():
    table = torch.eye(3)
    networks = {
        "float32": lambda x: table[x.long()],
        "int8": lambda x: table[(x.long() + (x == 2)) % 3],
    }
    batches = [(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1])), (torch.tensor([2]),) * 2]
    top1, agreement, images = quantisation.judge(networks, batches)
    assert (top1, agreement, images) == ({"float32": 75.0, "int8": 50.0}, 50.0, 4)


SIGNALLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from utils.inspection import export_formats
parts = [open(name, "rb").read() for name in sys.argv[2:]]
first, second = (export_formats.run_openvino(*parts) for _ in range(2))
del first
del second
signal.signal(signal.SIGUSR1, lambda *_: print("alive"))
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_a_signal_after_two_networks_of_openvino_is_no_segmentation_fault(tmp_path):
    openvino = pytest.importorskip("openvino")
    from openvino import opset13

    image = opset13.parameter([1, 3, 8, 8])
    kernel = opset13.constant(np.ones((4, 3, 3, 3), np.float32))
    out = opset13.convolution(image, kernel, [1, 1], [0, 0], [0, 0], [1, 1])
    openvino.save_model(openvino.Model([out], [image], "x"), tmp_path / "x.xml")
    files = [tmp_path / "x.xml", tmp_path / "x.bin"]
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, ROOT, *files], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
