"""Broken files are refused by name, and a fault of the machine is not called a file's."""

import errno
import io
import os

import numpy as np
import pytest
from helpers.mixed_images import SMOOTH
from PIL import Image

from utils.data import decoding
from utils.data.decoding import BrokenImageError, read_image
from utils.system.errors import EXIT_FAILED, UserError


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.array([[-1, 200]], dtype=np.int32), "grey values from -1 to 200"),
        (np.array([[0, 70000]], dtype=np.int32), "from 0 to 70000"),
        (np.array([[-0.5, 0.5]], dtype=np.float32), "from -0.5 to 0.5"),
        (np.array([[0, np.nan]], dtype=np.float32), "from nan to nan"),
        (np.array([[0, np.inf]], dtype=np.float32), "from 0 to inf"),
        (np.array([[0, 1.25]], dtype=np.float32), "up to 1.25, a little more than 1"),
    ],
)
def test_grey_whose_white_cannot_be_known_is_refused(tmp_path, values, said):
    Image.fromarray(values).save(tmp_path / "odd.tif")
    for decoder in ("simplejpeg", "pil"):
        with pytest.raises(BrokenImageError, match=f"odd.tif: .*{said}.*save the image with 8"):
            read_image(tmp_path / "odd.tif", decoder)


def encoded(kind: str) -> bytes:
    data = io.BytesIO()
    SMOOTH.save(data, kind)
    return data.getvalue()


@pytest.mark.parametrize("decoder", decoding.DECODERS)
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


@pytest.mark.parametrize("decoder", decoding.DECODERS)
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_decompression_bombs_are_refused(tmp_path, monkeypatch, decoder, kind):
    SMOOTH.save(tmp_path / f"x.{kind}")
    monkeypatch.setattr(decoding, "MAX_PIXELS", 60 * 80 - 1)
    with pytest.raises(BrokenImageError, match="bomb"):
        read_image(tmp_path / f"x.{kind}", decoder)


@pytest.mark.parametrize("decoder", decoding.DECODERS)
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_pictures_of_one_line_of_pixels_are_refused(tmp_path, decoder, kind):
    """20,000 x 1, its shorter side made 256, would take 3.9 GB."""
    path = tmp_path / f"line.{kind}"
    Image.new("RGB", (100, 1)).save(path)
    assert read_image(path, decoder) is not None
    for width, height in ((101, 1), (1, 101)):
        Image.new("RGB", (width, height)).save(path)
        with pytest.raises(BrokenImageError, match=f"{width}x{height} pixels: one side is"):
            read_image(path, decoder)


@pytest.mark.parametrize("decoder", decoding.DECODERS)
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif", "gif", "bmp"])
def test_every_truncation_is_noticed(tmp_path, decoder, kind):
    path = tmp_path / f"x.{kind}"
    SMOOTH.save(path)
    whole = path.read_bytes()
    for share in (0.05, 0.3, 0.6, 0.9):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(BrokenImageError):
            read_image(path, decoder)


@pytest.mark.parametrize("decoder", decoding.DECODERS)
def test_a_pipe_or_a_folder_is_refused_without_waiting(tmp_path, decoder):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(BrokenImageError, match="not a regular file"):
        read_image(tmp_path / "pipe.jpg", decoder)
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(BrokenImageError, match=r"folder\.jpg: "):
        read_image(tmp_path / "folder.jpg", decoder)
    with pytest.raises(BrokenImageError, match=r"gone\.jpg: No such file or directory"):
        read_image(tmp_path / "gone.jpg", decoder)


def test_no_memory_is_not_the_files_fault(tmp_path, monkeypatch):
    SMOOTH.save(tmp_path / "a.png")

    def fail(_):
        raise MemoryError

    monkeypatch.setattr(decoding, "_pil_rgb", fail)
    with pytest.raises(MemoryError):
        read_image(tmp_path / "a.png")


STORAGE = {
    errno.EIO: "see to the storage",
    errno.ESTALE: "see to the storage",
    errno.ETIMEDOUT: "see to the storage",
    errno.ENOMEM: "see to the storage",
    errno.EMFILE: "use fewer workers",
    errno.ENFILE: "use fewer workers",
}


@pytest.mark.parametrize("number", [*STORAGE, errno.ENOENT, errno.EACCES, errno.ELOOP])
def test_a_fault_of_the_storage_is_not_the_image_s(tmp_path, bad_sector, number):
    """Else --skip-bad-images would go on without the data when a file server goes away."""
    bad_sector(b"a.jpg", number)
    wanted = UserError if number in STORAGE else BrokenImageError
    with pytest.raises(wanted) as caught:
        read_image(str(tmp_path / "a.jpg"))
    told = f"{tmp_path}/a.jpg: {os.strerror(number)}"
    if number in STORAGE:
        assert caught.value.exit_code == EXIT_FAILED
        assert str(caught.value).startswith(f"{told}; {STORAGE[number]}")
    else:
        assert str(caught.value) == told
