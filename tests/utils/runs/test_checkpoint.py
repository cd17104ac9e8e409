"""Checkpoints: whole or refused, never fewer than two, and never code."""

import io
import os
import pickle
import random
import zipfile

import pytest
import torch

from utils.runs import checkpoint
from utils.runs.checkpoint import CheckpointFolder, CorruptCheckpointError
from utils.system.errors import UserError


def state(step=0):
    return {
        "state_dict": {"weight": torch.arange(30.0) + step},
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": []},
        "classes": ["a", "ä", "b\udcff"],  # the last: a folder name that is not UTF-8
        "progress": {"step": step},
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.fixture
def path(tmp_path):
    checkpoint.save(tmp_path / "last.pth", state())
    return tmp_path / "last.pth"


def test_what_is_saved_comes_back(path):
    saved = checkpoint.load(path)
    assert saved.pop("format") == checkpoint.FORMAT
    assert same(saved, state())


def test_the_size_is_returned(tmp_path):
    assert checkpoint.save(tmp_path / "a", state()) == (tmp_path / "a").stat().st_size


def test_any_flipped_bit_is_found_or_harmless(path):
    """One seeded bit of every byte, and each byte's 0x10, which marks a zip's part as a folder."""
    whole = path.read_bytes()
    expected = checkpoint.load(path)
    chance = random.Random(0)
    found = 0
    for at in range(len(whole)):
        for bit in {4, chance.randrange(8)}:
            damaged = bytearray(whole)
            damaged[at] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                assert same(checkpoint.load(path), expected), f"bit {bit} of byte {at}"
            except CorruptCheckpointError:
                found += 1
    assert found > len(whole)  # the rest are time stamps and padding


def test_any_truncation_is_found(path):
    whole = path.read_bytes()
    for length in [0, 1, 2, 4, *range(10, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptCheckpointError) as caught:
            checkpoint.load(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("zip_format", [True, False])
def test_bare_weights_and_both_file_formats(tmp_path, zip_format):
    path = tmp_path / "weights.pth.tar"
    torch.save(state()["state_dict"], path, _use_new_zipfile_serialization=zip_format)
    loaded = checkpoint.load(path)
    assert same(loaded, state()["state_dict"])
    assert not checkpoint.is_ours(loaded)
    assert checkpoint.is_ours({"format": 1, "state_dict": {}})


class Evil:
    def __reduce__(self):
        return os.system, ("echo run > evil-was-here",)


@pytest.mark.parametrize("zip_format", [True, False])
def test_code_is_refused_without_the_advice_to_allow_it(tmp_path, monkeypatch, zip_format):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Evil()}, "evil.pth", _use_new_zipfile_serialization=zip_format)
    with pytest.raises(UserError) as caught:
        checkpoint.load("evil.pth")
    assert not isinstance(caught.value, CorruptCheckpointError)  # nothing for `auto` to step over
    assert "refused" in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not os.path.exists("evil-was-here")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no such file"),
        (lambda p: p.mkdir(), "is a folder"),
        (lambda p: p.write_bytes(b""), "the file is empty"),
        (lambda p: p.write_text("not a checkpoint"), "damaged, or not a checkpoint"),
        (lambda p: torch.save([1, 2], p), "holds a list"),
        (lambda p: p.write_bytes(pickle.dumps("text", protocol=2)), "damaged, or not a checkpoint"),
        (lambda p: zipfile.ZipFile(p, "w").close(), "damaged, or not a checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path, make, message):
    path = tmp_path / "x.pth"
    make(path)
    with pytest.raises(UserError, match=message) as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value)


def test_running_out_of_memory_is_not_taken_for_damage(path, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(MemoryError):
        checkpoint.load(path)


def test_two_are_kept_and_best_stays(tmp_path):
    folder = CheckpointFolder(tmp_path)
    assert folder.newest_good() is None
    folder.save_best(state(0))
    for step in (1, 2, 3):
        folder.save_last(state(step))
    steps = {p.name: checkpoint.load(p)["progress"]["step"] for p in tmp_path.glob("*.pth")}
    assert steps == {"last.pth": 3, "previous.pth": 2, "best.pth": 0}
    path, saved, notes = folder.newest_good()
    assert (path.name, saved["progress"]["step"], notes) == ("last.pth", 3, [])
    assert folder.newest_good(best_first=True)[0].name == "best.pth"


def damage(path):
    data = bytearray(path.read_bytes())
    data[data.index(b"state_dict")] ^= 0x01
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpointError):
        checkpoint.load(path)


def test_a_damaged_one_is_stepped_over_with_a_line(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save_best(state(0))
    folder.save_last(state(1))
    folder.save_last(state(2))
    damage(folder.last)
    path, saved, notes = folder.newest_good()
    assert (path.name, saved["progress"]["step"]) == ("previous.pth", 1)
    assert len(notes) == 1
    assert "last.pth: damaged" in notes[0]
    damage(folder.previous)
    assert folder.newest_good()[0].name == "best.pth"
    damage(folder.best)
    with pytest.raises(UserError, match="only damaged checkpoints"):
        folder.newest_good()


def test_a_damaged_last_never_pushes_out_the_good_previous(tmp_path):
    before = CheckpointFolder(tmp_path)
    before.save_last(state(1))
    before.save_last(state(2))
    damage(before.last)
    after = CheckpointFolder(tmp_path)  # the resumed process
    after.save_last(state(3))
    assert checkpoint.load(after.last)["progress"]["step"] == 3
    assert checkpoint.load(after.previous)["progress"]["step"] == 1
    after.save_last(state(4))
    assert checkpoint.load(after.previous)["progress"]["step"] == 3


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_two_whole_ones_exist_at_any_time(tmp_path, monkeypatch, links):
    """At each operation of a save, before and after; without hard links one, for a moment."""
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2):
        folder.save_last(state(step))
    seen = []

    def look():
        whole = filter(checkpoint.is_whole, (folder.last, folder.previous))
        seen.append([checkpoint.load(path)["progress"]["step"] for path in whole])

    def around(name):
        real = getattr(os, name)

        def looked(*arguments):
            look()
            if name == "link" and not links:
                raise PermissionError
            result = real(*arguments)
            look()
            return result

        monkeypatch.setattr(os, name, looked)

    for name in ("fsync", "replace", "link"):
        around(name)
    folder.save_last(state(3))
    assert (seen[0], seen[-1]) == ([2, 1], [3, 2])
    assert len(seen) > 8
    assert ([2] in seen) is not links
    assert all(len(set(steps)) == 2 for steps in seen if steps != [2])


def test_a_crash_between_the_two_renames_leaves_the_previous(tmp_path):
    """Where there are no hard links."""
    folder = CheckpointFolder(tmp_path)
    folder.save_last(state(1))
    folder.last.rename(folder.previous)
    (tmp_path / ".last.pth.tmp-1").write_bytes(b"half")
    assert folder.newest_good()[1]["progress"]["step"] == 1
    folder.save_last(state(2))
    assert {p.name for p in tmp_path.iterdir()} == {"last.pth", "previous.pth"}


def test_only_plain_types_are_in_the_file(path):
    """What weights_only lets through is more than plain: look at the pickle itself."""
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        wanted = pickle_globals(archive.read(name))
    assert wanted <= {
        "torch._utils._rebuild_tensor_v2",
        "torch.FloatStorage",
        "collections.OrderedDict",
    }


def pickle_globals(data):
    import pickletools

    return {
        argument.replace(" ", ".")
        for opcode, argument, _ in pickletools.genops(io.BytesIO(data))
        if opcode.name == "GLOBAL"
    }
