"""main.py -e of a file of export.py gives the figures of the checkpoint that it came from."""

import json
import re
import zipfile

import numpy as np
import pytest
import torch
from helpers.classifier_checkpoints import write_checkpoint
from helpers.small_runs import thin_networks
from helpers.tiny_runs import RUN
from helpers.trees import write_tree

import detect_main
import export
import light_main
import main as main_script
import predict
import visualize_attention
from utils.data import loader
from utils.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from utils.inspection import exported_network
from utils.runs import checkpoint
from utils.system.faults import run_script

pytestmark = pytest.mark.usefixtures("thin")

# Of a run. Labels must be those of the checkpoint's names, which are not in the folders' order.
FIELDS = {name: RUN[name] for name in checkpoint.RUN} | {"args": {"decoder": "pil"}}
FIELDS |= {"classes": ["b", "a", "7"], "img_size": 40, "crop_pct": 0.7}
FIELDS["recipe"] = {**RUN["recipe"], "img_size": 40, "crop_pct": 0.7}
FIGURES = re.compile(r"15 images  top-1 (\S+) %  loss (\S+) ")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with tree/, best.pth of an untrained network, and what export.py makes of it."""
    for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("exported")
    write_tree(folder / "tree", classes="ab7")
    with pytest.MonkeyPatch.context() as patch, thin_networks():
        write_checkpoint(folder / "best.pth", fields=FIELDS)
        patch.chdir(folder)
        patch.setattr("sys.argv", ["export.py", "best.pth", "--to", "onnx", "openvino"])
        with pytest.raises(SystemExit) as end:
            run_script(export.main)
    assert end.value.code == 0
    return folder


def as_light_main():
    return main_script.main(light_main.RECIPE, light_main.DEMOS, light_main.__doc__)


@pytest.mark.parametrize(
    ("ending", "entry"),
    [("onnx", main_script.main), ("xml", main_script.main), ("onnx", as_light_main)],
)
def test_figures_are_the_checkpoints(call, made, tmp_path, ending, entry):
    written = {}
    for name in ("best.pth", f"best.{ending}"):
        flags = ("--output", tmp_path / name, "-j", 0, made / "tree")
        code, lines, errors = call("-e", "--resume", made / name, *flags, entry=entry)
        assert (code, errors) == (0, []), errors
        written[name] = json.loads((tmp_path / name / "evaluation.json").read_text())
    assert lines[1] == (
        f"network: eca_resnet18 from best.{ending}, float32, run by "
        f"{exported_network.ENDINGS[f'.{ending}']}, 3 classes"
    )
    assert lines[2].endswith("; float32")
    expected, found = written.values()
    for key in ("images", "top1", "top5"):
        assert found[key] == expected[key]
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-4)
    assert found["images"] == 15


def test_figures_are_those_of_a_loop_over_the_file(call, made):
    """An independent count: onnxruntime alone, with PIL's images prepared by hand."""
    import onnxruntime
    from PIL import Image

    session = onnxruntime.InferenceSession(made / "best.onnx", providers=["CPUExecutionProvider"])
    mean, std = (np.array(v, np.float32) for v in (IMAGENET_MEAN, IMAGENET_STD))
    right, loss = 0, 0.0
    files = sorted((made / "tree" / "val").rglob("*.png"))
    for file in files:
        side = round(40 / 0.7)  # the files are square, so that this is the shorter side
        image = Image.open(file).convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
        first = round((side - 40) / 2)
        pixels = np.asarray(image, np.float32)[first : first + 40, first : first + 40] / 255
        x = ((pixels - mean) / std).transpose(2, 0, 1)[None]
        (logits,) = session.run(None, {"images": x})[0].astype(np.float64)
        label = ["b", "a", "7"].index(file.parent.name)
        right += logits.argmax() == label
        loss += np.log(np.exp(logits - logits.max()).sum()) - (logits[label] - logits.max())
    flags = ("--decoder", "pil", "-j", 0, made / "tree")
    code, lines, _ = call("-e", "--resume", made / "best.onnx", *flags)
    assert code == 0
    top1, shown = map(float, FIGURES.match(lines[-1]).groups())
    assert top1 == pytest.approx(100 * right / len(files), abs=1e-3)
    assert shown == pytest.approx(loss / len(files), abs=1e-3)


