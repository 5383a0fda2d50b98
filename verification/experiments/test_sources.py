"""Where a file is taken from: APO_DATA_DIR, else one download from its source, here localhost."""

from __future__ import annotations

import hashlib
import io
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import pooch
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.data.sources import ATTEMPTS, DataError, SourceFile, fetch
from experiments.parallel import in_processes
from verification.experiments.fakes import fetched

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
def served(
    files: dict[str, bytes], breaks: int = 0, pause: float = 0.0
) -> Iterator[tuple[str, list[str]]]:
    """A web server on localhost: its address, and the paths that were asked for.

    Of each answer the second half comes after a pause; of the first `breaks` answers it never does.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            content = files.get(self.path.removeprefix("/"))
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            half = len(content or b"") // 2
            self.wfile.write((content or b"")[:half])
            self.wfile.flush()
            time.sleep(pause)
            if len(asked) > breaks:
                self.wfile.write((content or b"")[half:])

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


def kept(cache: Path) -> list[str]:
    """The names of the files in the cache, without its locks."""
    return sorted(
        path.name for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"
    )


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
    assert kept(cache) == []


def test_an_archive_member_with_another_checksum_is_refused(cache: Path) -> None:
    with served({"set.zip": zipped("set.csv", CONTENT[:-1])}) as (address, _):
        source = SourceFile(FILE.path, f"{address}/set.zip", SHA256, "set.csv")
        with pytest.raises(DataError, match="it is altered or incomplete; delete it"):
            fetch(source)


@pytest.mark.parametrize(
    ("packed", "reason"),
    [(zipped("other.csv", CONTENT), "no item named 'set.csv'"), (b"no archive", "BadZipFile")],
)
def test_an_archive_without_the_file_is_refused(packed: bytes, reason: str, cache: Path) -> None:
    with served({"set.zip": packed}) as (address, _):
        source = SourceFile(FILE.path, f"{address}/set.zip", SHA256, "set.csv")
        with pytest.raises(DataError, match=f"did not give it .*{reason}"):
            fetch(source)


def test_a_source_that_lost_the_file_is_reported(cache: Path) -> None:
    with served({}) as (address, _), pytest.raises(DataError, match=r"give it \(HTTPError"):
        fetch(SourceFile(FILE.path, f"{address}/set.csv", SHA256))


@pytest.mark.parametrize("checksum", [SHA256, ""])
def test_a_broken_download_starts_anew(checksum: str, cache: Path) -> None:
    assert ATTEMPTS > 1
    with served({"set.csv": CONTENT}, breaks=ATTEMPTS - 1) as (address, asked):
        path = fetch(SourceFile(FILE.path, f"{address}/set.csv", checksum))
        assert path.read_bytes() == CONTENT
        assert len(asked) == ATTEMPTS


def test_a_download_that_always_breaks_is_reported_and_leaves_nothing(cache: Path) -> None:
    with served({"set.csv": CONTENT}, breaks=99) as (address, asked):
        with pytest.raises(DataError, match=r"did not give it \((ChunkedEnc|Connection).*Error\)"):
            fetch(SourceFile(FILE.path, f"{address}/set.csv", ""))
        assert len(asked) == ATTEMPTS
    assert kept(cache) == []


def test_a_mismatch_of_an_unconfirmed_archive_is_called_a_question(cache: Path) -> None:
    packed = zipped("set.csv", CONTENT)
    with served({"set.zip": packed}) as (address, _):
        source = SourceFile(FILE.path, f"{address}/set.zip", "", "set.csv", OTHER, confirmed=False)
        with pytest.raises(DataError, match=r"gave has another .*the checksum is in question"):
            fetch(source)


def _in_parallel(source: SourceFile, cache: Path, count: int) -> list[bytes]:
    results = in_processes(
        fetched,
        [(cache, source)] * count,
        count,
        preload=[fetched.__module__],
        started=lambda item: None,
        progress=lambda *arguments: None,
    )
    found = [result for _, result in results]
    assert all(isinstance(one, bytes) for one in found), found
    return [one for one in found if isinstance(one, bytes)]


@pytest.mark.parametrize("packed", [False, True])
def test_processes_that_ask_at_once_share_one_download(packed: bool, tmp_path: Path) -> None:
    content = zipped("set.csv", CONTENT) if packed else CONTENT
    with served({"set.zip": content}, pause=0.5) as (address, asked):
        source = SourceFile(
            FILE.path, f"{address}/set.zip", SHA256, member="set.csv" if packed else ""
        )
        assert _in_parallel(source, tmp_path / "cache", 3) == [CONTENT] * 3
        assert len(asked) == 1


def test_a_process_killed_in_a_download_leaves_no_lock_and_no_file(
    cache: Path, tmp_path: Path
) -> None:
    with served({"set.csv": CONTENT}, pause=0.5) as (address, asked):
        source = SourceFile(FILE.path, f"{address}/set.csv", SHA256)
        context = get_context("forkserver")
        process = context.Process(target=fetched, args=((cache, source), None))
        process.start()
        deadline = time.monotonic() + 120  # a busy machine takes long to import
        while not asked:
            assert time.monotonic() < deadline, "nothing was asked for"
            time.sleep(0.01)
        process.kill()
        process.join()
        assert "set.csv" not in kept(cache)
        assert fetch(source).read_bytes() == CONTENT
        assert len(asked) == 2


def test_a_kill_while_unpacking_leaves_no_half_file(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = zipped("set.csv", CONTENT)
    with served({"set.zip": packed}) as (address, asked):
        source = SourceFile(FILE.path, f"{address}/set.zip", "", "set.csv")

        def stop(source: object, target: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr("experiments.data.sources.os.replace", stop)
            with pytest.raises(KeyboardInterrupt):
                fetch(source)
        assert kept(cache) == ["set.zip"]
        assert fetch(source).read_bytes() == CONTENT
        assert len(asked) == 1
