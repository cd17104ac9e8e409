"""models.from_pretrained: a folder read back bit for bit, hostile ones refused in one line."""

import builtins
import json
import shutil
import socket
import sys

import pytest
import torch

import models
from models import pretrained, weights
from utils.inspection import export
from utils.runs import foreign_files
from utils.runs.checkpoint import Checkpoint

safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with a network whose BatchNorms have seen something, and its tensors."""
    torch.manual_seed(0)
    network = models.create_model("eca_mobilenetv2", "35", 3, width_mult=0.25)
    network(torch.randn(4, 3, 32, 32))
    folder = tmp_path_factory.mktemp("hf")
    metadata = {
        **weights.describe_network(network),
        "classes": ["a", "b", "ü"],
        "img_size": 48,
        "crop_pct": 0.9,
        "mean": (0.0, 0.5, 0.5),
        "std": (0.2, 0.2, 0.2),
    }
    saved = Checkpoint(file=folder, contents={})
    (folder / "config.json").write_bytes(export.hugging_face_texts(network, saved, metadata)[0])
    data = foreign_files.to_safetensors(network.state_dict(), metadata)
    (folder / "model.safetensors").write_bytes(data)
    return folder, network.state_dict()


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written[0], tmp_path / "copy")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def refused(source, message, **kwargs):
    with pytest.raises(ValueError, match=message) as error:
        models.from_pretrained(source, **kwargs)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 600
    assert text.isprintable()


def change(folder, **fields):
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, **fields}), encoding="utf-8")


def test_a_folder_is_read_bit_for_bit(written, no_network, monkeypatch):
    folder, held = written
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # not needed for a folder
    network = models.from_pretrained(folder)
    found = network.state_dict()
    assert found.keys() == held.keys()
    assert all(torch.equal(found[k], held[k]) and found[k].dtype == held[k].dtype for k in held)
    assert not network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert (network.ksize, network.model_kwargs) == ((3, 5), {"width_mult": 0.25})
    config = pretrained.read_config(folder)
    assert (config["img_size"], config["crop_pct"]) == (48, 0.9)
    assert config["classes"] == ["a", "b", "ü"]


def test_a_folder_comes_before_an_id(copy, monkeypatch, no_network):
    (copy.parent / "owner").mkdir()
    copy.rename(copy.parent / "owner" / "name")
    monkeypatch.chdir(copy.parent)
    assert models.from_pretrained("owner/name").num_classes == 3
    refused("owner/name", "is a folder here: leave revision out", revision="main")


HOSTILE = [
    ({"arch": "resnet9000"}, "arch cannot be 'resnet9000'"),
    ({"arch": "__class__"}, "arch cannot be"),
    ({"arch": "\x1b[31m" + "x" * 9999}, r"arch cannot be '\\x1b"),
    ({"arch": "eca_resnet18"}, "width_mult|do not fit"),
    ({"attention": None}, "attention cannot be"),
    ({"attention": "se"}, "ksize|do not fit"),
    ({"ksize": [3, 5, 7, 9, 11]}, "ksize"),
    ({"ksize": [3, 2**31 - 1]}, "kernel sizes"),
    ({"num_classes": 2**31 - 1}, "do not fit"),
    ({"num_classes": -1}, "num_classes cannot be -1"),
    ({"model_kwargs": {"num_classes": 5}}, "model_kwargs cannot be"),
    ({"model_kwargs": {"width_mult": 64}}, "do not fit"),
    ({"model_kwargs": {"width_mult": 1e-300}}, "width_mult"),
    ({"classes": [1, 2, 3]}, "classes cannot be"),
    ({"classes": ["a"] * 4}, "classes cannot be"),
    ({"std": [0.2, 0.2, 0]}, "std cannot be"),
    ({"img_size": -3}, "img_size cannot be"),
    ({"format": 2}, "its format is 2, not 1: update"),
]


@pytest.mark.parametrize(("fields", "message"), HOSTILE)
def test_hostile_fields_are_refused(copy, fields, message):
    change(copy, **fields)
    refused(copy, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not JSON"),
        (b"[1]", "a JSON object is wanted, not a list"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"{}", "it lacks format"),
        (b'{"model_type": "bert", "format": 1}', "it lacks arch: it is not a config.json of"),
        (b" " * (pretrained.LARGEST_CONFIG + 1), "more than 16 MB"),
    ],
    ids=range(7),
)
def test_hostile_files_are_refused(copy, text, message):
    (copy / "config.json").write_bytes(text)
    refused(copy, message)


def test_hostile_weights_are_refused(copy, written):
    path = copy / "model.safetensors"
    whole, held = path.read_bytes(), written[1]
    for data in (b"", whole[:-1], whole[: len(whole) // 2], b"\xff" * 64):
        path.write_bytes(data)
        refused(copy, "damaged, or not a safetensors file")
    path.write_bytes(safetensors.save({k: v for k, v in held.items() if k != "classifier.1.bias"}))
    refused(copy, r"do not fit eca_mobilenetv2: 1 missing: classifier\.1\.bias")
    path.write_bytes(safetensors.save({**held, "classifier.1.bias": torch.zeros(3).double()}))
    refused(copy, r"classifier\.1\.bias' is float64; float32 is wanted")
    path.write_bytes(safetensors.save({**held, "classifier.1.bias": torch.zeros(3).int()}))
    refused(copy, r"classifier\.1\.bias' is int32")
    path.unlink()
    refused(copy, "no such file")


def test_half_precision_weights_keep_their_values(copy, written):
    half = {k: v.half() if v.is_floating_point() else v for k, v in written[1].items()}
    (copy / "model.safetensors").write_bytes(safetensors.save(half))
    found = models.from_pretrained(copy).state_dict()
    assert all(torch.equal(found[k], half[k].to(found[k].dtype)) for k in half)
    assert found["classifier.1.bias"].dtype == torch.float32


def test_what_is_no_folder(copy, monkeypatch, tmp_path):
    refused(copy / "config.json", "is a file; give a folder")
    refused(tmp_path / "absent", "no such folder; give a folder with config.json")
    refused("../a/b", "no such folder; give a folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "config.json: No such file")


@pytest.mark.parametrize("package", ["huggingface_hub", "safetensors"])
def test_a_missing_package_is_said(written, monkeypatch, package):
    real = builtins.__import__

    def without(name, *rest, **kwargs):
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return real(name, *rest, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    source = "owner/name" if package == "huggingface_hub" else written[0]
    refused(source, f"needs {package}: pip install {package}")


def test_an_id_is_downloaded_with_huggingface_hub(written, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(repository, name, revision):
        asked.append((repository, name, revision))
        return str(written[0] / name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    network = models.from_pretrained("owner/name", revision="v1")
    assert network.num_classes == 3
    names = ("config.json", "model.safetensors")
    assert asked == [("owner/name", name, "v1") for name in names]

    def fail(*_, **__):
        raise hub.errors.LocalEntryNotFoundError("offline\nand more")

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    refused("owner/name", "no such folder here, and not downloaded: offline")
