"""Where a file is taken from: APO_DATA_DIR, else its source; and whether it is that file."""

from __future__ import annotations

import os
import shutil
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pooch
import requests
from filelock import FileLock

VARIABLE = "APO_DATA_DIR"
ATTEMPTS = 3  # at a download whose transfer breaks; each starts anew


class DataError(RuntimeError):
    """A data file that cannot be had or trusted, and what to do about it."""


@dataclass(frozen=True)
class SourceFile:
    """One file of a data set.

    Attributes:
        path: Where it lies below APO_DATA_DIR, such as "uci/CASP.csv".
        url: What is downloaded: the file itself, or an archive that has it as a member.
        checksum: Of the file, as "md5:…" or "sha256:…"; "" where none is known.
        member: Its name in the archive, "" where the url is the file itself.
        archive_checksum: Of the archive, where one is known.
        confirmed: Whether the checksums are the source's own, or were met in independent copies.
    """

    path: str
    url: str
    checksum: str
    member: str = ""
    archive_checksum: str | None = None
    confirmed: bool = True


def fetch(source: SourceFile) -> Path:
    """A local path of that file, its checksum verified.

    Several processes may ask at once: one downloads, and the others wait for it.

    Raises:
        DataError: Neither APO_DATA_DIR nor the network has it, or its checksum is another.
    """
    path = _in_data_dir(source) or _downloaded(source)
    _verify(source, path)
    return path


def _in_data_dir(source: SourceFile) -> Path | None:
    named = os.environ.get(VARIABLE)
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"`{VARIABLE}` must name a folder, got {named!r}; correct it, or unset it to download."
        )
    path = folder / source.path
    return path if path.is_file() else None


def _downloaded(source: SourceFile) -> Path:
    """The file from pooch's cache, where it is put now if it is not yet there."""
    folder = Path(pooch.os_cache("apo-core")) / Path(source.path).parent
    folder.mkdir(parents=True, exist_ok=True)
    name = source.url.rsplit("/", 1)[-1]
    try:
        # The system gives the lock back where its holder is killed.
        with FileLock(folder / f".{name}.lock"):
            found = _transferred(source, folder, name)
            return _unpacked(found, source.member) if source.member else found
    except requests.exceptions.RequestException as error:
        raise DataError(_both_ways_out(source, type(error).__name__)) from error
    except ValueError as error:  # pooch's word for a checksum that differs
        raise DataError(
            f"`{source.path}` must come with the checksum "
            f"{source.archive_checksum or source.checksum}, but what {source.url} gave has another "
            f"({error}); run again in case the transfer broke, or set {VARIABLE} to a folder that "
            f"holds {source.path}.{_question(source)}"
        ) from error
    except Exception as error:  # an archive that cannot be read, a full disk
        raise DataError(_both_ways_out(source, f"{type(error).__name__}: {error}")) from error


def _transferred(source: SourceFile, folder: Path, name: str) -> Path:
    """What the url names, whole: pooch moves it into place once its checksum is right."""
    known = source.archive_checksum if source.member else source.checksum or None
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return Path(
                str(pooch.retrieve(url=source.url, known_hash=known, fname=name, path=folder))
            )
        except (requests.exceptions.ConnectionError, requests.exceptions.ChunkedEncodingError):
            if attempt == ATTEMPTS:
                raise
    raise AssertionError("unreachable")


def _unpacked(archive: Path, member: str) -> Path:
    """The member's file beside the archive, complete or absent like the archive itself."""
    path = archive.with_name(f"{archive.name}.members") / member
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            _extract(archive, member, beside)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    return path


def _extract(archive: Path, member: str, target: Path) -> None:
    """Copy one member out of a zip or a tar archive."""
    with target.open("wb") as file:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as unzipped, unzipped.open(member) as content:
                shutil.copyfileobj(content, file)
            return
        with tarfile.open(archive) as untarred:
            content = untarred.extractfile(member)
            if content is None:
                raise KeyError(f"{member!r} is no file in the archive")
            shutil.copyfileobj(content, file)


def _both_ways_out(source: SourceFile, reason: str) -> str:
    named = os.environ.get(VARIABLE)
    local = f"{VARIABLE} has no such file" if named else f"{VARIABLE} is not set"
    return (
        f"`{source.path}` must come from a local folder or from its source, but {local} and "
        f"{source.url} did not give it ({reason}); either connect to the network and run again, or "
        f"set {VARIABLE} to a folder that holds {source.path}."
    )


def _verify(source: SourceFile, path: Path) -> None:
    if not source.checksum:
        return
    kind, expected = source.checksum.split(":")
    found = pooch.file_hash(str(path), alg=kind)
    if found == expected:
        return
    raise DataError(
        f"`{path}` must have the {kind} {expected}, got {found}: it is altered or incomplete; "
        f"delete it to have it fetched anew, or put the published file there.{_question(source)}"
    )


def _question(source: SourceFile) -> str:
    """What to think of a mismatch with a checksum that was never confirmed."""
    if source.confirmed:
        return ""
    return (
        " This checksum was taken from a copy and never compared with the source's own: if the "
        "file is untouched from there, the checksum is in question; please open an issue."
    )
