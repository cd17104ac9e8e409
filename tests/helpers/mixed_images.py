"""Images of many kinds, JPEGs and others, in one folder."""

from pathlib import Path

import numpy as np
from PIL import Image

CHANCE = np.random.default_rng(0)
PLAIN = ("plain", "grey", "progressive", "fine")  # names that the device decodes


def photo(width: int = 80, height: int = 60, chance: np.random.Generator = CHANCE) -> Image.Image:
    """Smooth, as photographs are: decoders differ most at edges."""
    return Image.fromarray(chance.integers(0, 255, (6, 8, 3), np.uint8)).resize((width, height))


SMOOTH = photo(chance=np.random.default_rng(0))  # the same in every test


def write_mixed(folder: Path) -> None:
    """Images of many kinds, all of which can be read."""
    folder.mkdir(parents=True)
    for i in range(3):
        photo(70 + 9 * i, 90 - 9 * i).save(folder / f"plain-{i}.jpg", quality=90)
    photo().convert("L").save(folder / "grey.jpg")
    photo(64, 64).save(folder / "progressive.jpg", progressive=True)
    photo(33, 47).save(folder / "fine.jpg", subsampling=0, quality=100)
    exif = Image.Exif()
    exif[0x0112] = 6
    photo().save(folder / "turned.jpg", exif=exif)
    photo().convert("CMYK").save(folder / "cmyk.jpg")
    photo().save(folder / "rgb.jpg", keep_rgb=True)  # Adobe's marker says so
    jpeg = (folder / "rgb.jpg").read_bytes()
    assert jpeg[2:4] == b"\xff\xee"  # that marker; without it the components' names do
    (folder / "named.jpg").write_bytes(jpeg[:2] + jpeg[4 + int.from_bytes(jpeg[4:6], "big") :])
    photo().save(folder / "png.png")
    deep = np.linspace(0, 65535, 60 * 80).reshape(60, 80).astype(np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    photo().save(folder / "gif.gif", save_all=True, append_images=[photo()])
    photo().save(folder / "trailed.jpg")
    with open(folder / "trailed.jpg", "ab") as file:
        file.write(b"trailer")
