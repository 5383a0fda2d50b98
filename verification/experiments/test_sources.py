"""Where a file is taken from: APO_DATA_DIR, else one download from its source, here localhost."""

from __future__ import annotations

import hashlib
import io
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import pooch
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.data.sources import DataError, SourceFile, fetch

CONTENT = b"a,b\n1,2\n3,4\n"
SHA256 = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
OTHER = "sha256:" + "0" * 64
NOWHERE = "http://127.0.0.1:9/set.csv"  # the discard port: nothing answers
FILE = SourceFile("uci/set.csv", NOWHERE, SHA256)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of downloads, and no APO_DATA_DIR."""
    monkeypatch.delenv("APO_DATA_DIR", raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / "cache")
    return tmp_path / "cache"


def lay_out(folder: Path, content: bytes) -> Path:
    """FILE with that content below the folder."""
    path = folder / FILE.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@contextmanager
def served(files: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """A web server on localhost: its address, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            content = files.get(self.path.removeprefix("/"))
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, format: str, *args: object) -> None:
            """Keep the test's output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def zipped(name: str, content: bytes) -> bytes:
    """A zip archive with that file and another."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "not this one")
        archive.writestr(name, content)
    return file.getvalue()


def tarred(name: str, content: bytes) -> bytes:
    """A gzipped tar archive with that file."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def test_the_local_folder_comes_first(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lay_out(tmp_path / "data", CONTENT)
    monkeypatch.setenv("APO_DATA_DIR", str(tmp_path / "data"))
    with served({"set.csv": CONTENT}) as (address, asked):
        assert fetch(SourceFile(FILE.path, f"{address}/set.csv", SHA256)) == path
    assert asked == []
    assert not cache.exists()


@given(data=st.data())
def test_a_local_file_altered_or_cut_anywhere_is_refused(data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(CONTENT) - 1), label="place")
    flip = data.draw(st.integers(0, 255), label="flipped bits, 0 to cut here")
    altered = (
        CONTENT[:place] + bytes([CONTENT[place] ^ flip]) + CONTENT[place + 1 :]
        if flip
        else CONTENT[:place]
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict("os.environ", APO_DATA_DIR=folder),
    ):
        lay_out(Path(folder), altered)
        with pytest.raises(DataError, match="it is altered or incomplete; delete it"):
            fetch(FILE)


def test_a_mismatch_with_an_unconfirmed_checksum_is_called_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_out(tmp_path, CONTENT)
    monkeypatch.setenv("APO_DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match="the checksum is in question; please open an issue"):
        fetch(SourceFile(FILE.path, NOWHERE, OTHER, confirmed=False))
    with pytest.raises(DataError) as caught:
        fetch(SourceFile(FILE.path, NOWHERE, OTHER))
    assert "question" not in str(caught.value)


@pytest.mark.parametrize("named", [False, True])
def test_where_neither_serves_both_ways_out_are_said(
    named: bool, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if named:
        monkeypatch.setenv("APO_DATA_DIR", str(tmp_path))
    with pytest.raises(DataError) as caught:
        fetch(FILE)
    said = "has no such file" if named else "is not set"
    assert f"APO_DATA_DIR {said} and {NOWHERE} did not give it" in str(caught.value)
    assert (
        "either connect to the network and run again, or set APO_DATA_DIR to a folder that holds "
        "uci/set.csv" in str(caught.value)
    )


def test_a_local_folder_that_is_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APO_DATA_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"`APO_DATA_DIR` must name a folder, got '.*nowhere'"):
        fetch(FILE)


@pytest.mark.parametrize(
    ("name", "make", "member"),
    [
        ("set.csv", lambda content: content, ""),
        ("set.zip", lambda content: zipped("set.csv", content), "set.csv"),
        ("set.tar.gz", lambda content: tarred("in/set.csv", content), "in/set.csv"),
    ],
)
def test_a_download_happens_once(
    name: str, make: Callable[[bytes], bytes], member: str, cache: Path
) -> None:
    packed = make(CONTENT)
    checksum = f"sha256:{hashlib.sha256(packed).hexdigest()}"
    with served({name: packed}) as (address, asked):
        source = SourceFile(FILE.path, f"{address}/{name}", SHA256, member, checksum)
        first, second = fetch(source), fetch(source)
    assert first == second
    assert first.read_bytes() == CONTENT
    assert cache in first.parents
    assert asked == [f"/{name}"]


def test_a_file_missing_from_the_local_folder_is_downloaded(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APO_DATA_DIR", str(tmp_path))
    with served({"set.csv": CONTENT}) as (address, _):
        path = fetch(SourceFile(FILE.path, f"{address}/set.csv", SHA256))
    assert cache in path.parents


def test_a_download_with_another_checksum_is_refused_and_not_kept(cache: Path) -> None:
    with served({"set.csv": CONTENT[:-1]}) as (address, _):
        source = SourceFile(FILE.path, f"{address}/set.csv", SHA256)
        with pytest.raises(DataError, match=r"must come with the checksum .* gave has another"):
            fetch(source)
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_an_archive_member_with_another_checksum_is_refused(cache: Path) -> None:
    with served({"set.zip": zipped("set.csv", CONTENT[:-1])}) as (address, _):
        source = SourceFile(FILE.path, f"{address}/set.zip", SHA256, "set.csv")
        with pytest.raises(DataError, match="it is altered or incomplete; delete it"):
            fetch(source)


@pytest.mark.parametrize(
    ("packed", "reason"),
    [(zipped("other.csv", CONTENT), "not in the archive"), (b"no archive", "BadZipFile")],
)
def test_an_archive_without_the_file_is_refused(packed: bytes, reason: str, cache: Path) -> None:
    with served({"set.zip": packed}) as (address, _):
        source = SourceFile(FILE.path, f"{address}/set.zip", SHA256, "set.csv")
        with pytest.raises(DataError, match=f"did not give it .*{reason}"):
            fetch(source)


def test_a_source_that_lost_the_file_is_reported(cache: Path) -> None:
    with served({}) as (address, _), pytest.raises(DataError, match=r"give it \(HTTPError"):
        fetch(SourceFile(FILE.path, f"{address}/set.csv", SHA256))
