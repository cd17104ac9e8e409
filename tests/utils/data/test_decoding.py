"""Odd files as a user's folders hold them."""

import argparse
import io
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from helpers.mixed_images import SMOOTH, photo
from PIL import Image, ImageOps

from utils.data import decoding
from utils.data.decoding import read_image


def both(path) -> list[np.ndarray]:
    """What the decoders make of a file, as (H, W, 3): the quick one, and Pillow."""
    tensor, image = read_image(path), read_image(path, "pil")
    assert tensor.dtype == torch.uint8
    assert image.mode == "RGB"
    return [tensor.permute(1, 2, 0).numpy(), np.asarray(image)]


def chunk(name: bytes, data: bytes) -> bytes:
    """A part of a PNG, by hand: Pillow writes none of its own choice."""
    body = name + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


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


GREY = np.linspace(0, 1, 60 * 80).reshape(60, 80)  # what a picture shows: 0 black, 1 white


@pytest.mark.parametrize("decoder", ["simplejpeg", "pil"])
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


def exif(orientation: int, kind: str = "H") -> bytes:
    """EXIF with the orientation alone: a SHORT ("H") or a LONG ("I")."""
    number = struct.pack(f"<{kind}", orientation).ljust(4, b"\0")
    field = {"H": 3, "I": 4}[kind]
    return b"Exif\0\0II*\0" + struct.pack("<IHHHI", 8, 1, 0x0112, field, 1) + number + bytes(4)


def xmp(orientation: int) -> bytes:
    text = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'
    return b"http://ns.adobe.com/xap/1.0/\0" + text.encode()


def with_notes(jpeg: bytes, *notes: bytes) -> bytes:
    """The JPEG with APP1 segments in front, behind JFIF's."""
    start = 4 + int.from_bytes(jpeg[4:6], "big")
    parts = [b"\xff\xe1" + struct.pack(">H", len(note) + 2) + note for note in notes]
    return jpeg[:start] + b"".join(parts) + jpeg[start:]


def encoded(kind: str, image: Image.Image = SMOOTH, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def upright(path) -> np.ndarray:
    """What Pillow itself makes of a file, (H, W, 3)."""
    return np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))


TURNED = {  # of (H, W, 3) pixels, by EXIF's definition of the eight values
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x.swapaxes(0, 1)[:, ::-1],
    7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],
    8: lambda x: x.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation, kind):
    note = Image.Exif()
    note[0x0112] = orientation
    path = tmp_path / f"o.{kind}"
    path.write_bytes(encoded(kind, exif=note))
    expected = upright(path)
    np.testing.assert_array_equal(
        expected, TURNED[orientation](np.asarray(Image.open(io.BytesIO(encoded(kind)))))
    )
    for pixels in both(path):
        np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize(
    ("notes", "orientation"),
    [
        ([xmp(1), exif(6)], 6),  # as most editors write it
        ([b"http://ns.adobe.com/xmp/extension/\0" + bytes(60), exif(3)], 3),
        ([xmp(8)], 8),
        ([exif(7, "I"), xmp(1)], 7),
        ([exif(9)], 1),
        ([exif(0), xmp(6)], 1),  # EXIF goes before
    ],
)
def test_orientation_wherever_it_is_noted(tmp_path, notes, orientation):
    for kind in ("RGB", "L"):
        jpeg = encoded("jpeg", SMOOTH.convert(kind))
        (tmp_path / "o.jpg").write_bytes(with_notes(jpeg, *notes))
        plain = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
        for pixels in both(tmp_path / "o.jpg"):
            np.testing.assert_array_equal(pixels, upright(tmp_path / "o.jpg"))
            np.testing.assert_array_equal(pixels, TURNED[orientation](plain))


def png_with(name: bytes, data: bytes) -> bytes:
    """The PNG with a chunk in front of its pixels."""
    png = encoded("png")
    at = png.index(b"IDAT") - 4
    return png[:at] + chunk(name, data) + png[at:]


