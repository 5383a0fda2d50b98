"""German to English: Multi30k, and IWSLT'14 as fairseq's recipe splits it; sentences untouched.

Tokens and vocabularies are the experiment's to choose.
"""

from __future__ import annotations

import gzip
import re
import zlib
from dataclasses import dataclass
from html import unescape
from pathlib import Path

from experiments.data.sources import DataError, SourceFile, fetch

Pairs = list[tuple[str, str]]
LANGUAGES = ("de", "en")

MULTI30K_URL = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw"
MULTI30K_SHA256 = {
    "train.de": "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
    "train.en": "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
    "val.de": "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
    "val.en": "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
    "test_2016_flickr.de": "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
    "test_2016_flickr.en": "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9",
}
IWSLT14_URL = "http://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz"
IWSLT14_TESTS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
VALIDATION_EVERY = 23  # every so many-th pair of IWSLT'14's training file is held out
_TAG = re.compile(r"</?(title|description)>")
_LEFT_OUT = re.compile(r"<(url|talkid|keywords|speaker|reviewer|translator|doc|/doc)\b")
_SEGMENT = re.compile(r"<seg id=\"\d+\">(.*?)</seg>")


@dataclass(frozen=True, eq=False)
class Translation:
    """Sentence pairs (German, English).

    Attributes:
        name: The name that `load_translation` takes.
        train: What is trained on.
        validation: What chooses.
        test: What is held out.
        note: What a reader of its results must know: source, terms, choices made here.
    """

    name: str
    train: Pairs
    validation: Pairs
    test: Pairs
    note: str


def load_multi30k() -> Translation:
    """Multi30k's 29,000 + 1,014 image captions, and the 1,000 of its test set of 2016."""
    train, validation, test = (
        _paired(*(_multi30k(f"{part}.{language}") for language in LANGUAGES))
        for part in ("train", "val", "test_2016_flickr")
    )
    note = "Multi30k, task 1 (Elliott et al., 2016), German to English; test_2016_flickr."
    return Translation("multi30k", train, validation, test, note)


def load_iwslt14() -> Translation:
    """IWSLT'14's TED talks: about 160,000 + 7,000 pairs, and 6,750 of five test sets."""
    everything = _paired(*(_iwslt14(f"train.tags.de-en.{one}") for one in LANGUAGES))
    tests = [
        _paired(*(_iwslt14(f"IWSLT14.{test}.de-en.{language}.xml") for language in LANGUAGES))
        for test in IWSLT14_TESTS
    ]
    # the recipe takes the last of each VALIDATION_EVERY
    number = range(1, len(everything) + 1)
    held = [pair for n, pair in zip(number, everything, strict=True) if n % VALIDATION_EVERY == 0]
    rest = [pair for n, pair in zip(number, everything, strict=True) if n % VALIDATION_EVERY]
    note = (
        "IWSLT 2014 (Cettolo et al., 2014), CC BY-NC-ND; split as in fairseq's recipe, but before "
        "its tokenization and length filter."
    )
    return Translation("iwslt14", rest, held, [pair for test in tests for pair in test], note)


def _multi30k(name: str) -> tuple[Path, list[str]]:
    checksum = f"sha256:{MULTI30K_SHA256[name]}"
    file = f"{name}.gz"
    path = fetch(SourceFile(f"multi30k-de-en/{file}", f"{MULTI30K_URL}/{file}", checksum))
    try:
        return path, _lines(gzip.decompress(path.read_bytes()).decode())
    except (EOFError, OSError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(
            f"`{path}` must be a gzip file of text, but it cannot be read ({error}); fetch it anew."
        ) from error


def _iwslt14(name: str) -> tuple[Path, list[str]]:
    member = f"de-en/{name}"
    # No checksum of the archive or of its files is known.
    path = fetch(SourceFile(f"iwslt14/{member}", IWSLT14_URL, "", member=member))
    try:
        return path, sentences(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"`{path}` must be text, but {error}; fetch it anew.") from error


def sentences(document: str) -> list[str]:
    """The sentences of a training file with tags, one a line, or of a test file's <seg> elements.

    Titles and descriptions are sentences; addresses, keywords and names are not.
    """
    if segments := _SEGMENT.findall(document):
        return [unescape(segment).strip() for segment in segments]
    return [_TAG.sub("", line).strip() for line in _lines(document) if not _LEFT_OUT.match(line)]


def _lines(text: str) -> list[str]:
    """The lines as both languages number them: an empty one counts, and no other separator does."""
    return text.removesuffix("\n").split("\n") if text else []


def _paired(german: tuple[Path, list[str]], english: tuple[Path, list[str]]) -> Pairs:
    """Sentences of equal number, side by side."""
    (path, left), (other, right) = german, english
    if not left or len(left) != len(right):
        raise DataError(
            f"`{path}` and `{other.name}` must hold as many sentences, at least one, got "
            f"{len(left)} and {len(right)}; fetch them anew."
        )
    return list(zip(left, right, strict=True))
