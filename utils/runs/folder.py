"""Makes run folders: a new one for every run, with one writer at a time."""

import contextlib
import errno
import fcntl
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from models import __version__
from models.registry import is_of_library
from utils.runs.checkpoint import describes_detector
from utils.system.distributed import Context
from utils.system.errors import EXIT_FAILED, UserError
from utils.system.files import check_writable, read_json, write_atomically

RUNS = Path("runs")
LONGEST_NAME = 240  # bytes: file systems take 255, and a number follows
LOCK = ".lock"  # locked while a run writes to the folder; it stays, as the mark of a run folder


def run_name(*parts: str | None) -> str:
    """Returns a run folder's name without its number: network, backbone and --action if given.

    Raises:
        UserError: it would be more than one folder, or is longer than a file system takes.
    """
    name = "_".join(filter(None, parts))
    if is_of_library(name):
        name = name.replace(":", "-", 1)  # which means something to shells and other systems
    if os.sep in name or "\0" in name:
        raise UserError(f"{name!r} is no folder's name: give an --action without {os.sep}")
    if (length := len(os.fsencode(name))) > LONGEST_NAME:
        raise UserError(
            f"a folder cannot be named with {length} bytes ({name[:24]}…): give an --action that "
            f"is at least {length - LONGEST_NAME} shorter"
        )
    return name


def check_output(output: str | None, resumed: Path | None = None) -> None:
    """Refuses, before any work, an --output that `open_folder` would refuse. Makes nothing.

    Raises:
        UserError: as `create`.
    """
    if _goes_on(output, resumed):
        return
    folder = RUNS if output is None else Path(output)
    if output is not None and folder.is_dir() and any(folder.iterdir()):
        raise UserError(
            f"{folder}: is in use; choose a new --output, or continue the run in it with "
            f"--resume auto --output {folder}"
        )
    check_writable(folder)


def create(name: str, output: str | None = None) -> Path:
    """Makes the folder of a new run, or of a tool: `output`, or the first free `runs/<name>-N`.

    Raises:
        UserError: `output` holds files already, or the folder cannot be made.
    """
    check_output(output)
    try:
        if output is not None:
            folder = Path(output)
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        RUNS.mkdir(parents=True, exist_ok=True)
        number = 1 + max((n for n, _ in _numbered(name)), default=0)
        while True:
            try:
                folder = RUNS / f"{name}-{number}"
                folder.mkdir()  # fails when another run took the number first
                return folder
            except FileExistsError:
                number += 1
    except OSError as error:
        target = output or RUNS
        raise UserError(
            f"{target}: cannot write there ({error.strerror}); choose another --output", EXIT_FAILED
        ) from None


def open_folder(name: str, output: str | None, resumed: Path | None) -> Path:
    """Opens the folder that a run writes to: a resumed run's own, else a new one.

    Args:
        output: --output.
        resumed: the folder in which --resume looked. Without a checkpoint in it, that run was
            killed before its first one, and is begun again there; but a folder that no run has
            locked is somebody else's, and never written to.

    Raises:
        UserError: see `create`; or a resumed run is sent to another folder that is in use.
    """
    if resumed is not None and _goes_on(output, resumed):
        return resumed
    return create(name, output)


def newest(name: str | None, detector: bool = False) -> Path | None:
    """Returns the `runs/<name>-N` with the highest number, or None.

    Without a name, the folder with a checkpoint below runs/ that was started or resumed last, of
    the runs of detectors or of those of classifiers. Each start has a number in args.json, so a
    clock that was set back changes nothing; runs from before there were numbers come first, by
    the time of their files.
    """
    if name is not None:
        return max(_numbered(name), default=(0, None))[1]
    order = _by_start()
    return next((folder for folder in order if _trains_detector(folder) == detector), None)