def webp_with(exif: bytes) -> bytes:
    """The WebP with this EXIF, as it is."""
    webp = encoded("webp", exif=b"Exif\0\0" + bytes(40))
    at = webp.index(b"EXIF")
    size = int.from_bytes(webp[at + 4 : at + 8], "little")
    return webp[: at + 8] + exif.ljust(size, b"?")[:size] + webp[at + 8 + size :]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("cut.jpg", with_notes(encoded("jpeg"), exif(6)[:-9])),
        ("letters.png", png_with(b"eXIf", b"no header of TIFF's")),
        ("letters.webp", webp_with(b"no header of TIFF's")),
        ("letters.tif", encoded("tiff", tiffinfo={34665: 10**6})),  # EXIF that lies nowhere
    ],
)
def test_damaged_exif_takes_nothing_of_a_picture(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    plain = np.asarray(
        Image.open(io.BytesIO(encoded(Image.registered_extensions()[Path(name).suffix])))
    )
    for pixels in both(tmp_path / name):
        np.testing.assert_array_equal(pixels, plain)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {"subsampling": "4:2:0"}),
        ("RGB", {"subsampling": "4:4:4", "quality": 97}),
        ("RGB", {"subsampling": "4:2:2"}),
        ("RGB", {"progressive": True}),
        ("RGB", {"keep_rgb": True}),
        ("RGB", {"restart_marker_rows": 2}),
        ("L", {}),
        ("L", {"progressive": True}),
    ],
)
def test_a_jpeg_s_pixels_are_those_of_torchvision_s_decoder(tmp_path, mode, options):
    """So runs that it has begun go on with the same bits."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError:  # announced for the time after 0.29
        pytest.skip("this torchvision decodes no JPEGs")
    for i, (width, height) in enumerate([(80, 60), (61, 83), (500, 375), (1, 9)]):
        image = photo(width, height, np.random.default_rng(i)).convert(mode)
        data = encoded("jpeg", image, **options)
        variants = [data, data + b"trailer"]
        if "keep_rgb" in options:  # Adobe's marker says so; without it the components' names do
            assert data[2:4] == b"\xff\xee"
            variants.append(data[:2] + data[4 + int.from_bytes(data[4:6], "big") :])
        for variant in variants:
            (tmp_path / "x.jpg").write_bytes(variant)
            encoding = torch.frombuffer(bytearray(variant), dtype=torch.uint8)
            theirs = decode_jpeg(encoding, ImageReadMode.RGB)
            assert torch.equal(read_image(tmp_path / "x.jpg"), theirs)


def test_what_a_warning_is_about_is_read(tmp_path):
    """simplejpeg alone would refuse bytes that belong to nothing; no other reader does."""
    jpeg = encoded("jpeg")
    at = jpeg.index(b"\xff\xdb")
    (tmp_path / "x.jpg").write_bytes(jpeg[:at] + b"\x12\x34" + jpeg[at:])
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg((tmp_path / "x.jpg").read_bytes())
    for pixels in both(tmp_path / "x.jpg"):
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(jpeg))))


def test_simplejpeg_is_used_where_it_can_be(tmp_path, monkeypatch):
    calls, black = [], np.zeros((60, 80, 3), np.uint8)
    monkeypatch.setattr("simplejpeg.decode_jpeg", lambda _, **how: calls.append(how) or black)
    SMOOTH.save(tmp_path / "x.jpg")
    SMOOTH.convert("CMYK").save(tmp_path / "cmyk.jpg")
    assert not read_image(tmp_path / "x.jpg").any()
    assert read_image(tmp_path / "cmyk.jpg").any()
    assert len(calls) == 1


def test_pillow_serves_where_simplejpeg_is_missing(tmp_path, monkeypatch):
    SMOOTH.save(tmp_path / "x.jpg")
    expected = read_image(tmp_path / "x.jpg")
    monkeypatch.setitem(sys.modules, "simplejpeg", None)  # its import fails
    assert torch.equal(read_image(tmp_path / "x.jpg"), expected)


def test_a_decoder_that_is_not_there_is_named():
    assert [decoding.decoder_name(name) for name in ("simplejpeg", "pil")] == ["simplejpeg", "pil"]
    with pytest.raises(argparse.ArgumentTypeError, match="not one of simplejpeg, pil"):
        decoding.decoder_name("turbo")
    with pytest.raises(argparse.ArgumentTypeError, match="simplejpeg, which reads the same"):
        decoding.decoder_name("torchvision")
    with pytest.raises(argparse.ArgumentTypeError, match="'cuda' is gone: leave --decoder out"):
        decoding.decoder_name("cuda")


def test_16_bit_colour_and_grey_of_other_formats(tmp_path):
    row = np.array([[[0, 32768, 65535], [65535, 256, 0]]], dtype=">u2")

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
