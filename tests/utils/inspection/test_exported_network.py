"""Files of export.py as networks again, and the refusal of what could run code or mislead."""

import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.trees import ROOT

from models import create_model
from models.inference import optimise_for_inference
from models.weights import describe_network
from utils.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from utils.inspection import export, exported_network, int8
from utils.system.errors import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a.onnx, a.xml and a.bin, and the network that they came from."""
    for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    torch.manual_seed(0)
    network = create_model("eca_resnet18", num_classes=3).eval().requires_grad_(False)
    metadata = {
        **describe_network(network),
        "classes": ["a", "b", "ü"],
        "img_size": 64,
        "crop_pct": 0.8,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
    }
    form = optimise_for_inference(network, torch.float32).network
    graph = export.to_exported(form, (64, 96))
    folder = tmp_path_factory.mktemp("exported")
    onnx_file = export.to_onnx(graph, metadata)
    (folder / "a.onnx").write_bytes(onnx_file)
    parts = export.to_openvino(onnx_file, metadata)
    for ending, part in zip(("xml", "bin"), parts, strict=True):
        (folder / f"a.{ending}").write_bytes(part)
    return folder, network


@pytest.mark.parametrize("ending", exported_network.ENDINGS)
def test_a_file_computes_what_its_network_does(made, ending):
    folder, network = made
    found = exported_network.load(folder / f"a{ending}")
    assert (found.arch, found.num_classes) == ("eca_resnet18", 3)
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
        with pytest.raises(UserError, match=r"damaged|metadata are not") as error:
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
        ({"mean": None}, "missing required field `mean`"),
        ({"mean": "[0.5, 0.5, 1.5]"}, r"`float` <= 1.0 - at `\$.mean"),
        ({"std": "[0.5, 0, 0.5]"}, r"`float` > 0.0 - at `\$.std"),
        ({"interpolation": "lanczos"}, "Invalid enum value 'lanczos'"),
        ({"img_size": '"64"'}, "metadata are not those of export.py"),
        ({"classes": '["a", "b", "c", "d"]'}, "4 names for 3 classes"),
        ({"crop_pct": "7"}, "metadata are not those of export.py"),
        ({"num_classes": "4"}, r"shape \(1, 3\) for 1 image, not \(1, 4\)"),
    ]:
        del model.metadata_props[:]
        for key, value in {**kept, **change}.items():
            if value is not None:
                model.metadata_props.add(key=key, value=value)
        onnx.save(model, tmp_path / "x.onnx")
        with pytest.raises(UserError, match=message):
            exported_network.load(tmp_path / "x.onnx")


def elsewhere(name="w"):
    """A tensor whose two values lie in the file `stolen`."""
    from onnx import StringStringEntryProto, TensorProto

    where = [StringStringEntryProto(key="location", value="stolen")]
    kind = {"data_type": TensorProto.FLOAT, "data_location": TensorProto.EXTERNAL}
    return TensorProto(name=name, dims=[2], external_data=where, **kind)


def models_with_other_files():
    """Models that name a file: in each kind of message that can hold a tensor, and nested ones."""
    import onnx
    from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto
    from onnx import SparseTensorProto as Sparse

    def node(**field):
        return NodeProto(op_type="Constant", attribute=[AttributeProto(name="value", **field)])

    def graph(**field):
        return ModelProto(graph=GraphProto(node=[node(**field)]))

    inner = GraphProto(initializer=[elsewhere()])
    nested = GraphProto(node=[node(g=GraphProto(node=[node(graphs=[inner])]))])
    sparse = Sparse(values=elsewhere(), dims=[4])
    plain = onnx.TensorProto(dims=[2], data_type=7, int64_data=[0, 1], name="i")
    named = elsewhere()
    named.ClearField("data_location")
    silent = elsewhere()
    silent.ClearField("external_data")
    return {
        "initializer": ModelProto(graph=inner),
        "a name alone": ModelProto(graph=GraphProto(initializer=[named])),
        "no name": ModelProto(graph=GraphProto(initializer=[silent])),
        "sparse initializer": ModelProto(graph=GraphProto(sparse_initializer=[sparse])),
        "attribute": graph(tensors=[plain, elsewhere()]),
        "sparse attribute": graph(
            sparse_tensors=[Sparse(values=plain, indices=elsewhere(), dims=[4])]
        ),
        "graph in a graph": ModelProto(graph=nested),
        "function": ModelProto(functions=[FunctionProto(node=[node(g=inner)])]),
        "training": ModelProto(training_info=[onnx.TrainingInfoProto(algorithm=nested)]),
    }


def test_a_tensor_in_another_file_is_refused_before_an_engine_sees_it(tmp_path, monkeypatch):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")

    def opened(*_, **__):
        raise AssertionError("onnxruntime saw the file")

    monkeypatch.setattr(runtime, "InferenceSession", opened)
    for field, model in models_with_other_files().items():
        (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
        where = "" if field == "no name" else "stolen"
        message = f"x.onnx: takes values of 'w' from another file, '{where}'; refused"
        with pytest.raises(UserError) as error:
            exported_network.load(tmp_path / "x.onnx")
        assert message in str(error.value), field


def test_a_file_in_onnxruntimes_own_format_is_no_onnx(made, tmp_path):
    """Its weights may lie elsewhere, too, and it is no protobuf that could be looked at."""
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "x.onnx")
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.log_severity_level = 3
    runtime.InferenceSession(str(made[0] / "a.onnx"), options, providers=["CPUExecutionProvider"])
    with pytest.raises(UserError, match="damaged, or not a file of export"):
        exported_network.load(tmp_path / "x.onnx")


def test_an_xml_has_its_own_weights_alone(made, tmp_path):
    for name in ("a.xml", "a.bin"):
        (tmp_path / name).write_bytes((made[0] / name).read_bytes())
    file, weights = tmp_path / "a.xml", tmp_path / "a.bin"
    whole = weights.read_bytes()
    assert exported_network.load(file).num_classes == 3
    for wrong in (whole + b"0", whole[:-1], b""):
        weights.write_bytes(wrong)
        with pytest.raises(UserError, match=f"a.bin has {len(wrong):,}: it was not written with"):
            exported_network.load(file)
    weights.unlink()
    weights.symlink_to(made[0] / "a.bin")
    with pytest.raises(UserError, match=r"a\.bin must lie beside it, as a file and not as a link"):
        exported_network.load(file)
    # OpenVINO itself reads an ONNX model under any name.
    weights.unlink()
    weights.write_bytes(b"")
    file.write_bytes((made[0] / "a.onnx").read_bytes())
    with pytest.raises(UserError, match=r"a\.xml: damaged, or not a file of export\.py"):
        exported_network.load(file)


@pytest.mark.parametrize("axis", [0, 2])
def test_a_file_for_one_size_or_one_batch_is_refused(made, tmp_path, axis):
    import onnx

    model = onnx.load(made[0] / "a.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = 64
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(UserError, match=r"takes an input of shape \(.*64.*\), not \(any, 3, any"):
        exported_network.load(tmp_path / "x.onnx")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="chosen for x86")
def test_int8_is_computed_in_8_bits_by_onnxruntime(made, tmp_path):
    """All convolutions but the gates and the first, ReLU included, as its optimised graph shows."""
    import onnx
    import onnxruntime

    data = int8.quantise((made[0] / "a.onnx").read_bytes(), [torch.randn(4, 3, 64, 64)])
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
    data = int8.quantise(source, batches)
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
    logits = torch.cat([exported_network.run_onnx(data)(x) for x in batches])
    expected = torch.cat([network(x) for x in batches])
    assert (logits - expected).abs().max() < 0.1 * expected.abs().max()


def test_evaluating_counts_by_hand():
    table = torch.eye(3)
    networks = {
        "float32": lambda x: table[x.long()],
        "int8": lambda x: table[(x.long() + (x == 2)) % 3],
    }
    batches = [(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1])), (torch.tensor([2]),) * 2]
    top1, agreement, images = int8.evaluate(networks, batches)
    assert (top1, agreement, images) == ({"float32": 75.0, "int8": 50.0}, 50.0, 4)


SIGNALLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from utils.inspection import exported_network
parts = [open(name, "rb").read() for name in sys.argv[2:]]
first, second = (exported_network.run_openvino(*parts) for _ in range(2))
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