class FolderLock:
    """Makes this process the only writer of a run's folder, until it ends, however it ends.

    Raises:
        UserError: another process has the lock, or no lock can be made there.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / LOCK
        try:
            # Never truncated, and no link followed: the folder may be one that a stranger packed.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            self.handle = os.fdopen(os.open(self.path, flags, 0o666), "rb", buffering=0)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise UserError(
                    f"{self.path}: is a link, which a run never makes; remove it", EXIT_FAILED
                ) from None
            raise UserError(
                f"{folder}: cannot write there ({error.strerror}); mend its rights, or start a new "
                "run",
                EXIT_FAILED,
            ) from None
        self.file = os.fstat(self.handle.fileno())
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise UserError(
                f"{folder}: another process is training in this folder; wait for it to end, or "
                "start a run of its own without --resume",
                EXIT_FAILED,
            ) from None
        except OSError:
            pass  # a file system without locks: better unguarded than not at all

    def check(self) -> None:
        """Refuses to write where the folder's name now leads to another folder. Call it before
        each file: renamed while a run writes, the folder may have made room for another run's.

        Raises:
            UserError: the lock that lies under the folder's name is not this process's.
        """
        try:
            same = os.path.samestat(os.lstat(self.path), self.file)
        except OSError:  # no folder of this name, or no lock in it
            same = False
        if not same:
            raise UserError(
                f"{self.folder}: is no longer the folder in which this run began (it was renamed, "
                "replaced, or its .lock removed); nothing more is written. Go on with --resume "
                "auto --output and the folder's new name",
                EXIT_FAILED,
            )

    def close(self) -> None:
        """Lets another process write to the folder."""
        self.handle.close()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes `content` as readable JSON, atomically; numbers that are not finite are null."""
    text = json.dumps(_finite(content), indent=2, default=str, allow_nan=False)
    write_atomically(path, (text + "\n").encode())


def _finite(value: Any) -> Any:
    """Returns plain values with None for each number that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_evaluation(output: str, result: dict, context: Context) -> Path:
    """Writes `result` with the environment to a new folder, and returns the file's path."""
    target = create("", output) / "evaluation.json"
    write_json(target, {**result, **environment(context)})
    return target


def environment(context: Context) -> dict[str, str | int | list[int]]:
    """Returns what a result depends on besides the arguments: versions, commit, devices."""
    device = str(context.device)
    if context.device.type == "cuda":
        device = torch.cuda.get_device_name(context.device)
    elif context.device.type == "cpu":
        device = platform.processor() or "cpu"
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "eca_net": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a TorchVersion would not load with weights_only
        "torchvision": version("torchvision"),
        "platform": platform.platform(),
        "device": device,
        "world_size": context.world_size,
        "data_parallel": list(context.data_parallel),
        "cpu_threads": torch.get_num_threads(),
        "commit": _commit(),
        "start_number": 1 + max((_start_number(f) for f in _folders()), default=0),
    }


def _commit() -> str:
    here = Path(__file__).resolve().parents[2]
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _folders() -> list[Path]:
    """Returns the folders below runs/; empty where there is no such folder."""
    try:
        return list(RUNS.iterdir())
    except OSError:
        return []


def _numbered(name: str) -> list[tuple[int, Path]]:
    """Returns the folders `runs/<name>-N` with their N. The name is never taken as a pattern."""
    ends = [(path.name.rpartition("-"), path) for path in _folders()]
    return [(int(n), path) for (start, _, n), path in ends if start == name and n.isdecimal()]


def _by_start() -> list[Path]:
    """Returns the run folders that hold a checkpoint, the one that was started last first."""
    saved = [(_last_saved(f), f) for f in _folders() if "-" in f.name]
    return [f for *_, f in sorted(((_start_number(f), t, f) for t, f in saved if t), reverse=True)]


def _last_saved(folder: Path) -> float | None:
    """Returns when the newest checkpoint in `folder` was written; None where none can be read."""
    times = []
    for path in folder.glob("*.pth"):
        with contextlib.suppress(OSError):  # a link to nowhere, or just deleted
            times.append(path.stat().st_mtime)
    return max(times, default=None)


def _goes_on(output: str | None, resumed: Path | None) -> bool:
    """Returns whether the run writes to `resumed`, the folder of an earlier run."""
    if resumed is None or not (output is None or Path(output).resolve() == resumed.resolve()):
        return False
    return (resumed / LOCK).exists()


def _trains_detector(folder: Path) -> bool | None:
    """Returns whether a run folder is a detector's; None where its args.json does not say."""
    record = _record(folder)
    return None if record is None else describes_detector(record)


def _start_number(folder: Path) -> int:
    """Returns the number of the start that wrote args.json, counted over all runs; 0 if none."""
    environment = (_record(folder) or {}).get("environment")
    number = environment.get("start_number") if isinstance(environment, dict) else None
    return number if isinstance(number, int) and 0 < number < 2**53 else 0


def _record(folder: Path) -> dict | None:
    """Returns the contents of args.json, or None where it cannot be read."""
    try:
        record = read_json(folder / "args.json", "")
    except UserError:
        return None
    return record if isinstance(record, dict) else None
