"""The data sets that `demo:NAME` stands for: each is written once as an ImageFolder tree."""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from utils.data import demo_digits, demo_photos
from utils.data.original_files import Origin
from utils.system.distributed import Context, share
from utils.system.errors import EXIT_FAILED, UserError
from utils.system.text import did_you_mean

HOME = Path(__file__).resolve().parents[2] / "demo_data"
PREFIX = "demo:"


@dataclass(frozen=True)
class DemoSet:
    """One data set.

    Args:
        write: fills an empty folder with train/ and val/; takes the folder and where the original
            files are.
        recipe: fields of a `Recipe` that its images need with a ResNet, whatever the --recipe.
        light: those that differ with MobileNetV2.
        needs_files: whether `write` reads original files.
    """

    write: Callable[[Path, Origin], None]
    recipe: Mapping[str, Any]
    light: Mapping[str, Any]
    needs_files: bool = True


DEMO_SETS: Mapping[str, DemoSet] = MappingProxyType(
    {
        "digits": DemoSet(
            lambda folder, _: demo_digits.write_digits(folder),
            demo_digits.DIGITS_RECIPE,
            # MobileNetV2 halves a map 5 times, and takes longer than a ResNet to settle.
            {"img_size": 64, "epochs": 10, "lr": 0.03},
            needs_files=False,
        ),
        "fashion": DemoSet(demo_photos.write_fashion, demo_photos.PHOTOS_RECIPE, {}),
        "cifar10": DemoSet(demo_photos.write_cifar10, demo_photos.PHOTOS_RECIPE, {}),
        "cifar100": DemoSet(demo_photos.write_cifar100, demo_photos.PHOTOS_RECIPE, {}),
    }
)


DEMOS = ", ".join(PREFIX + name for name in DEMO_SETS)  # for messages


def is_demo(data: str | None) -> bool:
    """Whether DATA names a demo rather than a folder."""
    return data is not None and data.startswith(PREFIX)


def takes_files(data: str | None) -> bool:
    """Whether DATA names a demo that is made of original files."""
    return is_demo(data) and any(
        data == PREFIX + name and demo.needs_files for name, demo in DEMO_SETS.items()
    )


def recipes(arch: str, light: bool = False) -> dict[str, dict[str, Any]]:
    """Returns what each demo needs of a script's recipe, as {"demo:NAME": {field: value}}.

    Args:
        arch: the network of the demo.
        light: whether it is a MobileNetV2.
    """
    return {
        PREFIX + name: {"arch": arch, **demo.recipe, **(demo.light if light else {})}
        for name, demo in DEMO_SETS.items()
    }


def find_root(
    data: str, context: Context, files: str | None = None, download: bool = False
) -> str | Path:
    """Returns the folder that DATA names; demo data is written by rank 0 while the others wait.

    Args:
        data: a folder, or "demo:" with a name of `DEMO_SETS`.
        files, download: see `prepare`.

    Raises:
        UserError: see `prepare`.
    """
    if not is_demo(data):
        return data
    return share(prepare(data, files, download) if context.is_main else None, context)


def prepare(data: str, files: str | None = None, download: bool = False) -> Path:
    """Returns the folder of a demo's images, written the first time.

    Args:
        data: "demo:" with a name of `DEMO_SETS`.
        files: the folder of the data set's original files; None looks where a package puts them.
        download: let torchvision fetch them.

    Raises:
        UserError: another name; the original files are missing, or are not those that were
            published.
    """
    name = data.removeprefix(PREFIX)
    if name not in DEMO_SETS:
        hint = did_you_mean(data, DEMOS.split(", ")) or f"; there is {DEMOS}"
        raise UserError(f"no demo data {data!r}{hint}")
    origin = Origin(None if files is None else Path(files), download)
    return write_once(HOME / name, lambda folder: DEMO_SETS[name].write(folder, origin))


def write_once(target: Path, write: Callable[[Path], None]) -> Path:
    """`target`, made by `write` in a folder beside it if it is not there: whole, or not at all.

    What lies below the present folder is returned, and so told, by its short name.

    Raises:
        UserError: the folder cannot be written.
    """
    staging = None
    try:
        if not target.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
            write(staging)
            os.chmod(staging, 0o755)
            os.rename(staging, target)
    except OSError as error:
        if not target.is_dir():  # else another process was first, with the same files
            why = error.strerror or error
            reason = f"cannot write there ({why}); make room, or mend its rights"
            raise UserError(f"{target}: {reason}", EXIT_FAILED) from None
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    here = Path.cwd()
    return target.relative_to(here) if target.is_relative_to(here) else target
