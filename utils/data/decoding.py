"""Reads one image file as an upright 8-bit RGB picture, or says in an error what is wrong with it.

Every reader of user images (training, evaluation, prediction, the data check) goes through
`read_image`, so that odd files look the same to all of them:

- grey of more than 8 bits, and of floats, is scaled to 8 bits by its values, see `_grey_in_8_bits`
  (Pillow's own conversion would saturate it);
- CMYK, grey, palette and alpha become RGB, transparent parts on white;
- of an animation the first frame counts;
- the EXIF orientation is applied.
"""

import argparse
import errno
import functools
import importlib.util
import io
import os
import re
import stat
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps

from utils.system.errors import EXIT_FAILED, FEWER_FILES, TOO_MANY_FILES, UserError
from utils.system.text import printable

warnings.filterwarnings("ignore", "The image decoding and encoding capabilities of TorchVision")

JPEGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi")
EXTENSIONS = (*JPEGS, ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
DECODERS = ("torchvision", "simplejpeg", "pil")
ON_DEVICE = "cuda"  # main.py's fourth: the run's GPU decodes, see utils/data/gpu_decoding.py
EXIF = b"Exif\0\0"  # what follows may turn the picture
ADOBE = b"Adobe"  # what follows may say that three components are RGB already
JFIF = b"JFIF\0"  # behind the first marker; says that they are YCbCr
END = b"\xff\xd9"  # the last bytes of a JPEG that was not cut short
# Of an image's file these tell what is wrong with it; any other OSError tells of the machine.
OF_THE_FILE = (
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENXIO,
    errno.ENODEV,
)
MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # where Pillow itself turns from warning to refusing


class BrokenImageError(Exception):
    """Means that a file cannot be read as an image. `path` is printable, `reason` is one line."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)  # both, so that the error survives a worker's pickle
        self.path, self.reason = path, reason
        self.can_be_skipped = False  # by --skip-bad-images

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Stored(Protocol):
    """Describes an image that is no file of its own; `str()` gives its name for messages."""

    def read(self) -> bytes: ...


def decoder_name(text: str, known: Sequence[str] = DECODERS) -> str:
    """Checks, as an argparse type, that a decoder is one of `known` and is installed."""
    if text not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(known)}")
    if text == ON_DEVICE and jpeg_decoder() is None:
        raise argparse.ArgumentTypeError(
            "this torchvision decodes no JPEGs, on a GPU or elsewhere: give another one, such as "
            f"{DECODERS[0]}"
        )
    if text == "simplejpeg" and importlib.util.find_spec(text) is None:
        raise argparse.ArgumentTypeError(
            "simplejpeg is not installed: pip install simplejpeg, or leave --decoder out"
        )
    return text


def read_file(path: str | bytes) -> bytes:
    """Returns the bytes of an image file.

    Raises:
        OSError: it cannot be read, see `OF_THE_FILE`.
        ValueError: a pipe, a device, a folder.
        UserError: exit code 1, when the storage or the machine gives way.
    """
    try:
        # Not to wait for ever for the other end of a pipe.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError("not a regular file")
            return file.read()
    except OSError as error:
        if error.errno in OF_THE_FILE:
            raise
        remedy = "see to the storage, and start again (a run: with --resume auto)"
        if error.errno in TOO_MANY_FILES:
            remedy = FEWER_FILES
        raise UserError(f"{printable(path)}: {error.strerror}; {remedy}", EXIT_FAILED) from None


@functools.cache
def jpeg_decoder() -> Callable[..., Any] | None:
    """Returns torchvision's `decode_jpeg`, into RGB; None for a torchvision without it.

    It is imported when first used, as torchvision takes half as long to import as torch.
    """
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError:  # announced for a torchvision after 0.29: Pillow reads everything then
        return None
    return functools.partial(decode_jpeg, mode=ImageReadMode.RGB)


def prepare_for_workers(workers: int, decoder: str) -> None:
    """Imports what loader workers will decode with: those that are forked later have it then.

    Each would import it for itself, which takes seconds and 200 MB that could be shared.
    """
    if workers and decoder in (DECODERS[0], ON_DEVICE):
        jpeg_decoder()


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Returns an RGB image as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_image(
    path: str | bytes | Stored, decoder: str = "torchvision"
) -> torch.Tensor | Image.Image:
    """Reads one image.

    Args:
        path: a file (bytes for names that are not UTF-8), or what gives its bytes.
        decoder: "torchvision" gives a uint8 tensor (3, H, W), and so does "simplejpeg", with the
            same pixels, quicker, if that package is installed; "pil" a PIL image in mode RGB.
            "cuda" gives the bytes of a plain JPEG as they are, uint8 (n,), and of anything else
            what "torchvision" gives.

    Raises:
        BrokenImageError: empty, truncated, not an image, or more than `MAX_PIXELS` pixels.
        UserError: the place where it is stored is at fault, not the image.
    """
    try:
        is_file = isinstance(path, str | bytes | os.PathLike)
        data = read_file(path) if is_file else path.read()
        if not data:
            raise ValueError("the file is empty")
        if decoder == "pil":
            return _pil_rgb(data)
        # libjpeg without Pillow is the quick road for what nearly every photo is.
        frame = _jpeg_frame(data)
        if frame is None or frame[2] not in (1, 3) or frame[0] * frame[1] > MAX_PIXELS:
            return to_tensor(_pil_rgb(data))
        if decoder == "simplejpeg" and EXIF not in data:  # without torchvision's import
            return _by_simplejpeg(data)
        if (decode := jpeg_decoder()) is not None:
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            if decoder == ON_DEVICE and _is_plain(data):
                return encoded
            return decode(encoded, apply_exif_orientation=True)
        return to_tensor(_pil_rgb(data))
    except (MemoryError, UserError):  # not the image's fault
        raise
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error
        reason = f"{error}".splitlines()[0] if f"{error}" else type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "not an image"
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        elif isinstance(error, RuntimeError):  # torchvision names its source file; keep the end
            reason = re.split(r"\.cpp:\d+, |: ", reason)[-1]
        raise BrokenImageError(printable(path), reason) from None


def _is_plain(jpeg: bytes) -> bool:
    """Returns whether every decoder makes the same picture of this JPEG.

    What may be turned, may be RGB already, or was cut short is left to libjpeg, which sees it:
    nvJPEG knows no EXIF, and promises nothing of the other two.
    """
    known = jpeg[6:11] == JFIF and ADOBE not in jpeg
    return known and EXIF not in jpeg and jpeg.endswith(END)


def _by_simplejpeg(data: bytes) -> torch.Tensor:
    import simplejpeg  # optional; `decoder_name` says so where it is missing

    pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _pil_rgb(data: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bombs are refused below; EXIF chatter helps nobody
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(
                f"{image.width}x{image.height} pixels, more than {MAX_PIXELS:,}: "
                "taken for a decompression bomb"
            )
        image.load()
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_grey_in_8_bits(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(canvas, image)
    return image.convert("RGB")


def _grey_in_8_bits(values: np.ndarray) -> np.ndarray:
    """Scales grey values of 16 or 32 bits, integers or floats, to uint8 of the same shape (H, W).

    Few files say what white is, so the largest value decides:

    - floats up to 1: 1 is white;
    - up to 255: the values are those of 8 bits already;
    - up to 65535: those of 16 bits, whose upper 8 bits stay. (Values of 10 or 12 bits in files of
      16 are taken for these, and come out as dark as they are in any viewer.)

    Raises:
        ValueError: values whose white cannot be known: negative, above 65535, not finite, or
            floats that end between 1 and 2.
    """
    remedy = "white cannot be known: save the image with 8 bits"
    lowest, highest = values.min().item(), values.max().item()
    if not (lowest >= 0 and highest <= 65535):  # so written, NaN is refused too
        raise ValueError(f"grey values from {lowest:g} to {highest:g}; {remedy}")
    if values.dtype.kind == "f":
        if 1 < highest < 2:
            raise ValueError(f"grey values up to {highest:g}, a little more than 1; {remedy}")
        values = (255 * values if highest <= 1 else values).round()
    if highest <= 255:
        return values.astype(np.uint8)
    return (values.astype(np.uint16) >> 8).astype(np.uint8)


def _jpeg_frame(data: bytes) -> tuple[int, int, int] | None:
    """Returns (width, height, components) from a JPEG's frame header; None for anything else.

    A few bytes are walked instead of asking Pillow, whose set-up costs 5-10 % of a decode.
    """
    if data[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height = int.from_bytes(data[at + 5 : at + 7], "big")
            width = int.from_bytes(data[at + 7 : at + 9], "big")
            return width, height, data[at + 9]
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers that stand alone
            at += 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None
