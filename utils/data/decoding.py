"""Reads one image file as an upright 8-bit RGB picture, or says in an error what is wrong with it.

Every reader of user images (training, evaluation, prediction, the data check) goes through
`read_image`, so that odd files look the same to all of them:

- grey of more than 8 bits, and of floats, is scaled to 8 bits by its values, see `_grey_in_8_bits`
  (Pillow's own conversion would saturate it);
- CMYK, grey, palette and alpha become RGB, transparent parts on white;
- of an animation the first frame counts;
- the orientation that EXIF or XMP notes is applied, see `orientation`.
"""

import argparse
import errno
import io
import os
import stat
import warnings
from typing import Protocol

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from utils.system.errors import EXIT_FAILED, FEWER_FILES, TOO_MANY_FILES, UserError
from utils.system.text import printable

JPEGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi")
EXTENSIONS = (*JPEGS, ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
DECODERS = ("simplejpeg", "pil")  # the default first
GONE_DECODERS = {  # how the default's pixels differ from theirs
    "torchvision": "which reads the same pixels",
    "cuda": "which reads slightly other pixels, on the CPU",
}
ORIENTATION = ExifTags.Base.Orientation  # the field's number in EXIF
TURNS = {  # its value -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Of an image's file these tell what is wrong with it; any other OSError tells of the machine.
OF_THE_FILE = {
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.ENODEV),
}
MAX_RATIO = 100  # of the sides: resized, a longer picture would take gigabytes
MAX_PIXELS = 2 * 89_478_485  # where Pillow itself turns from warning to refusing


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


def decoder_name(text: str) -> str:
    """Checks, as an argparse type, that a decoder is known."""
    if text in GONE_DECODERS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is gone: leave --decoder out, for {DECODERS[0]}, {GONE_DECODERS[text]}"
        )
    if text not in DECODERS:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(DECODERS)}")
    return text


def read_file(path: str | bytes | os.PathLike[str]) -> bytes:
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


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Returns an RGB image as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_image(
    path: str | bytes | os.PathLike[str] | Stored, decoder: str = DECODERS[0]
) -> torch.Tensor | Image.Image:
    """Reads one image.

    Args:
        path: a file (bytes for names that are not UTF-8), or what gives its bytes.
        decoder: "simplejpeg" gives a uint8 tensor (3, H, W), decoded by that package where it can,
            otherwise by Pillow; "pil" a PIL image in mode RGB.

    Raises:
        BrokenImageError: empty, truncated, not an image, more than `MAX_PIXELS` pixels, or sides
            of more than `MAX_RATIO` to one.
        UserError: where it is stored is at fault, not the image.
    """
    try:
        data = read_file(path) if isinstance(path, str | bytes | os.PathLike) else path.read()
        if not data:
            raise ValueError("the file is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bombs are refused below; EXIF chatter helps nobody
            image = Image.open(io.BytesIO(data))
            size = f"{image.width}x{image.height} pixels"
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{size}, more than {MAX_PIXELS:,}: a decompression bomb?")
            if max(image.size) > MAX_RATIO * min(image.size):
                raise ValueError(f"{size}: one side is more than {MAX_RATIO} times the other")
            if decoder == "pil":
                return _pil_rgb(image)
            # libjpeg without Pillow is the quick road for what nearly every photo is.
            if image.format not in ("JPEG", "MPO") or image.mode not in ("L", "RGB"):
                return to_tensor(_pil_rgb(image))
            return _quick_rgb(data, image)
    except (MemoryError, UserError):  # not the image's fault
        raise
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error
        reason = f"{error}".splitlines()[0] if f"{error}" else type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image"
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        raise BrokenImageError(printable(path), reason) from None


def orientation(image: Image.Image) -> int:
    """Returns how a picture is to be turned, 1 to 8 as EXIF counts; 1 is as it is.

    It is what Pillow's `exif_transpose` goes by: EXIF's, wherever in the file, else XMP's. What
    neither says readably is 1: of a picture that can be read a damaged note takes nothing.
    """
    try:
        value = image.getexif().get(ORIENTATION, 1)
        return int(value) if value in TURNS else 1
    except Exception:  # Pillow raises anything from SyntaxError to struct.error
        return 1


def _quick_rgb(data: bytes, image: Image.Image) -> torch.Tensor:
    """Decodes a grey or RGB JPEG, which Pillow has opened, by libjpeg alone where it can."""
    try:
        from simplejpeg import decode_jpeg  # where it is missing, Pillow gives the same pixels

        pixels = decode_jpeg(data, colorspace="RGB", strict=True)
    except (ImportError, ValueError):  # strict refuses what a mere warning is about, too
        return to_tensor(_pil_rgb(image))
    if (turn := TURNS.get(orientation(image))) is not None:
        return to_tensor(Image.fromarray(pixels).transpose(turn))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _pil_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if (turn := TURNS.get(orientation(image))) is not None:
        image = image.transpose(turn)
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
