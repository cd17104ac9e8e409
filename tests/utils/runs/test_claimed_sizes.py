"""Small files that stand for terabytes: each is refused in one line, and no memory is taken."""

import json
import resource
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.tiny_runs import tiny_run

from utils.runs import checkpoint
from utils.system.errors import UserError

ROOM = 200 << 20  # bytes of address space that a refusal may take besides what is there


@pytest.fixture(autouse=True)
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
def test_a_tensor_that_repeats_one_number(tmp_path, run):
    endless = {"fc.weight": torch.zeros(1).expand(2**30, 512)}
    torch.save(tiny_run(state_dict=endless) if run else endless, tmp_path / "a.pth")
    assert "fc.weight alone 2,199,023.3 MB" in refused(tmp_path / "a.pth")


def test_many_tensors_of_one_storage(tmp_path):
    shared = torch.zeros(2**18)
    torch.save({str(n): shared for n in range(50)}, tmp_path / "a.pth")
    assert "its tensors would fill more than 4 times" in refused(tmp_path / "a.pth")


def test_tensors_that_are_shared_once_or_twice_are_taken(tmp_path):
    shared = torch.zeros(2**18)
    torch.save({"a": shared, "b": shared, "c": torch.zeros(1).expand(5, 5)}, tmp_path / "a.pth")
    assert set(checkpoint.load(tmp_path / "a.pth")) == {"a", "b", "c"}


def test_a_text_that_a_zip_packs(tmp_path):
    size = 300 << 20
    path = with_pickle(tmp_path / "a.pth", START + b"\x8d" + struct.pack("<Q", size), size >> 20)
    assert path.stat().st_size < 2**20
    assert "314.6 MB packed into 0.3 MB" in refused(path)


def test_a_text_that_is_only_claimed(tmp_path):
    path = with_pickle(tmp_path / "a.pth", START + b"\x8d" + struct.pack("<Q", 2**40))
    assert "damaged" in refused(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_bytearray_of_any_size(tmp_path, zipped):
    asks = START + b"cbuiltins\nbytearray\n\x8a\x05" + (2**32).to_bytes(5, "little") + b"\x85R"
    path = tmp_path / "a.pth"
    if zipped:
        with_pickle(path, asks)
    else:
        path.write_bytes(asks + b"s.")
    assert "asks for a bytearray" in refused(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_lists_that_hold_each_other(tmp_path, zipped):
    nested: list = [1] * 10
    for _ in range(9):
        nested = [nested] * 10
    state = tiny_run(args={"data": "tree", "lists": nested})
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    assert "more than 3,000,000 values" in refused(tmp_path / "a.pth")
    itself: list = []
    itself.append(itself)
    torch.save({"a": itself}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    assert "more than 3,000,000 values" in refused(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(3, device="meta"),
        torch.ones(3).to_sparse(),
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    ],
    ids=["meta", "sparse", "quantised"],
)
def test_what_is_no_dense_tensor(tmp_path, tensor):
    torch.save({"fc.bias": tensor}, tmp_path / "a.pth")
    assert "fc.bias is not a dense tensor of real numbers" in refused(tmp_path / "a.pth")
    torch.save(tiny_run(state_dict={"fc.bias": tensor}), tmp_path / "a.pth")
    assert "a dense tensor of real numbers as fc.bias" in refused(tmp_path / "a.pth")


def write_safetensors(path: Path, header: bytes, length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", length or len(header)) + header + b"\0" * 4)
    return path


def test_safetensors_that_claim_or_nest(tmp_path):
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
