"""Run folders: a new one for every run, one writer each."""

import errno
import fcntl
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch
import torchvision

from utils.system.distributed import Context
from utils.system.errors import EXIT_FAILED, UserError
from utils.system.files import write_atomically

RUNS = Path("runs")
LOCK = ".lock"  # locked while a run writes to the folder; it stays, as the mark of a run folder


def run_name(*parts: str | None) -> str:
    """A run folder's name without its number, of network, backbone and --action if given.

    Raises:
        UserError: it would be more than one folder.
    """
    name = "_".join(filter(None, parts))
    if os.sep in name or "\0" in name:
        raise UserError(f"{name!r} is no folder's name: give an --action without {os.sep}")
    return name


def check_output(output: str | None, found: Path | None = None) -> None:
    """Ends a run before its work where `open_folder` would refuse --output. Makes nothing.

    Raises:
        UserError: as `create`.
    """
    if _goes_on(output, found):
        return
    folder = RUNS if output is None else Path(output)
    if output is not None and folder.is_dir() and any(folder.iterdir()):
        raise UserError(
            f"{folder}: is in use; choose a new --output, or continue the run in it with "
            f"--resume auto --output {folder}"
        )
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    reason = "no permission" if there.is_dir() else f"{there} is a file"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(
            f"{folder}: cannot write there ({reason}); choose another --output", EXIT_FAILED
        )


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
        place = output or RUNS
        raise UserError(
            f"{place}: cannot write there ({error.strerror}); choose another --output", EXIT_FAILED
        ) from None


def open_folder(name: str, output: str | None, found: Path | None) -> Path:
    """The folder that a run writes to: a resumed one's own, else a new one.

    Args:
        output: --output.
        found: where --resume looked. Without a checkpoint in it, that run was killed before its
            first one, and is begun again in its place; but a folder that no run has locked is
            somebody else's, and never written to.

    Raises:
        UserError: see `create`; or a resumed run is sent to another folder that is in use.
    """
    return found if _goes_on(output, found) else create(name, output)


def newest(name: str | None, detector: bool = False) -> Path | None:
    """The `runs/<name>-N` with the highest number, if there is one.

    Without a name, the folder below runs/ whose checkpoints changed last, of the runs of detectors
    or of those of classifiers.
    """
    if name is not None:
        return max(_numbered(name), default=(0, None))[1]
    saved = sorted(((p.stat().st_mtime, p.parent) for p in RUNS.glob("*-*/*.pth")), reverse=True)
    folders = dict.fromkeys(folder for _, folder in saved)
    return next((folder for folder in folders if _trains_detector(folder) == detector), None)


def lock(folder: Path):
    """Makes this process the folder's only writer until it ends, however it ends.

    Returns:
        An object to keep: the lock lives as long as it does.

    Raises:
        UserError: another process holds the lock.
    """
    try:
        # Never truncated, and no link followed: the folder may be one that a stranger packed.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        handle = os.fdopen(os.open(folder / LOCK, flags, 0o666), "rb", buffering=0)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(
                f"{folder / LOCK}: is a link, which a run never makes; remove it", EXIT_FAILED
            ) from None
        raise UserError(
            f"{folder}: cannot write there ({error.strerror}); mend its rights, or start a new run",
            EXIT_FAILED,
        ) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        raise UserError(
            f"{folder}: another process is training in this folder; wait for it to end, or start "
            "a run of its own without --resume",
            EXIT_FAILED,
        ) from None
    except OSError:
        pass  # a file system without locks: better unguarded than not at all
    return handle


def write_json(path: Path, content: dict) -> None:
    """Writes `content` as readable JSON, atomically."""
    write_atomically(path, (json.dumps(content, indent=2, default=str) + "\n").encode())


def write_evaluation(output: str, result: dict, context: Context) -> Path:
    """Writes `result` with the environment to a new folder, and returns the file's path."""
    target = create("", output) / "evaluation.json"
    write_json(target, {**result, **environment(context)})
    return target


def environment(context: Context) -> dict[str, str | int | list[int]]:
    """What a result depends on besides the arguments: versions, commit, devices."""
    device = str(context.device)
    if context.device.type == "cuda":
        device = torch.cuda.get_device_name(context.device)
    elif context.device.type == "cpu":
        device = platform.processor() or "cpu"
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a TorchVersion would not load with weights_only
        "torchvision": str(torchvision.__version__),
        "platform": platform.platform(),
        "device": device,
        "world_size": context.world_size,
        "data_parallel": list(context.data_parallel),
        "cpu_threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def fresh_seed() -> int:
    """A seed for a run that was given none; it is saved, so that the run resumes exactly."""
    return int.from_bytes(os.urandom(4), "big")


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


def _numbered(name: str) -> list[tuple[int, Path]]:
    found = []
    for path in RUNS.glob(f"{name}-*") if RUNS.is_dir() else ():
        number = path.name.removeprefix(f"{name}-")
        if number.isdigit():
            found.append((int(number), path))
    return found


def _goes_on(output: str | None, found: Path | None) -> bool:
    """Whether a run writes to `found`, a folder of a run before."""
    same = found is not None and (output is None or Path(output).resolve() == found.resolve())
    return same and (found / LOCK).exists()


def _trains_detector(folder: Path) -> bool | None:
    """Whether a run folder is a detector's; None where its args.json does not say."""
    try:
        return "backbone" in json.loads((folder / "args.json").read_text())
    except (OSError, ValueError):
        return None
