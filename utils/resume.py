"""What --resume names, and which flags may not change on the way."""

from pathlib import Path

from utils import checkpoint, run_folder
from utils.errors import UserError


def find(
    resume: str, name: str | None, output: str | None, evaluate: bool = False
) -> tuple[dict | None, Path | None, list[str]]:
    """Reads the checkpoint that `--resume` names.

    Args:
        resume: a path, or "auto": the newest good checkpoint of `output`, or else of the newest
            `runs/<name>-N`, or else, without a name, of the run that saved last.
        evaluate: the best checkpoint before the newest.

    Returns:
        Its contents (None where "auto" finds no checkpoint yet), the run folder to go on in (None
        for a new one), and lines to print.

    Raises:
        UserError: no such file, damaged, or not a checkpoint.
    """
    if resume != "auto":
        return _named(Path(resume), evaluate)
    folder = Path(output) if output else run_folder.newest(name)
    found = checkpoint.CheckpointFolder(folder).newest_good(evaluate) if folder else None
    if found is None:
        place = folder or f"{run_folder.RUNS}/{name or '*'}-*"
        return None, folder, [f"no checkpoint in {place} yet: starting from the beginning"]
    path, saved, notes = found
    return saved, folder, [*notes, f"{'evaluating' if evaluate else 'resuming'} {path}"]


def refuse_changes(
    saved: dict, seed: int | None, batch_size: int | None, train_images: int, at_epoch: int | None
) -> None:
    """Stops a resumption that could not be exact.

    Args:
        saved: the checkpoint.
        seed, batch_size: as given on the command line, or None.
        train_images: how many there are now.
        at_epoch: --start-epoch, which gives up the place inside an epoch.

    Raises:
        UserError: another seed; another batch size or data set inside an epoch.
    """
    if seed is not None and seed != saved["seed"]:
        raise UserError(f"the run's seed is {saved['seed']}: leave --seed {seed} out")
    step = saved["progress"]["step"]
    if not step or at_epoch is not None:
        return
    remedy = "or begin at an epoch's start with --start-epoch"
    held = saved["recipe"]["batch_size"]
    if batch_size not in (None, held):
        raise UserError(
            f"the run stopped inside an epoch, after {step} batches of {held}: leave "
            f"-b {batch_size} out, {remedy}"
        )
    if train_images != saved["train_images"]:
        raise UserError(
            f"the run stopped inside an epoch over {saved['train_images']:,} training images, and "
            f"there are {train_images:,} now: restore the data, {remedy}"
        )


def _named(path: Path, evaluate: bool) -> tuple[dict, Path | None, list[str]]:
    folder = checkpoint.CheckpointFolder(path.parent)
    try:
        saved = checkpoint.load(path)
    except checkpoint.CorruptCheckpointError as error:
        raise UserError(
            f"{error}; --resume auto --output {path.parent} takes the newest good one there"
        ) from None
    # From an older checkpoint the run takes another course: not over what followed the first time.
    if not evaluate and path.name != checkpoint.LAST and checkpoint.is_whole(folder.last):
        return saved, None, [f"{path} is not its run's newest checkpoint: going on in a new folder"]
    return saved, path.parent, []
