"""export.py of a detector: the ONNX file finds what the network finds, and predict.py runs it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import export
import predict
from models.detection.detectors import FIRST_LABEL, create_detector, describe_detector
from utils.inspection import export as formats
from utils.inspection import exported_network
from utils.runs import checkpoint
from utils.system.errors import UserError

pytestmark = pytest.mark.usefixtures("thin")
for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)


def write_detector(path, arch="faster_rcnn", **settings):
    """A checkpoint as detect_main.py writes it, of a network whose scores are far apart."""
    torch.manual_seed(0)
    threshold = "score_thresh" if arch == "retinanet" else "box_score_thresh"
    settings = {"width": 16, "min_size": 96, "max_size": 160, threshold: 0.3, **settings}
    outputs = 2 + FIRST_LABEL[arch]
    network = create_detector(arch, "eca_resnet18", num_classes=outputs, norm="bn", **settings)
    network.backbone.train()
    with torch.no_grad():
        network.backbone(torch.randn(4, 3, 96, 128))
        for name, value in network.named_parameters():
            if name.endswith(("cls_logits.weight", "cls_score.weight", "cls_logits.bias")):
                value.normal_(0, 1)
                if arch == "retinanet":  # features are small there, and scores of one value tie
                    value *= 0 if "bias" in name else 5
            elif name.endswith(("bbox_pred.weight", "bbox_reg.weight", "fcn_logits.weight")):
                value.normal_(0, 0.05)
    state = {**describe_detector(network), "classes": ["ant", "bee"], "category_ids": [3, 7]}
    checkpoint.save(path, {**state, "state_dict": network.state_dict()})
    return network.eval()


def objects(data, image):
    session = exported_network.onnx_session(data)
    return exported_network.objects_by_onnxruntime(session)(image)


def resized(image, height, width):
    return F.interpolate(image[None], (height, width), mode="bilinear")[0]


@pytest.mark.parametrize("arch", list(FIRST_LABEL))
def test_a_file_finds_what_the_network_finds(call, tmp_path, arch):
    """On sizes that were not traced; the longer side decides the second, upright is the third."""
    import onnxruntime

    network = write_detector(tmp_path / "best.pth", arch)
    code, lines, errors = call("best.pth", entry=export.main)
    assert (code, errors) == (0, []), errors
    assert lines[0] == f"network: {arch} on eca_resnet18, 2 classes"
    assert lines[1].startswith("best.onnx: ")
    assert ("masks" in lines[1]) == (arch == "mask_rcnn")
    session = onnxruntime.InferenceSession(
        (tmp_path / "best.onnx").read_bytes(), providers=["CPUExecutionProvider"]
    )
    shapes = [["objects", 4], ["objects"], ["objects"], ["objects", 1, "height", "width"]]
    outputs = session.get_outputs()
    assert [output.shape for output in outputs] == shapes[: len(outputs)]
    held = session.get_modelmeta().custom_metadata_map
    assert json.loads(held["classes"]) == ["ant", "bee"]
    assert (held["arch"], held["first_label"]) == (arch, str(FIRST_LABEL[arch]))
    compared = 0
    photo, *_, noise = formats.trial_images(network)
    for height, width in ((101, 143), (70, 200), (33, 400), (300, 200), (64, 64), (90, 91)):
        image = resized(noise if height == 90 else photo, height, width)
        with torch.no_grad():
            (expected,) = network([image])
        names = [output.name for output in session.get_outputs()]
        found = dict(zip(names, session.run(None, {"image": image.numpy()}), strict=True))
        assert names == [n for n in exported_network.OBJECTS if n in expected]
        full = len(expected["scores"]) == 100
        lowest = float(expected["scores"].min()) if full else 0.3
        for i in torch.where(expected["scores"] > lowest + 1e-4)[0].tolist():
            near = np.abs(found["boxes"] - expected["boxes"][i].numpy()).max(1)
            near[found["labels"] != int(expected["labels"][i])] = np.inf
            near[np.abs(found["scores"] - float(expected["scores"][i])) > 1e-4] = np.inf
            j = near.argmin()
            assert near[j] < 0.05, (height, width)
            compared += 1
            if "masks" in expected:
                np.testing.assert_allclose(found["masks"][j], expected["masks"][i], atol=0.01)
    assert compared > 10

    # predict.py draws and writes the same for both.
    pixels = (255 * resized(photo, 90, 120)).byte()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "x.png")
    tables = []
    for file in ("best.pth", "best.onnx"):
        code, lines, errors = call(file, "x.png", "--format", "csv", entry=predict.main)
        assert code == 0, errors
        tables.append([line.split(",") for line in lines])
    assert any("from best.onnx, run by onnxruntime" in line for line in errors)
    assert len(tables[0]) == len(tables[1]) > 1
    theirs = [(row[1], np.float64(row[2:])) for row in tables[1][1:]]
    lowest = min(float(row[2]) for row in tables[0][1:])
    for row in tables[0][1:]:
        if float(row[2]) > lowest + 1e-4:
            numbers = np.float64(row[2:])
            near = [np.abs(numbers - other).max() for name, other in theirs if name == row[1]]
            assert min(near) < 0.05


def test_what_does_not_go_is_one_line(call, tmp_path):
    write_detector(tmp_path / "det.pth")
    write_detector(tmp_path / "old.pth", legacy=True)
    (tmp_path / "data").mkdir()
    for flags, message in {
        ("det.pth", "--to", "pt2"): "--to pt2: det.pth holds a detector, which is written as onnx",
        ("det.pth", "--int8", "data"): "--int8 is for classifiers, and det.pth holds a detector",
        ("det.pth", "--img-size", 64): "--img-size is for classifiers",
        ("det.pth", "--no-fold", "--to", "onnx"): "--no-fold is for classifiers",
        ("old.pth", "--to", "onnx"): "old.pth: has mmdetection v1's geometry (--legacy)",
    }.items():
        code, _, errors = call(*flags, entry=export.main)
        assert (code, len(errors)) == (2, 1), errors
        assert message in errors[0]
    assert not list(tmp_path.glob("*.onnx"))


def test_objects_that_differ_are_counted():
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 20, 30]])
    masks = torch.zeros(2, 1, 40, 40)
    masks[:, :, 5:9, 5:9] = 1
    network = {"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks}
    network["scores"] = torch.tensor([0.9, 0.6])

    def compare(expected=network, lowest=0.5, **changed):
        return formats.compare_objects(expected, {**network, **changed}, lowest)

    turned = {name: value.flip(0) for name, value in network.items()}
    assert compare(**turned) == (2, 0.0, 1.0, 0)
    assert compare(boxes=boxes + 0.01).pixels == pytest.approx(0.01, abs=1e-5)
    assert compare(masks=masks.roll(2, -1)).overlap == pytest.approx(1 / 3)
    fewer, none = ({name: v[:n] for name, v in network.items()} for n in (1, 0))
    twice = {name: value[[0, 1, 1]] for name, value in network.items()}
    for changed, others in [
        ({"boxes": boxes + 1}, 2),
        ({"boxes": boxes * torch.nan}, 2),
        ({"labels": torch.tensor([1, 1])}, 1),
        ({"scores": torch.tensor([0.9, 0.601])}, 1),
        ({"scores": torch.full((2,), torch.nan)}, 2),
        (fewer, 1),
        (none, 2),
        (twice, 1),
    ]:
        assert compare(**changed).others == others, changed
    assert compare(fewer).others == 1
    assert formats.compare_objects(none, none, 0.5) == (0, 0.0, 1.0, 0)
    assert compare(fewer, 0.7) == (1, 0.0, 1.0, 0)  # what scores too little may be on one side


def test_a_file_that_finds_something_else_is_refused(tmp_path, monkeypatch):
    detector = formats.prepared_detector(write_detector(tmp_path / "best.pth", "mask_rcnn"))
    data = formats.detector_to_onnx(detector, {})
    run = exported_network.objects_by_onnxruntime
    for planted, message in (
        (lambda found: found, None),
        (lambda found: {**found, "boxes": found["boxes"] + 1}, "x.onnx: finds .* others than"),
        (lambda found: {**found, "masks": found["masks"].roll(9, -1)}, "x.onnx: has a mask that"),
        (lambda found: 1 / 0, r"x.onnx does not run at \(3, .*division by zero; not written"),
    ):
        monkeypatch.setattr(
            exported_network,
            "objects_by_onnxruntime",
            lambda session, planted=planted: lambda x: planted(run(session)(x)),
        )
        if message is None:
            assert formats.check_detector(data, detector, "x.onnx").others == 0
        else:
            with pytest.raises(UserError, match=message):
                formats.check_detector(data, detector, "x.onnx")


def test_the_least_score_is_the_files(call, tmp_path, tree):
    """The trial lowers it in the file that is written, so that objects are there to compare."""
    network = write_detector(tmp_path / "none.pth", box_score_thresh=1.0)
    code, _, errors = call("none.pth", entry=export.main)
    assert (code, errors) == (0, []), errors
    data = (tmp_path / "none.onnx").read_bytes()
    image = resized(formats.trial_images(network)[0], 96, 121)
    assert len(objects(data, image)["scores"]) == 0
    lower = formats.with_threshold(data, 0.1)
    assert len(objects(lower, image)["scores"]) >= 10
    code, _, errors = call("-e", "--resume", "none.onnx", tree)
    said = "error: none.onnx: holds a detector; give the file of a classifier"
    assert (code, errors) == (2, [said])
