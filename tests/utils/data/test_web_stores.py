"""Shards on a web server and in an S3 store that stall, break off, lie, redirect and fail.

The server is a real one in this process. The packages that speak to it are optional.
"""

import functools
import http.server
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from helpers.shard_sets import make
from helpers.trees import write_tree

from tests.utils.data.test_shard_folder import assert_same_images
from utils.data import remote_files
from utils.data.splits import open_split
from utils.system.errors import EXIT_FAILED, UserError

pytest.importorskip("aiohttp", reason="http:// needs it")


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder. `faults` are done to the next answers, one each, the last one first.

    A fault is "stall", "drop", "short", "long", "whole", "redirect", "loop" or a status.
    """

    daemon_threads = True
    root: Path
    faults: list
    seen: Counter


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, _, query = urllib.parse.unquote(self.path).partition("?")
        file = self.server.root / path.lstrip("/")
        if "list-type" in query:
            return self._list(path.strip("/"), dict(urllib.parse.parse_qsl(query)))
        if not file.is_file():
            return self._send(404, b"")
        fault = self.server.faults.pop() if self.server.faults else None
        self.server.seen[fault] += 1
        if fault in ("redirect", "loop"):
            if fault == "loop":
                self.server.faults.append("loop")
            return self._send(302, b"", {"Location": self.path})
        if isinstance(fault, int):
            return self._send(fault, b"try again")
        if fault == "stall":
            time.sleep(20)
            self.close_connection = True
            return None
        data, status = file.read_bytes(), 200
        asked = self.headers.get("Range")
        if asked and fault != "whole":
            first, last = asked.removeprefix("bytes=").split("-")
            total, status = len(data), 206
            data = data[int(first) : int(last) + 1]
            extra = {"Content-Range": f"bytes {first}-{int(first) + len(data) - 1}/{total}"}
        else:
            extra = {}
        return self._send(status, data, extra, fault)

    def _send(self, status: int, data: bytes, extra=None, fault=None) -> None:
        told = {"short": len(data) // 2, "long": len(data) + 50}.get(fault, len(data))
        self.send_response(status)
        for name, value in {**(extra or {}), "ETag": '"1"', "Content-Length": told}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault in ("drop", "long"):
            data = data[: len(data) // 2] if fault == "drop" else data
            self.close_connection = True
        self.wfile.write(data[:told])

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        """Answers S3's ListObjectsV2."""
        prefix, root = query.get("prefix", ""), self.server.root / bucket
        files, folders = [], set()
        for path in sorted(root.rglob("*")):
            key = str(path.relative_to(root))
            if path.is_file() and key.startswith(prefix):
                rest, slash, _ = key.removeprefix(prefix).partition("/")
                if slash and query.get("delimiter"):
                    folders.add(f"{prefix}{rest}/")
                else:
                    files.append((key, path.stat().st_size))
        body = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size><ETag>1</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key, size in files
        ) + "".join(f"<CommonPrefixes><Prefix>{f}</Prefix></CommonPrefixes>" for f in folders)
        text = (
            '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{bucket}</Name><Prefix>{prefix}</Prefix><KeyCount>{len(files)}</KeyCount>"
            f"<MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>{body}</ListBucketResult>"
        )
        self._send(200, text.encode(), {"Content-Type": "application/xml"})


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[Server]:
    """It serves tmp_path/web with the shards of tmp_path/source in bucket/data."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote_files, "PAUSES", (0, 0, 0))
    monkeypatch.setattr(remote_files, "SILENCE", 1.0)
    remote_files._filesystem.cache_clear()
    make(monkeypatch, write_tree(tmp_path / "source", train=2, val=1), tmp_path / "web/bucket/data")
    with Server(("127.0.0.1", 0), Handler) as serving:
        serving.root, serving.faults, serving.seen = tmp_path / "web", [], Counter()
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield serving
        serving.shutdown()
    remote_files._filesystem.cache_clear()


@pytest.fixture
def url(server) -> str:
    return f"http://127.0.0.1:{server.server_port}/bucket/data"


def test_shards_on_a_web_server_are_the_folder(server, url, tmp_path):
    for folder, in_shards in zip(
        open_split(str(tmp_path / "source")), open_split(url), strict=True
    ):
        assert_same_images(folder, in_shards)
    assert server.seen[None] > 9


def test_an_index_that_arrives_cut_short_is_named(server, url):
    server.faults = ["short"]
    with pytest.raises(UserError, match=r"train/shard-index\.npz: damaged or cut short; upload"):
        open_split(url)


@pytest.mark.parametrize("fault", ["stall", "drop", "short", "long", "redirect", 429, 500, 503])
def test_a_fault_that_passes_costs_a_retry_and_changes_no_byte(server, url, tmp_path, fault):
    """Three faults in a row, and then the answer, for the index and for an image."""
    server.faults = [] if fault == "short" else [fault] * 3
    _, in_shards = open_split(url)
    _, folder = open_split(str(tmp_path / "source"))
    server.seen.clear()
    server.faults = [fault] * 3
    wanted = Path(str(folder.path(0), "utf-8")).read_bytes()
    assert in_shards.path(0).read() == wanted
    assert server.seen[fault] == 3
    assert not server.faults


@pytest.mark.parametrize("fault", ["stall", "drop", "short", "long", "loop", 500, 403])
def test_a_fault_that_lasts_is_one_line(server, url, fault):
    _, in_shards = open_split(url)
    server.faults = [fault] * 100
    with pytest.raises(
        UserError, match=r"val-00000\.tar: .* \(4 tries\); check the address"
    ) as end:
        in_shards.path(0).read()
    assert end.value.exit_code == EXIT_FAILED
    assert "\n" not in str(end.value)


def test_a_server_without_ranges_is_named_as_such(server, url):
    """Its answer is the beginning of the file, and not the image that was asked for."""
    _, in_shards = open_split(url)
    server.faults = ["whole"] * 100
    with pytest.raises(UserError, match="came: the server ignores ranges; copy the shards"):
        in_shards.path(0).read()
    assert server.seen["whole"] == 1  # it will not learn


def test_a_file_that_is_gone_is_asked_for_once(server, url):
    with pytest.raises(UserError, match="no tar shards there, and no shard-index"):
        open_split(url.replace("data", "other"))


def test_a_store_of_s3(server, tmp_path, monkeypatch):
    """s3fs lists, reads ranges, and tries again by itself before we do."""
    pytest.importorskip("s3fs", reason="s3:// needs it")
    import fsspec

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    own = functools.partial(fsspec.filesystem, "s3", skip_instance_cache=True)
    store = own(
        endpoint_url=f"http://127.0.0.1:{server.server_port}",
        config_kwargs={"s3": {"addressing_style": "path"}, "retries": {"max_attempts": 1}},
    )
    monkeypatch.setattr(
        fsspec.core, "url_to_fs", lambda url, **_: (store, url.removeprefix("s3://"))
    )
    source = str(tmp_path / "source")
    for folder, in_shards in zip(open_split(source), open_split("s3://bucket/data"), strict=True):
        assert_same_images(folder, in_shards)
    server.faults = [503]
    wanted = Path(str(folder.path(0), "utf-8")).read_bytes()
    assert in_shards.path(0).read() == wanted
    (tmp_path / "web/bucket/data/train/shard-index.npz").unlink()  # made anew, from the listing
    assert_same_images(open_split(source)[0], open_split("s3://bucket/data")[0])
