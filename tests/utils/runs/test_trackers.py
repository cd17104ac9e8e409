"""--log: the values of TensorBoard go to the library as well, and a fault of it ends no run."""

import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.runs.writer import RunLogger, Tracker
from utils.system.errors import UserError
from utils.training import classification


class Library:
    """Stands for wandb and for mlflow's client: notes what they are called with."""

    def __init__(self):
        self.begun, self.sent, self.params, self.runs, self.ended = [], {}, {}, [], 0
        self.fails = False

    def note(self, step, values):
        if self.fails:
            raise ConnectionError("no server\nmore")
        for tag, value in values.items():
            self.sent.setdefault(tag, {})[step] = value

    def end(self, *_):
        self.ended += 1

    # wandb
    def init(self, **words):
        self.begun.append(words)
        self.params = words["config"]
        return SimpleNamespace(log=lambda values, step: self.note(step, values), finish=self.end)

    Settings = SimpleNamespace

    # mlflow
    def client(self, uri):
        self.begun.append({"uri": uri})
        return SimpleNamespace(
            get_experiment_by_name=lambda name: None,
            create_experiment=lambda name: name,
            search_runs=lambda experiments, text: [r for r in self.runs if r.key in text],
            create_run=self.create_run,
            log_batch=self.log_batch,
            set_terminated=self.end,
        )

    def create_run(self, experiment, start, tags, name):
        run = SimpleNamespace(key=tags["eca_net_run"], info=SimpleNamespace(run_id=name))
        self.runs.append(run)
        return run

    def log_batch(self, run, metrics=(), params=()):
        for tag, value, _, step in metrics:
            self.note(step, {tag: value})
        self.params |= dict(params)


@pytest.fixture
def library(monkeypatch):
    fake = Library()
    entities = SimpleNamespace(Metric=lambda *parts: parts, Param=lambda *parts: parts)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=fake.client))
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    for name in ("WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return fake


COLUMNS = ("lr", "train_loss", "train_top1", "train_top5", "val_loss", "val_top1", "val_top5")
ROWS = [{"epoch": e, **dict.fromkeys(COLUMNS, e + 0.5)} for e in range(3)]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_the_values_are_those_of_tensorboard_also_of_a_run_that_goes_on(name, library, tmp_path):
    for first, last in ((0, 2), (2, 3)):
        tracker = Tracker(name, tmp_path, {"lr": 0.1})
        log = RunLogger(tmp_path, "title", first, tracker=tracker)
        for done in range(first, last):
            log.log(ROWS[: done + 1], classification.panels(), 7.0)
        tracker.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in library.sent} == (
        library.sent
    )
    assert library.sent.keys() == set(events.Tags()["scalars"])
    assert (library.sent["val/top1"], library.ended) == ({1: 0.5, 2: 1.5, 3: 2.5}, 2)
    if name == "wandb":  # one id, offline
        assert len({(w["id"], w["mode"], w["dir"]) for w in library.begun}) == 1
        assert library.begun[0]["mode"] == "offline"
        assert library.params == {"lr": 0.1}
    else:
        assert library.begun[1]["uri"] == f"sqlite:///{tmp_path}/mlflow.db"
        assert (len(library.runs), library.params) == (1, {"lr": "0.1"})


def test_a_library_that_fails_is_told_of_once_and_gets_all_rows_later(library, tmp_path, capsys):
    log = RunLogger(tmp_path, "title", tracker=Tracker("wandb", tmp_path, {}))
    library.fails = True
    for done in (1, 2):
        log.log(ROWS[:done], classification.panels(), 7.0)
    said = capsys.readouterr().err
    assert said.count("the log for wandb could not be written (--log wandb: no server)") == 1
    library.fails = False
    log.log(ROWS, classification.panels(), 7.0)
    assert library.sent["train/loss"] == {1: 0.5, 2: 1.5, 3: 2.5}


def test_one_that_does_not_begin_is_one_line(library, tmp_path, monkeypatch):
    def init(**_):
        raise ValueError("no key\nmore")

    monkeypatch.setattr(library, "init", init)
    with pytest.raises(UserError, match=r"^--log wandb: no key$"):
        Tracker("wandb", tmp_path, {})
