"""Odd files as a user's folders hold them."""

import argparse
import struct
import zlib

import numpy as np
import pytest
import torch
from helpers.mixed_images import SMOOTH
from PIL import Image

from utils.data import decoding
from utils.data.decoding import read_image


def both(path) -> list[np.ndarray]:
    """What the decoders make of a file, as (H, W, 3): the quick ones, which agree, and Pillow."""
    tensor, image = read_image(path), read_image(path, "pil")
    assert torch.equal(read_image(path, "simplejpeg"), tensor)
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
    for name, image in (
        ("l.png", grey),
        ("l.jpg", grey),
        ("p.png", SMOOTH.quantize(64)),
        ("one.png", one_bit),
    ):
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


GREY = np.linspace(0, 1, 60 * 80).reshape(60, 80)  # what a picture shows: 0 black, 1 white


@pytest.mark.parametrize("decoder", ["torchvision", "pil"])
@pytest.mark.parametrize(
    ("dtype", "white"),
    [
        ("float32", 1),
        ("float32", 255),
        ("float32", 65535),
        ("int32", 255),
        ("int32", 65535),
        ("uint16", 255),
        ("uint16", 65535),
        (">u2", 65535),
    ],
)
def test_grey_of_any_depth_shows_the_same_picture(tmp_path, dtype, white, decoder):
    values = GREY * white
    if dtype != "float32":
        values = values.round()
    Image.fromarray(values.astype(dtype)).save(tmp_path / "grey.tif")
    found = read_image(tmp_path / "grey.tif", decoder)
    found = np.asarray(found if decoder == "pil" else found.permute(1, 2, 0))
    assert found.shape == (60, 80, 3)
    assert np.abs(found - 255 * GREY[..., None]).max() < 1.01
    assert (found.min(), found.max()) == (0, 255)


def test_masks_of_zero_and_one(tmp_path):
    """Floats up to 1 are shares of white; integers up to 255 are what 8 bits hold."""
    mask = np.array([[0, 1], [1, 0]])
    Image.fromarray(mask.astype(np.float32)).save(tmp_path / "f.tif")
    Image.fromarray(mask.astype(np.int32)).save(tmp_path / "i.tif")
    for name, white in (("f.tif", 255), ("i.tif", 1)):
        for found in both(tmp_path / name):
            np.testing.assert_array_equal(found[..., 0], white * mask)


@pytest.mark.parametrize("ending", decoding.JPEGS)
def test_a_jpeg_by_any_of_its_endings(tmp_path, ending):
    SMOOTH.save(tmp_path / f"a{ending}", "JPEG")
    assert ending in decoding.EXTENSIONS
    assert read_image(tmp_path / f"a{ending}").shape == (3, 60, 80)


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


def test_simplejpeg_reads_what_it_can_and_is_asked_for_by_name(tmp_path, monkeypatch):
    asked, black = [], np.zeros((60, 80, 3), np.uint8)
    monkeypatch.setattr("simplejpeg.decode_jpeg", lambda _, **how: asked.append(how) or black)
    SMOOTH.save(tmp_path / "x.jpg")
    read_image(tmp_path / "x.jpg")
    assert not asked
    assert not read_image(tmp_path / "x.jpg", "simplejpeg").any()
    assert len(asked) == 1


def test_a_decoder_that_is_not_there_is_named(monkeypatch):
    assert decoding.decoder_name("simplejpeg") == "simplejpeg"
    with pytest.raises(argparse.ArgumentTypeError, match="not one of torchvision, simplejpeg, pil"):
        decoding.decoder_name("turbo")
    monkeypatch.setattr(decoding.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(argparse.ArgumentTypeError, match="pip install simplejpeg"):
        decoding.decoder_name("simplejpeg")
    assert decoding.decoder_name("pil") == "pil"


def test_16_bit_colour_and_grey_of_other_formats(tmp_path):
    row = np.array([[[0, 32768, 65535], [65535, 256, 0]]], dtype=">u2")

    def chunk(name: bytes, data: bytes) -> bytes:  # by hand: Pillow cannot write such a PNG
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row.tobytes()))
    data = b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")
    (tmp_path / "rgb.png").write_bytes(data)
    for found in both(tmp_path / "rgb.png"):
        assert found[0].tolist() == [[0, 128, 255], [255, 1, 0]]
    grey = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    (tmp_path / "grey.pgm").write_bytes(b"P5 5 1 65535\n" + grey.astype(">u2").tobytes())
    Image.fromarray(grey).save(tmp_path / "grey.tif")
    for name in ("grey.pgm", "grey.tif"):
        for found in both(tmp_path / name):
            assert found[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_a_transparent_palette_colour_is_white(tmp_path):
    keyed = Image.new("P", (2, 1))
    keyed.putpalette([10, 20, 30, 40, 50, 60])
    keyed.putpixel((1, 0), 1)
    keyed.save(tmp_path / "keyed.png", transparency=1)
    for found in both(tmp_path / "keyed.png"):
        assert found[0].tolist() == [[10, 20, 30], [255] * 3]


def test_the_frame_header_behind_other_segments():
    """What decides between the two decoders, on hand-made headers."""
    frame = b"\xff\xc2\x00\x11\x08" + struct.pack(">HHB", 16, 24, 3) + bytes(9)
    comment = b"\xff\xfe\x00\x06abcd"
    assert decoding._jpeg_frame(b"\xff\xd8" + comment + b"\xff\xff" + frame) == (24, 16, 3)
    assert decoding._jpeg_frame(b"\xff\xd8" + comment) is None
    assert decoding._jpeg_frame(b"\x89PNG") is None
