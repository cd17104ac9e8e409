"""hubconf.py: torch.hub lists and builds the networks, and downloads nothing unasked."""

import socket
import subprocess
import sys
import threading

import pytest
import torch
from helpers.trees import ROOT
from torchvision.models import resnet18

import hubconf
from models import MODELS, create_model, weights
from utils.runs import checkpoint


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of torch.hub."""
    before = torch.hub._hub_dir
    torch.hub.set_dir(tmp_path / "hub")
    yield tmp_path / "hub"
    torch.hub._hub_dir = before


def write(path, name="eca_resnet18", classes=3):
    torch.manual_seed(1)
    network = create_model(name, num_classes=classes)
    fields = {**weights.describe_network(network), "classes": [str(i) for i in range(classes)]}
    checkpoint.save(path, {**fields, "state_dict": network.state_dict()})
    return network.state_dict()


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_torch_hub_builds_a_network_and_needs_torch_alone(tmp_path):
    """In a process of its own, outside of the repository, as users call it."""
    text = f"""
import sys, torch
torch.hub.set_dir({str(tmp_path)!r})
where = {{"repo_or_dir": {str(ROOT)!r}, "source": "local"}}
network = torch.hub.load(model="eca_resnet18", num_classes=7, ksize="3355", **where)
print(network(torch.zeros(2, 3, 64, 64)).shape, network.ksize)
print({{"torchvision", "tensorboard", "matplotlib"}} & sys.modules.keys())
"""
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    built, foreign = done.stdout.splitlines()
    assert built == "torch.Size([2, 7]) (3, 3, 5, 5)"
    assert foreign == "set()"


def test_torch_hub_lists_the_networks_and_nothing_else():
    """By the rule of torch.hub.list, which itself asks GitHub."""
    listed = [n for n in dir(hubconf) if callable(getattr(hubconf, n)) and not n.startswith("_")]
    assert set(listed) == set(MODELS)
    assert "path or URL" in hubconf.eca_resnet18.__doc__


@pytest.mark.usefixtures("thin")
def test_weights_of_a_path_and_of_a_url(tmp_path, cache, capsys):
    held = write(tmp_path / "best.pth")
    assert same(hubconf.eca_resnet18(weights=tmp_path / "best.pth").state_dict(), held)
    assert "Loaded " in capsys.readouterr().err
    assert not cache.exists()  # nothing is copied for a path
    url = (tmp_path / "best.pth").as_uri()
    assert same(hubconf.eca_resnet18(weights=url).state_dict(), held)
    (kept,) = (cache / "checkpoints").iterdir()
    assert kept.name.endswith("-best.pth")
    assert "downloading file://" in capsys.readouterr().err
    hubconf.eca_resnet18(weights=url)
    assert "downloading" not in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other" / "best.pth", classes=4)
    found = hubconf.eca_resnet18(weights=(tmp_path / "other" / "best.pth").as_uri())
    assert same(found.state_dict(), other)


def test_a_cut_download_is_not_taken_next_time(tmp_path, cache):
    held = write(tmp_path / "best.pth")
    whole = (tmp_path / "best.pth").read_bytes()
    (tmp_path / "best.pth").write_bytes(whole[: len(whole) // 2])
    url = (tmp_path / "best.pth").as_uri()
    with pytest.raises(ValueError, match=r"-best\.pth: .*removed from the cache"):
        hubconf.eca_resnet18(weights=url)
    (tmp_path / "best.pth").write_bytes(whole)
    assert same(hubconf.eca_resnet18(weights=url).state_dict(), held)


def test_a_server_that_answers_nonsense_is_one_line(cache):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            with server.accept()[0] as asked:
                asked.recv(1000)
                asked.sendall(b"nonsense\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/best.pth"
        with pytest.raises(ValueError, match=r"best\.pth: nonsense; check the URL"):
            hubconf.eca_resnet18(weights=url)


def test_what_is_new_is_said(tmp_path, capsys):
    torch.manual_seed(2)
    torch.save(resnet18().state_dict(), tmp_path / "plain.pth")
    network = hubconf.eca_resnet18(weights=tmp_path / "plain.pth", num_classes=5)
    text = capsys.readouterr().err
    assert network.num_classes == 5
    assert "attention kernels are new" in text
    assert "Left fc as initialised" in text


@pytest.mark.usefixtures("thin")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"weights": "no/such.pth"}, r"no/such\.pth: no such file"),
        ({"weights": "best.pth", "name": "eca_resnet34"}, r"best\.pth: .*do not fit eca_resnet34"),
        ({"weights": "file:///no/such.pth"}, "check the URL"),
        ({"pretrained": True}, "give weights=FILE"),
        ({"weights": "code.pth"}, r"code\.pth"),
    ],
)
def test_refusals_are_one_line(tmp_path, cache, monkeypatch, call, message):
    monkeypatch.chdir(tmp_path)
    write("best.pth")
    torch.save({"state_dict": pytest.approx(1)}, "code.pth")  # a pickle that wants to run code
    name = call.pop("name", "eca_resnet18")
    with pytest.raises(ValueError, match=message) as error:
        getattr(hubconf, name)(**call)
    assert "\n" not in str(error.value)
