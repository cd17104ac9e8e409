"""Published weights by name: from a cache, and one line where that is empty."""

from urllib.error import URLError

import pytest
import timm
import torch
import torchvision

from models.start import first_network
from utils.runs.named_weights import read_weights
from utils.system.errors import EXIT_FAILED, UserError


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty cache, and no network to fill it from."""

    def refuse(url, *_, **__):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", refuse)
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


@pytest.mark.parametrize(
    ("arch", "plain", "file"),
    [
        ("eca_resnet18", "resnet18", "resnet18-f37072fd.pth"),
        ("se_mobilenetv2", "mobilenet_v2", "mobilenet_v2-7ebf99e0.pth"),
    ],
)
def test_torchvision_s_weights_come_from_its_cache(offline, arch, plain, file):
    published = torchvision.models.get_model(plain).state_dict()
    torch.save(published, offline / file)
    saved = read_weights("torchvision", arch)
    assert torch.equal(next(iter(saved.contents.values())), next(iter(published.values())))
    network, notes = first_network(arch, 3, pretrained=saved.contents, file=str(saved.file))
    assert notes[0].startswith(f"pretrained: {plain}'s IMAGENET1K_V")
    assert any("attention" in note and "are new" in note for note in notes)
    assert any("classes, the network 3" in note for note in notes)
    head = {f"{network.head}.weight", f"{network.head}.bias"}
    own = network.state_dict()
    assert all(torch.equal(own[k], v) for k, v in published.items() if k not in head)


def test_timm_s_weights_have_our_names(offline, monkeypatch):
    published = timm.create_model("mobilenetv2_100").state_dict()
    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", lambda *_, **__: published)
    saved = read_weights("timm:mobilenetv2_100.ra_in1k", "mobilenetv2")
    network, _ = first_network("mobilenetv2", 1000, pretrained=saved.contents, file=str(saved.file))
    assert torch.equal(network.classifier[1].weight, published["classifier.weight"])
    assert torch.equal(network.features[0][0].weight, published["conv_stem.weight"])


def test_a_cut_file_in_the_cache_is_named(offline):
    (offline / "resnet18-f37072fd.pth").write_bytes(b"PK\3\4 cut")
    with pytest.raises(UserError, match=r"checkpoints/resnet18-f37072fd\.pth: damaged .*remove it"):
        read_weights("torchvision", "eca_resnet18")


def test_timm_s_download_is_compared_with_its_checksum(tmp_path, monkeypatch):
    """Of a network whose weights have an address of their own, and a hash in the file's name."""
    served = tmp_path / "cut-0123456789.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), served)
    settings = timm.get_pretrained_cfg("test_resnet.r160_in1k")
    monkeypatch.setattr(settings, "hf_hub_id", None)
    monkeypatch.setattr(settings, "url", served.as_uri())
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda _: settings)
    create = timm.create_model

    def by_url(name, **how):
        return create(name, pretrained_cfg=settings, **how)

    monkeypatch.setattr(timm, "create_model", by_url)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"not downloaded \(invalid hash value"):
        read_weights("timm:test_resnet.r160_in1k", "resnet18")
    assert not list((tmp_path / "cache" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "torchvision",
            r"resnet50's IMAGENET1K_V2 of torchvision: not downloaded \(.*no network.*\); fetch "
            r"https://download.pytorch.org/models/resnet50-11ad3fa6.pth where there is a network",
        ),
        (
            "timm:resnet50.a1_in1k",
            r"timm's resnet50.a1_in1k: not downloaded \(.*no network.*\); fetch "
            r"https://huggingface.co/timm/resnet50.a1_in1k/resolve/main/model.safetensors where",
        ),
    ],
)
def test_without_a_network_the_line_names_the_file_to_fetch(offline, source, said):
    with pytest.raises(UserError, match=said) as caught:
        read_weights(source, "eca_resnet50")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == EXIT_FAILED


@pytest.mark.parametrize(
    ("source", "arch", "said"),
    [
        ("timm:resnet5", "eca_resnet50", "no weights of that name; did you mean .*resnet50"),
        ("timm:resnet50.no", "eca_resnet50", r"Invalid pretrained tag .* Give one of resnet50\.a1"),
        ("timm:../x", "eca_resnet50", "timm has no weights of that name"),
        ("torchvision", "timm:resnet50d", "torchvision: it has no timm:resnet50d; give a file"),
        ("timm", "eca_resnet50", "timm: no such file"),
    ],
)
def test_names_that_are_none(offline, source, arch, said):
    with pytest.raises(UserError, match=said):
        read_weights(source, arch)
