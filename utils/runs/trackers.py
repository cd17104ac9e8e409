"""Sends a run's figures to Weights & Biases or MLflow, where --log asks for it."""

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from utils.system.errors import UserError

PROJECT = "eca-net"
Send = Callable[[int, Mapping[str, float]], None]  # the step, and its values by tag


class Tracker:
    """Sends what a run logs; one that goes on with the same folder has the same id.

    Args:
        library: "wandb" or "mlflow".
        folder: of the run; without WANDB_MODE or MLFLOW_TRACKING_URI, all is written there.
        settings: of the run: plain values by name.

    Raises:
        UserError: the library does not begin.
    """

    def __init__(self, library: str, folder: Path, settings: Mapping[str, Any]):
        self.library = library
        begin = {"wandb": _wandb, "mlflow": _mlflow}[library]
        key = hashlib.blake2b(os.fsencode(folder.resolve()), digest_size=8).hexdigest()
        self._send, self.close = self._said(begin, folder, key, settings)

    def send(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the values of an epoch.

        Raises:
            UserError: the library fails.
        """
        self._said(self._send, step, values)

    def _said(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except Exception as error:  # what a library raises is open-ended
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"--log {self.library}: {reason}") from None


def _wandb(folder: Path, key: str, settings: Mapping[str, Any]) -> tuple[Send, Callable[[], None]]:
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        mode=os.environ.get("WANDB_MODE", "offline"),
        dir=folder,
        name=folder.name,
        id=key,
        resume="allow",
        config=dict(settings),
        settings=wandb.Settings(silent=True, console="off"),
    )
    return lambda step, values: run.log(dict(values), step=step), run.finish


def _mlflow(folder: Path, key: str, settings: Mapping[str, Any]) -> tuple[Send, Callable[[], None]]:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    own = f"sqlite:///{folder.resolve() / 'mlflow.db'}"
    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", own))
    project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    known = client.get_experiment_by_name(project)
    experiment = known.experiment_id if known else client.create_experiment(project)
    before = client.search_runs([experiment], f"tags.eca_net_run = '{key}'")
    tags = {"eca_net_run": key}
    started = before[0] if before else client.create_run(experiment, None, tags, folder.name)
    run = started.info.run_id
    if not before:
        client.log_batch(run, params=[Param(k, str(v)[:500]) for k, v in settings.items()])

    def send(step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        client.log_batch(run, [Metric(tag, value, now, step) for tag, value in values.items()])

    return send, partial(client.set_terminated, run)
