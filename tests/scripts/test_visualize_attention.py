"""visualize_attention.py: the weights that the layers apply, averaged over the right images."""

from functools import partial

import numpy as np
import pytest
import torch
from helpers.shard_sets import make
from PIL import Image

import visualize_attention
from models import create_model, weights
from models.eca_resnet import BasicBlock, ResNet
from utils.data.decoding import read_image
from utils.inspection import channel_weights
from utils.inspection.channel_weights import LayerWeights
from utils.runs import checkpoint


@pytest.fixture
def cli(export_cli):
    """Runs visualize_attention.py: (exit code, all that it printed)."""
    return partial(export_cli, main=visualize_attention.main)


def saved(path, network):
    fields = {"classes": ["other", "names"], "img_size": 32, "crop_pct": 1.0}
    state = {**weights.describe_network(network), **fields, "state_dict": network.state_dict()}
    checkpoint.save(path, state)
    return path


@pytest.mark.usefixtures("thin")
def test_script_from_images_to_files(cli, tmp_path, monkeypatch):
    chance = np.random.default_rng(0)
    for name, count in (("ant", 3), ("bee", 2)):
        (tmp_path / "data" / "val" / name).mkdir(parents=True)
        for i in range(count):
            pixels = chance.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / "val" / name / f"{i}.png")
    torch.manual_seed(0)
    network = create_model("eca_resnet18", num_classes=2).eval()
    ckpt = saved(tmp_path / "best.pth", network)

    code, text = cli(ckpt, "data", "-b", 2, "--curves", "bee", "ant")
    assert code == 0
    assert "5 images in 2 classes" in text
    names = ["attention.npz", "channel_weights.png", "kernels.png", "spread.png"]
    assert sorted(p.name for p in (tmp_path / "runs/attention-1").iterdir()) == names
    with np.load(tmp_path / "runs/attention-1/attention.npz") as found:
        assert found["classes"].tolist() == ["ant", "bee"]
        assert found["images"].tolist() == [3, 2]
        last = found["layer4.1.eca.mean"]
        np.testing.assert_array_equal(
            found["layer2.0.eca.kernel"], network.layer2[0].eca.conv.weight.detach().flatten()
        )
    # By hand: the input of the last block's attention, and its gate.
    seen = []
    network.layer4[1].eca.register_forward_hook(lambda m, i, o: seen.append((i[0], o)))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    for i in range(2):
        image = read_image(tmp_path / f"data/val/bee/{i}.png") / 255
        network(((image - mean) / std)[None])
    ratio = [(out / x).mean((2, 3))[0] for x, out in seen]
    np.testing.assert_allclose(last[1], torch.stack(ratio).mean(0).detach(), atol=1e-5)

    # A folder of class folders itself; fewer images; all blocks; a broken one.
    (tmp_path / "data/val/ant/0.png").write_bytes(b"broken")
    code, text = cli(ckpt, "data/val", "--per-class", 2, "--all-blocks", "--output", "out")
    assert code == 1
    assert "data/val/ant/0.png: not an image; passed over" in text
    with np.load(tmp_path / "out/attention.npz") as found:
        assert found["images"].tolist() == [1, 2]
    heights = [
        Image.open(tmp_path / folder / "channel_weights.png").height
        for folder in ("runs/attention-1", "out")
    ]
    assert heights[1] > 1.8 * heights[0]  # eight panels, four panels

    # Squeeze and excitation has no kernels; the same images in shards.
    squeeze = ResNet(BasicBlock, (2, 2, 2, 2), "se", None, 2, "se_resnet18")
    ckpt_se = saved(tmp_path / "se.pth", squeeze)
    (tmp_path / "data/val/ant/0.png").unlink()
    (tmp_path / "data/train").symlink_to("val")
    shards = make(monkeypatch, tmp_path / "data", tmp_path / "shards", "-j", 1)
    for number, data in ((2, "data"), (3, shards)):
        code, text = cli(ckpt_se, data, "--per-class", 1, "-j", 0)
        assert code == 0
        files = "channel_weights.png, spread.png, attention.npz"
        assert f"written to runs/attention-{number}: {files}" in text
        rows = [line for line in text.splitlines() if line.startswith(("layer1.", "layer4."))]
        assert len(rows) == 4
        for line in rows:  # noise, within and kernel
            assert line.split()[-3:] == ["-", "-", "-"]
            assert float(line.split()[-4]) > 0
    folder, sharded = (np.load(f"runs/attention-{i}/attention.npz") for i in (2, 3))
    for name in folder:
        np.testing.assert_array_equal(folder[name], sharded[name])

    # What is wrong is said in one line.
    plain = saved(tmp_path / "plain.pth", create_model("resnet18", num_classes=2))
    for arguments, message in [
        ((plain, "data"), "resnet18 has no attention layers"),
        ((ckpt, "data", "--curves", "been"), "--curves: no class 'been'; did you mean bee?"),
        ((ckpt, "data", "--output", "out"), "out: is in use"),
        ((ckpt, "nowhere"), "nowhere: no such folder"),
    ]:
        code, text = cli(*arguments)
        assert (code, message in text) == (2, True), text
    assert "Traceback" not in text


