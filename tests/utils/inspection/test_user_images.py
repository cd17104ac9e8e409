"""A user's images: what their names stand for, and in batches in their order."""

import sys
from types import SimpleNamespace

import pytest
import torch

from utils.data.transforms import Preprocessing
from utils.inspection.predictions import find_images, read_batches
from utils.system.errors import UserError


def test_what_names_stand_for(photos, monkeypatch):
    def found(*names):
        return [p.decode().removeprefix(f"{photos}/") for p in find_images(list(map(str, names)))]

    everything = ["a.png", "b.jpg", "bad.png", "cat/c.png", "cat/d[1].png"]
    assert found(photos) == everything
    assert found(photos / "cat", photos) == everything[3:] + everything[:3]  # each once, in order
    assert found(photos / "*.png") == ["a.png", "bad.png"]
    assert found(f"{photos}/**/*.png") == ["a.png", "bad.png", "cat/c.png", "cat/d[1].png"]
    assert found(photos / "cat/d[1].png") == ["cat/d[1].png"]  # a file before a pattern
    assert found(photos / "notes.txt") == ["notes.txt"]  # named: it will be tried

    lines = [f"{photos}/b.jpg\n".encode(), b"\n", f"{photos}/a.png".encode()]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=lines))
    assert found("-") == ["b.jpg", "a.png"]
    lines.clear()
    (photos / "empty").mkdir()
    for name, message in [
        ("-", "no path came in"),
        (photos / "none*.png", "no such file, folder or pattern"),
        (photos / "empty", "no image below this folder"),
    ]:
        with pytest.raises(UserError, match=message):
            find_images([str(name)])


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_keep_the_order_and_set_broken_images_aside(photos, workers):
    paths = find_images([str(photos)]) + [str(photos / "bad.png").encode()]
    batches = list(read_batches(paths, Preprocessing(64, 0.8), 2, torch.device("cpu"), workers))
    assert [batch.indices for batch in batches] == [[0, 1], [3], [4]]
    assert [batch.broken for batch in batches] == [[], [(2, "not an image")], [(5, "not an image")]]
    assert all(batch.images.shape == (len(batch.indices), 3, 64, 64) for batch in batches)
    assert [
        b.images.shape[0]
        for b in read_batches(paths[5:], Preprocessing(64, 0.8), 2, torch.device("cpu"))
    ] == [0]
    pil = next(read_batches(paths, Preprocessing(64, 0.8), 2, torch.device("cpu"), decoder="pil"))
    assert (pil.images - batches[0].images).abs().mean() < 0.05  # another decoder, the same image
