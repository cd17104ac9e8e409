"""Opens the run folder of either training script, with its first checkpoint."""

from collections.abc import Mapping
from typing import Any

from utils.options.settings import Settings
from utils.runs import folder as runs
from utils.runs.resume import Start
from utils.runs.writer import RunFiles, Saving
from utils.system.distributed import Context
from utils.training.outcome import Outcome
from utils.training.state import RunState


def open_files(
    settings: Settings,
    start: Start,
    name: str,
    record: Mapping[str, Any],
    outcome: Outcome,
    state: RunState,
    context: Context,
) -> RunFiles:
    """Opens the run folder, which rank 0 alone writes. Call it on every rank.

    Args:
        name: of the run, and of its folder without the number.
        record: what every checkpoint holds besides the state.
        outcome: what is recorded of an epoch.
        state: as training begins; without a best epoch from here on where the folder has none.
    """
    folder = None
    if context.is_main:
        folder = runs.open_folder(name, settings.output, start.folder)
        context.say(f"run folder: {folder}")
    files = RunFiles(
        folder,
        {**record, "environment": runs.environment(context)},
        outcome,
        title=name,
        first_epoch=state.epoch,
        saving=Saving(settings.save_every, settings.save_minutes),
        saved=start.run,
    )
    if files.lacks_best():
        state.best = {}
    files.begin(state.snapshot())
    return files