def test_the_runs_decoder_is_the_files(call, made, monkeypatch):
    """A run with --decoder pil is evaluated with it, and so is what was exported of it."""
    used = []
    read = loader.read_image
    monkeypatch.setattr(
        loader, "read_image", lambda file, decoder: (used.append(decoder), read(file, decoder))[1]
    )
    for flags in ((), ("--decoder", "simplejpeg")):
        assert call("-e", "--resume", made / "best.onnx", *flags, "-j", 0, made / "tree")[0] == 0
    assert used == ["pil"] * (len(used) // 2) + ["simplejpeg"] * (len(used) // 2) != []


def refused():
    file = "best.onnx"
    yield ("--resume", file), "is not trained: evaluate it with -e --resume"
    yield ("--pretrained", file), "is not trained: evaluate it with -e --resume"
    for flag in (("--fast",), ("--compile",), ("--amp", "bf16"), ("--channels-last",)):
        yield ("-e", "--resume", file, *flag), f"{flag[0]}: an exported network"
    yield ("-e", "--resume", file, "--no-fused"), "--no-fused: an exported network has no blocks"
    yield ("-e", "--resume", file, "--device", "cuda"), "--device cuda: "
    yield ("-e", "--resume", file, "--gpu", 0), "--gpu 0: "
    yield ("-e", "--resume", file, "--epochs", 3), "--epochs does nothing with -e"
    yield ("-e", "--resume", file, "-a", "eca_resnet34"), "holds eca_resnet18"
    yield ("-e", "--resume", file, "--pretrained", "x.pth"), "has weights of its own"
    yield ("-e", "--resume", "nowhere.onnx"), "nowhere.onnx: no such file"
    yield ("-e", "--resume", file, "--output", "best.pth"), "best.pth: is a file"


@pytest.mark.parametrize(("flags", "message"), list(refused()))
def test_what_makes_no_sense_with_a_file_is_one_line(call, made, flags, message):
    flags = [made / word if word in ("best.onnx", "best.pth") else word for word in flags]
    code, _, errors = call(*flags, made / "tree")
    assert code == 2, errors
    assert len(errors) == 1, errors
    assert message in errors[0]


def test_a_strangers_file_is_one_line(call, made, tmp_path):
    import onnx
    from onnx import TensorProto, helper

    def write(name, shape, metadata=()):
        image = helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)
        out = helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)
        graph = helper.make_graph(
            [helper.make_node("Relu", ["images"], ["logits"])], "g", [image], [out]
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        model.metadata_props.extend(metadata)
        onnx.save(model, tmp_path / name)

    held = onnx.load(made / "best.onnx").metadata_props
    write("foreign.onnx", ["n", 3, "h", "w"])
    write("last.onnx", ["n", 40, 40, 3], held)
    write("flat.onnx", ["n", 4800], held)
    write("no_logits.onnx", ["n", 3, "h", "w"], held)
    for file, message in {
        "foreign.onnx": "foreign.onnx: its metadata are not those of export.py (Object missing",
        "last.onnx": "takes an input of shape (any, 40, 40, 3), not (any, 3, any, any)",
        "flat.onnx": "takes an input of shape (any, 4800)",
        "no_logits.onnx": "gives an output of shape (1, 3, 40, 40) for 1 image",
    }.items():
        code, _, errors = call("-e", "--resume", file, "-j", 0, made / "tree")
        assert (code, len(errors)) == (2, 1), errors
        assert message in errors[0]


def readers_of_checkpoints():
    """Every script that takes a checkpoint, and its flags before and behind the file's name."""
    yield "main -e", (main_script.main, ("-e", "--resume"), ("tree",))
    yield "main", (main_script.main, ("--resume",), ("tree",))
    yield "main --pretrained", (main_script.main, ("--pretrained",), ("tree",))
    yield "light_main", (as_light_main, ("-e", "--resume"), ("tree",))
    yield "detect_main", (detect_main.main, ("-e", "--resume"), ("tree",))
    yield "detect_main first", (detect_main.main, ("--detector-weights",), ("tree",))
    yield "predict", (predict.main, (), ("tree",))
    yield "export", (export.main, (), ())
    yield "visualize_attention", (visualize_attention.main, (), ("tree",))


@pytest.mark.parametrize(
    ("entry", "before", "behind"),
    [pytest.param(*how, id=name) for name, how in readers_of_checkpoints()],
)
def test_a_program_of_torch_export_is_never_opened(
    call, tmp_path, tree, monkeypatch, entry, before, behind
):
    """To read a .pt2 is to run what it holds; each script points to ONNX in its place."""

    def opened(*_, **__):
        raise AssertionError("the file was opened")

    for module, name in ((torch.export, "load"), (torch, "load"), (zipfile, "ZipFile")):
        monkeypatch.setattr(module, name, opened)
    monkeypatch.setattr(zipfile, "is_zipfile", opened)
    (tmp_path / "x.pt2").write_bytes(b"PK")
    behind = [tree if word == "tree" else word for word in behind]
    code, lines, errors = call(*before, "x.pt2", *behind, entry=entry)
    assert (code, lines, len(errors)) == (2, [], 1), errors
    assert errors[0].startswith("error: x.pt2: a program of torch.export")
    assert "export.py CKPT --to onnx" in errors[0]


def test_weights_in_another_file_change_no_prediction(call, made, tmp_path):
    """onnxruntime takes a weight from the working folder, and the most likely class with it."""
    import onnx
    import onnxruntime

    model = onnx.load(made / "best.onnx")
    (weight,) = [tensor for tensor in model.graph.initializer if tensor.name == "fc.weight"]
    (tmp_path / "stolen").write_bytes(
        np.float32([[0], [0], [1]]).repeat(weight.dims[1], 1).tobytes()
    )
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="stolen")
    onnx.save(model, tmp_path / "x.onnx")
    image = next((made / "tree").rglob("*.png"))
    images = np.ones((1, 3, 40, 40), np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    assert session.run(None, {"images": images})[0].argmax() == 2
    for arguments, entry in (
        (("x.onnx", image), predict.main),
        (("-e", "--resume", "x.onnx", made / "tree"), main_script.main),
    ):
        code, lines, errors = call(*arguments, entry=entry)
        assert (code, lines, len(errors)) == (2, [], 1), errors
        assert (
            "x.onnx: takes values of 'fc.weight' from another file, 'stolen'; refused" in errors[0]
        )


def test_other_classes_are_refused(call, made, tmp_path):
    write_tree(tmp_path / "other", classes="xyz")
    code, _, errors = call("-e", "--resume", made / "best.onnx", "-j", 0, tmp_path / "other")
    assert (code, len(errors)) == (2, 1), errors


def test_a_checkpoint_in_the_place_of_data_is_told_its_flag(call, tmp_path, tree):
    (tmp_path / "best.pth").touch()
    for words in (("-e", "best.pth", tree), ("-e", tree, "best.pth"), (tree, "best.pth")):
        code, lines, errors = call(*words)
        assert (code, lines, len(errors)) == (2, [], 1)
        assert errors[0].endswith("; a checkpoint goes behind a flag: --resume best.pth")
    _, lines, _ = call("-h")
    assert {"--ksize", "--list-models"} <= {word for line in lines for word in line.split()}
