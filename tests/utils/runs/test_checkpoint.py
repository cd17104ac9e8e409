"""Checkpoints: whole or refused, never fewer than two, and never code."""

import json
import os
import pickle
import random
import resource
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.tiny_runs import tiny_run

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
    assert checkpoint.save(path, state()) == path.stat().st_size
    saved = checkpoint.load(path)
    assert saved.pop("format") == checkpoint.FORMAT
    assert same(saved, state())


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
    saved, notes = folder.newest_good()
    assert (saved.file.name, saved.contents["progress"]["step"], notes) == ("last.pth", 3, [])
    assert folder.newest_good(best_first=True)[0].file.name == "best.pth"


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
    saved, notes = folder.newest_good()
    assert (saved.file.name, saved.contents["progress"]["step"]) == ("previous.pth", 1)
    assert len(notes) == 1
    assert "last.pth: damaged" in notes[0]
    damage(folder.previous)
    assert folder.newest_good()[0].file.name == "best.pth"
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
    assert folder.newest_good()[0].contents["progress"]["step"] == 1
    folder.save_last(state(2))
    assert {p.name for p in tmp_path.iterdir()} == {"last.pth", "previous.pth"}


# Small files that stand for terabytes: one line, and no memory is taken.

ROOM = 200 << 20  # bytes of address space that a refusal may take besides what is there


@pytest.fixture
def little_memory():
    """What takes more than `ROOM` ends in a MemoryError, which is no UserError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        checkpoint.load(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def with_pickle(path: Path, pickle: bytes, repeated: int = 0) -> Path:
    """A checkpoint whose pickle is this one, then `repeated` MiB of the letter a, and its end."""
    torch.save({"a": torch.zeros(1)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            with archive.open(name, "w", force_zip64=True) as file:
                if not name.endswith("data.pkl"):
                    file.write(content)
                    continue
                file.write(pickle)
                for _ in range(repeated):
                    file.write(b"a" * 2**20)
                file.write(b"s.")
    return path


START = b"\x80\x02}X\x01\x00\x00\x00a"  # a dict, and its key "a"


@pytest.mark.parametrize("run", [True, False])
def test_a_tensor_that_repeats_one_number(little_memory, tmp_path, run):
    endless = {"fc.weight": torch.zeros(1).expand(2**30, 512)}
    torch.save(tiny_run(state_dict=endless) if run else endless, tmp_path / "a.pth")
    assert "fc.weight alone 2,199,023.3 MB" in refused(tmp_path / "a.pth")


def test_many_tensors_of_one_storage(little_memory, tmp_path):
    shared = torch.zeros(2**18)
    torch.save({str(n): shared for n in range(50)}, tmp_path / "a.pth")
    assert "its tensors would fill more than 4 times" in refused(tmp_path / "a.pth")


def test_tensors_that_are_shared_once_or_twice_are_taken(little_memory, tmp_path):
    shared = torch.zeros(2**18)
    torch.save({"a": shared, "b": shared, "c": torch.zeros(1).expand(5, 5)}, tmp_path / "a.pth")
    assert set(checkpoint.load(tmp_path / "a.pth")) == {"a", "b", "c"}


def test_a_text_that_a_zip_packs(little_memory, tmp_path):
    size = 300 << 20
    path = with_pickle(tmp_path / "a.pth", START + b"\x8d" + struct.pack("<Q", size), size >> 20)
    assert path.stat().st_size < 2**20
    assert "packed, which torch never does" in refused(path)


def test_a_text_that_is_only_claimed(little_memory, tmp_path):
    path = with_pickle(tmp_path / "a.pth", START + b"\x8d" + struct.pack("<Q", 2**40))
    assert "damaged" in refused(path)


def test_lists_that_hold_each_other(little_memory, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "VALUES", 30_000)
    nested: list = [1] * 10
    for _ in range(9):
        nested = [nested] * 10
    itself: list = []
    itself.append(itself)
    for state in (tiny_run(args={"data": "tree", "lists": nested}), {"a": itself}):
        torch.save(state, tmp_path / "a.pth")
        assert "more than 30,000 values" in refused(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(3, device="meta"),
        torch.ones(3).to_sparse(),
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        torch.ones(3, dtype=torch.complex64),
    ],
    ids=["meta", "sparse", "quantised", "complex"],
)
def test_what_is_no_dense_tensor(little_memory, tmp_path, tensor):
    torch.save(tiny_run(state_dict={"fc.bias": tensor}), tmp_path / "a.pth")
    assert "fc.bias is not a dense tensor of real numbers" in refused(tmp_path / "a.pth")


def write_safetensors(path: Path, header: bytes, length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", length or len(header)) + header + b"\0" * 4)
    return path


def test_safetensors_that_claim_or_nest(little_memory, tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "a.safetensors"
    weight = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    deep = {"checkpoint_format": "1", "args": "[" * 200_000 + "]" * 200_000}
    for header, length in (
        (b"{}", 2**40),
        (b'{"__metadata__":' + b"[" * 200_000, None),
        (json.dumps({"w": {**weight, "shape": [2**40]}}).encode(), None),
        (json.dumps({"__metadata__": deep, "w": weight}).encode(), None),
    ):
        assert "damaged, or not a safetensors file" in refused(
            write_safetensors(path, header, length)
        )
