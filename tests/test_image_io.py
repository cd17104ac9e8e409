"""Odd files as a user's folders hold them."""

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

from utils import image_io
from utils.image_io import BrokenImageError, printable, read_image

CHANCE = np.random.default_rng(0)
SMOOTH = Image.fromarray(CHANCE.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize((80, 60))


def both(path) -> list[np.ndarray]:
    """What the two decoders make of a file, as (H, W, 3)."""
    tensor, image = read_image(path), read_image(path, "pil")
    assert tensor.dtype == torch.uint8
    assert image.mode == "RGB"
    return [tensor.permute(1, 2, 0).numpy(), np.asarray(image)]


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "bmp", "tif", "gif"])
def test_decoders_agree(tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    SMOOTH.save(path)
    quick, pillow = both(path)
    assert quick.shape == (60, 80, 3)
    np.testing.assert_array_equal(quick, pillow)
    if kind in ("png", "bmp", "tif"):
        np.testing.assert_array_equal(quick, np.asarray(SMOOTH))


def test_grey_palette_and_cmyk_become_rgb(tmp_path):
    grey = SMOOTH.convert("L")
    one_bit = grey.point(lambda v: 255 * (v > 120)).convert("1")
    for name, image in (("l.png", grey), ("l.jpg", grey), ("p.png", SMOOTH.quantize(64)),
                        ("one.png", one_bit)):  # fmt: skip
        image.save(tmp_path / name)
        quick, pillow = both(tmp_path / name)
        np.testing.assert_array_equal(quick, pillow)
        if name[0] != "p":
            assert (quick[..., 0] == quick[..., 1]).all()
    SMOOTH.convert("CMYK").save(tmp_path / "c.jpg", quality=95)
    quick, pillow = both(tmp_path / "c.jpg")
    np.testing.assert_array_equal(quick, pillow)
    assert np.abs(quick.astype(int) - np.asarray(SMOOTH)).mean() < 6


def test_16_bits_are_scaled_not_saturated(tmp_path):
    ramp = np.linspace(0, 65535, 60 * 80).reshape(60, 80).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    for found in both(tmp_path / "deep.png"):
        np.testing.assert_array_equal(found[..., 0], ramp >> 8)


def test_transparency_is_on_white(tmp_path):
    pixels = np.zeros((10, 10, 4), dtype=np.uint8)
    pixels[:5] = (200, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "t.png")
    for found in both(tmp_path / "t.png"):
        assert (found[0, 0] == (200, 0, 0)).all()
        assert (found[9, 9] == 255).all()


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (20, 20), c) for c in ("red", "lime", "blue")]
    for kind in ("gif", "webp"):
        path = tmp_path / f"a.{kind}"
        frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
        for found in both(path):
            assert found.shape == (20, 20, 3)
            assert np.abs(found[0, 0].astype(int) - (255, 0, 0)).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    SMOOTH.save(tmp_path / "o.jpg", exif=exif, quality=95)
    quick, pillow = both(tmp_path / "o.jpg")
    assert quick.shape == ((60, 80, 3) if orientation < 5 else (80, 60, 3))
    np.testing.assert_array_equal(quick, pillow)


def encoded(kind: str) -> bytes:
    data = io.BytesIO()
    SMOOTH.save(data, kind)
    return data.getvalue()


@pytest.mark.parametrize("decoder", image_io.DECODERS)
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.jpg", b"", "empty"),
        ("text.jpg", b"<html>not found</html>" * 9, "not an image"),
        ("cut.jpg", encoded("JPEG")[:700], ""),
        ("cut.png", encoded("PNG")[:700], ""),
        ("head.jpg", encoded("JPEG")[:20], ""),
    ],
)
def test_broken_files_are_named(tmp_path, decoder, name, content, reason):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BrokenImageError) as failed:
        read_image(path, decoder)
    assert failed.value.path == str(path)
    assert reason in failed.value.reason
    assert len(str(failed.value).splitlines()) == 1


@pytest.mark.parametrize("decoder", image_io.DECODERS)
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_decompression_bombs_are_refused(tmp_path, monkeypatch, decoder, kind):
    SMOOTH.save(tmp_path / f"x.{kind}")
    monkeypatch.setattr(image_io, "MAX_PIXELS", 60 * 80 - 1)
    with pytest.raises(BrokenImageError, match="bomb"):
        read_image(tmp_path / f"x.{kind}", decoder)


def test_names_that_are_not_utf8(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(path, "wb") as file:
        file.write(encoded("PNG"))
    assert read_image(path).shape == (3, 60, 80)
    assert printable(path).endswith("/caf\\xe9.png")
    printable(path).encode("utf-8")  # fit for any terminal
