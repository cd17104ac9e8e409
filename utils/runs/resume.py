"""Finds the checkpoint that --resume names and the folder in which the run continues, and refuses
flags and data that may not change on the way.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from utils.config.flags import ANY_TIME, NEVER, BaseRecipe, Flag, RunSettings, flags_of
from utils.config.recipes import PAPER
from utils.runs import checkpoint
from utils.runs import folder as run_folder
from utils.runs.checkpoint import Checkpoint, SavedRun
from utils.runs.named_weights import read_weights
from utils.system import distributed
from utils.system.distributed import Context
from utils.system.errors import UserError
from utils.system.files import check_free
from utils.system.text import counted

AUTO = "auto"
OTHER_DATA = (
    "! the training images have other names or labels than those that the run began with: it goes "
    "on with what is there now"
)


@dataclass(frozen=True)
class Start:
    """Holds what a run begins with.

    Args:
        saved: the checkpoint that it goes on from, or that is evaluated; None for a new run.
        pretrained: the file of first weights, for a new run.
        folder: where to go on, None for a new folder.
        notes: lines to say before training.
        seed_flag: --seed, or None.
        at_epoch: --start-epoch, or None.
    """

    saved: Checkpoint | None = None
    pretrained: Checkpoint | None = None
    folder: Path | None = None
    notes: tuple[str, ...] = ()
    seed_flag: int | None = None
    at_epoch: int | None = None

    @property
    def run(self) -> SavedRun | None:
        """Returns the run that training continues; None for a new one."""
        return None if self.saved is None else self.saved.run

    def seed(self, context: Context) -> int:
        """Returns the seed of the run: the saved one, that of --seed, or a fresh one.

        Call it on every rank; all get rank 0's.
        """
        seed = self.seed_flag if self.run is None else self.run.seed
        if seed is None:
            seed = int.from_bytes(os.urandom(4), "big")  # saved, so that the run resumes exactly
        return int(distributed.share(seed, context))

    def refuse_changes(
        self,
        recipe: BaseRecipe,
        train_images: int,
        train_digest: str,
        device: torch.device,
        can_begin: bool = True,
    ) -> list[str]:
        """Refuses a resumption that could not be exact, or that the saved state cannot follow.

        Args:
            recipe: the saved one with this start's flags.
            train_images, train_digest: how many there are now, and the `digest` of their names and
                labels; a run of before there were digests is compared by the number alone.
            can_begin: whether the script has --start-epoch.

        Returns:
            Lines for the user: another number of threads; data that changed between two epochs.

        Raises:
            UserError: another seed, or another value of a flag that may NEVER change; inside an
                epoch, other data, or another value of a flag that may change BETWEEN_EPOCHS alone.
        """
        run, seed = self.run, self.seed_flag
        if run is None:
            return []
        if seed is not None and seed != run.seed:
            raise UserError(f"the run's seed is {run.seed}: leave --seed {seed} out")
        before, now = type(recipe).from_dict(run.recipe).as_dict(), recipe.as_dict()
        flags = {name: Flag((name,), "", "") for name in now} | flags_of(type(recipe))
        changed = {
            name: [flags[name].typed(values[name]) for values in (before, now)]
            for name in now
            if now[name] != before[name]
        }
        for name, (old, new) in changed.items():
            if flags[name].resume == NEVER:
                raise UserError(
                    f"the run trains with {old}: leave {new} out, or begin a new run at its weights"
                )
        lines = _other_threads(run, device)
        other_data = run.train_digest not in (None, train_digest)
        if not run.step or self.at_epoch is not None:
            return [OTHER_DATA, *lines] if other_data else lines
        stopped = "the run stopped inside an epoch"
        remedy = ", or begin at an epoch's start with --start-epoch" if can_begin else ""
        for name, (old, new) in changed.items():
            if flags[name].resume != ANY_TIME:
                raise UserError(
                    f"{stopped}, after {run.step} batches with {old}: leave {new} out{remedy}"
                )
        if train_images != run.train_images:
            then, today = f"{run.train_images:,} training images", f"there are {train_images:,} now"
            raise UserError(f"{stopped} over {then}, and {today}: restore the data{remedy}")
        if other_data:
            raise UserError(
                f"{stopped} over training images with other names or labels than there are now: "
                f"restore the data{remedy}"
            )
        return lines


def read(
    resume: str | None,
    pretrained: str | None,
    name: str | None,
    output: str | None,
    evaluate: bool,
    start_epoch: int | None,
    arch: str = "",
) -> tuple[Checkpoint | None, Path | None]:
    """Finds the checkpoint that a classifier's run goes on from, or that is to be evaluated.

    Args:
        resume, name, output, evaluate: as in `find`; `resume` may be None.
        pretrained: what -e takes instead, and what "auto" begins with where there is nothing yet.
        start_epoch: --start-epoch.
        arch: the network, by which `pretrained` may name published weights.

    Returns:
        It and the run folder to go on in; each may be None.

    Raises:
        UserError: nothing to evaluate, weights alone to train on from, other weights than the
            run's, an --output that is in use, or as in `find`.
    """
    if pretrained is not None and resume is not None and (evaluate or resume != AUTO):
        raise UserError(
            f"--resume {resume} has weights of its own: leave --pretrained {pretrained} out"
        )
    if evaluate and resume is None and pretrained is not None:
        check_output(output, None, evaluate, resume)
        return read_weights(pretrained, arch), None
    saved, folder = find(resume, name, output, evaluate)
    if saved is not None and not evaluate:
        if saved.run is None:
            raise UserError(
                f"{resume}: holds weights, not a run of this program; start from them with "
                f"--pretrained {resume}"
            )
        # Old files do not say.
        began_with = saved.run.pretrained if "pretrained" in saved.contents else pretrained
        if pretrained is not None and began_with != pretrained:
            raise UserError(
                f"the run in {folder} began with {began_with or 'fresh weights'}: leave "
                f"--pretrained {pretrained} out, or give another --output or --action"
            )
        folder = _folder_from(start_epoch, saved.run.epoch, folder, output)
    check_output(output, folder, evaluate, resume)
    return saved, folder


def read_detector(
    resume: str | None, name: str | None, output: str | None, evaluate: bool
) -> tuple[Checkpoint | None, Path | None]:
    """Finds a detector's checkpoint as `read` does a classifier's."""
    saved, folder = find(resume, name, output, evaluate, detector=True)
    if saved is not None and not saved.is_detector:
        raise UserError(f"{resume}: no detector's checkpoint; give one of detect_main.py")
    if saved is not None and not evaluate and saved.run is None:
        raise UserError(
            f"{resume}: holds weights, not a run; evaluate it with -e, or start from it with "
            "--detector-weights"
        )
    check_output(output, folder, evaluate, resume)
    return saved, folder


def _folder_from(
    start_epoch: int | None, epoch: int, folder: Path | None, output: str | None
) -> Path | None:
    """Returns `folder`, or None (a new one) where --start-epoch is before the saved `epoch`."""
    if start_epoch is None or start_epoch >= epoch or folder is None:
        return folder
    if output is not None and Path(output).resolve() == folder.resolve():
        raise UserError(
            f"--start-epoch {start_epoch} would go over the {epoch} epochs in {folder}: name a "
            f"checkpoint of it with --resume {folder / checkpoint.LAST}, and another --output"
        )
    _say(f"--start-epoch {start_epoch} goes back: going on in a new folder")
    return None


def _say(*lines: str) -> None:
    if distributed.is_first():
        print(*lines, sep="\n", flush=True)


def check_output(
    output: str | None, folder: Path | None, evaluate: bool, resume: str | None
) -> None:
    """Refuses --output before any work, on rank 0 alone, which is the one that writes.

    Args:
        output: the folder that --output names, or None.
        folder: that of the run which goes on, or None.
        evaluate: nothing is trained: the folder gets the figures alone.
        resume: what was resumed; with "auto" the folder is that of the run, and gets nothing.

    Raises:
        UserError: it is in use, or cannot be made.
    """
    if not distributed.is_first():
        return
    if not evaluate:
        run_folder.check_output(output, folder)
    elif resume != AUTO:  # with "auto" it is the run's own folder, and nothing is written
        check_free(output)


def find(
    resume: str | None,
    name: str | None,
    output: str | None,
    evaluate: bool = False,
    detector: bool = False,
) -> tuple[Checkpoint | None, Path | None]:
    """Reads the checkpoint that `--resume` names, and says which one that is.

    Args:
        resume: a path; or "auto": the newest good checkpoint of `output`, or else of the newest
            `runs/<name>-N`, or else, without a name, of the run that started last; or None.
        evaluate: the best checkpoint before the newest.
        detector: a run of a detector, where there is no name.

    Returns:
        It, None where "auto" finds none yet; and the run folder to go on in, None for a new one.

    Raises:
        UserError: no such file, damaged, or not a checkpoint; or nothing to evaluate.
    """
    if resume is None:
        if evaluate:
            raise UserError("-e needs weights to evaluate: add --resume CKPT")
        return None, None
    if resume != AUTO:
        return _named(Path(resume), evaluate)
    folder = Path(output) if output else run_folder.newest(name, detector)
    newest = checkpoint.CheckpointFolder(folder).newest_good(evaluate) if folder else None
    if newest is None:
        where = folder or f"{run_folder.RUNS}/{name or '*'}-*"
        if evaluate:
            raise UserError(f"no checkpoint in {where} to evaluate: name one with --resume CKPT")
        _say(f"no checkpoint in {where} yet: starting from the beginning")
        return None, folder
    saved, notes = newest
    _say(*notes, f"{'evaluating' if evaluate else 'resuming'} {saved.file}")
    return saved, folder


def _named(path: Path, evaluate: bool) -> tuple[Checkpoint, Path | None]:
    try:
        saved = Checkpoint.read(path)
    except checkpoint.CorruptCheckpointError as error:
        raise UserError(
            f"{error}; --resume {AUTO} --output {path.parent} takes the newest good one there"
        ) from None
    # From an older checkpoint the run takes another course: not over what followed the first time.
    last = path.with_name(checkpoint.LAST)
    if not evaluate and path.name != checkpoint.LAST and checkpoint.is_whole(last):
        _say(f"{path} is not its run's newest checkpoint: going on in a new folder")
        return saved, None
    return saved, path.parent


def where(saved: Checkpoint | None, flags: RunSettings, at_epoch: int | None) -> tuple[str, ...]:
    """Returns a line on where a run goes on that --resume names; "auto" has said it already."""
    if saved is None or saved.run is None or flags.evaluate or at_epoch is not None:
        return ()
    if flags.resume in (None, AUTO):
        return ()
    inside = f", after step {saved.run.step}" if saved.run.step else ""
    return (f"going on with {saved.file} in epoch {saved.run.epoch + 1}{inside}",)


def refuse_another_recipe(run: SavedRun, name: str | None) -> None:
    """Refuses another --recipe than the run's; None for none.

    Raises:
        UserError: names the run's.
    """
    own = run.flags.get("recipe") or PAPER
    if name not in (None, own):
        raise UserError(
            f"the run's recipe is {own}: leave --recipe {name} out (flags such as --epochs change "
            "single values)"
        )


def digest(*parts: bytes | np.ndarray) -> str:
    """Returns a short name for data: equal where the same names and labels have the same order."""
    code = hashlib.blake2b(digest_size=8)
    for part in parts:
        code.update(part if isinstance(part, bytes) else part.tobytes())
    return code.hexdigest()


def _other_threads(run: SavedRun, device: torch.device) -> list[str]:
    """Returns a line where a run on the CPU goes on with another number of threads.

    A sum that is shared among threads is rounded otherwise for each number of them.
    """
    before, now = run.environment.get("cpu_threads"), torch.get_num_threads()
    if device.type != "cpu" or before == now or not isinstance(before, int):
        return []
    return [
        f"! the run was computed by {counted(before, 'thread')}, and goes on with {now}: sums are "
        "rounded otherwise, so it will not end bit for bit as it would have; set "
        f"OMP_NUM_THREADS={before} for that"
    ]