@pytest.fixture
def layers():
    """Two blocks of stage 1 and one of stage 2, three classes."""
    chance = np.random.default_rng(0)

    def layer(stage, block, k):
        mean, std = chance.random((2, 3, 6))
        return LayerWeights("x", stage, block, mean, std, np.full(3, 4), chance.normal(size=k))

    return [layer(1, 1, 3), layer(1, 2, 3), layer(2, 1, 5)]


def lines(axis):
    return {line.get_label(): np.array(line.get_data()) for line in axis.lines}


def test_weights_are_drawn_class_by_class(layers, figures):
    channel_weights.draw_weights(layers[1:], ["ant", "bee", "cat"], [2, 0], "t")
    panels = figures[0].axes
    lefts = [axis for axis in panels if axis.get_ylabel() == "Weight s"]
    rights = [axis for axis in panels if axis.images and len(axis.get_yticks()) == 2]
    assert [axis.get_title("left") for axis in rights] == [
        "stage 1, block 2: 6 channels, k = 3",
        "stage 2, block 1: 6 channels, k = 5",
    ]
    for layer, left, right in zip(layers[1:], lefts, rights, strict=True):
        mean = layer.mean.mean(0)
        order = np.argsort(-mean)
        np.testing.assert_array_equal(left.lines[0].get_ydata(), mean[order])
        differences = (layer.mean[[2, 0]] - mean)[:, order]
        np.testing.assert_allclose(right.images[0].get_array(), differences)
        assert [text.get_text() for text in right.get_yticklabels()] == ["cat", "ant"]
        low, high = right.images[0].get_clim()
        assert -low == high == np.abs(differences).max()


def test_spreads_are_drawn_block_by_block(layers, figures):
    channel_weights.draw_spread(layers, "t")
    upper, lower = figures[0].axes
    for label, name in (
        ("between images of one class", "within"),
        ("between the classes' means", "between"),
        ("the same, expected by chance", "noise"),
    ):
        np.testing.assert_array_equal(lines(lower)[label][1], [getattr(a, name) for a in layers])
    medians = [np.median(layer.mean.mean(0)) for layer in layers]
    np.testing.assert_allclose(upper.lines[0].get_ydata(), medians)
    assert [text.get_text() for text in lower.get_xticklabels()] == ["1.1", "1.2", "2.1"]
    assert [line.get_xdata()[0] for line in lower.lines[3:]] == [1.5]  # where a stage begins


def test_kernels_are_drawn_stage_by_stage(layers, figures):
    channel_weights.draw_kernels(layers, "t")
    first, second = figures[0].axes
    assert [axis.get_title() for axis in (first, second)] == ["Stage 1, k = 3", "Stage 2, k = 5"]
    for axis, block, layer in ((first, 1, 0), (first, 2, 1), (second, 1, 2)):
        kernel = layers[layer].kernel
        reach = len(kernel) // 2
        np.testing.assert_array_equal(
            lines(axis)[f"block {block}"], [range(-reach, reach + 1), kernel]
        )
