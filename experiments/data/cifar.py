"""CIFAR-10 and CIFAR-100 in the binary version: 50,000 + 10,000 colour images of 32 × 32."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from experiments.data.dataset import Dataset, Split
from experiments.data.sources import DataError, SourceFile, fetch

SITE = "https://www.cs.toronto.edu/~kriz"
FOLDER = "cifar-10-batches-bin"
PIXELS = 3 * 32 * 32  # the planes red, green, blue
RECORD = 1 + PIXELS  # of CIFAR-10: a label first; CIFAR-100 has a coarse one before the fine
RECORDS = 10_000  # in each file of CIFAR-10
RECORDS_100 = (50_000, 10_000)  # in CIFAR-100's train.bin and test.bin
# The site publishes the archives' checksums; those of CIFAR-100's files are from one copy.
ARCHIVE_MD5 = "md5:c32a1d4ab5d03f1284b67883e8d87530"
ARCHIVE_100_MD5 = "md5:03b5dce01913d631647c71ecec9e9cb8"
MD5_100 = ("6172c7755cfe09b2fe270c85cebc1b15", "4499cfba6c016c1be1438163640a0898")
TRAIN_SHA256 = (
    "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
)


def load_cifar10(seed: int) -> Dataset:
    """CIFAR-10 with its own split; `seed` is not used."""
    del seed
    train = [
        read_batch(fetch(_file(f"data_batch_{i}.bin", f"sha256:{checksum}")), RECORDS)
        for i, checksum in enumerate(TRAIN_SHA256, start=1)
    ]
    # The test file has no checksum of its own here; from the archive it has the archive's.
    path = fetch(_file("test_batch.bin", ""))
    test = read_batch(path, RECORDS)
    note = "CIFAR-10 (Krizhevsky, 2009), no terms stated; the source's own split."
    inexact = inexact_indices(path.with_name("cifar10-inexact.json"))
    if inexact:
        exact = np.setdiff1d(np.arange(len(test)), inexact)
        test = Split(test.inputs[exact], test.targets[exact])
        note += f" {len(inexact)} test images that this copy holds inexactly are left out."
    return Dataset(
        name="cifar-10",
        train=Split(
            np.concatenate([part.inputs for part in train]),
            np.concatenate([part.targets for part in train]),
        ),
        test=test,
        classes=10,
        note=note,
    )


def load_cifar100(seed: int) -> Dataset:
    """CIFAR-100 with its own split and its 100 fine labels; `seed` is not used."""
    del seed
    train, test = (
        read_batch(
            fetch(
                SourceFile(
                    member := f"cifar-100-binary/{name}.bin",
                    f"{SITE}/cifar-100-binary.tar.gz",
                    f"md5:{checksum}",
                    member=member,
                    archive_checksum=ARCHIVE_100_MD5,
                    confirmed=False,
                )
            ),
            records,
            classes=100,
        )
        for name, checksum, records in zip(("train", "test"), MD5_100, RECORDS_100, strict=True)
    )
    note = "CIFAR-100 (Krizhevsky, 2009), no terms stated; the source's own split, fine labels."
    return Dataset(name="cifar-100", train=train, test=test, classes=100, note=note)


def inexact_indices(path: Path) -> list[int]:
    """Indices of test images that a local copy declares inexact; none where it declares nothing."""
    return json.loads(path.read_text())["inexact_test_indices"] if path.is_file() else []


def read_batch(path: Path, records: int, classes: int = 10) -> Split:
    """The images of one binary file, and the label that stands right before each.

    Raises:
        DataError: The file does not hold that many records, or a label is not below `classes`.
    """
    size = PIXELS + (2 if classes == 100 else 1)
    content = np.fromfile(path, np.uint8)
    if content.size != records * size:
        raise DataError(
            f"`{path}` must hold {records} records of {size} bytes, got {content.size} bytes; "
            "fetch it anew."
        )
    rows = content.reshape(records, size)
    labels = rows[:, -PIXELS - 1].astype(np.int64)
    if labels.max(initial=0) >= classes:
        raise DataError(
            f"`{path}` must hold labels below {classes}, got {labels.max()}; fetch it anew."
        )
    pixels = rows[:, -PIXELS:].reshape(records, 3, 32, 32)
    return Split(pixels.astype(np.float32) / np.float32(255), labels)


def _file(name: str, checksum: str) -> SourceFile:
    member = f"{FOLDER}/{name}"
    url = f"{SITE}/cifar-10-binary.tar.gz"
    return SourceFile(member, url, checksum, member=member, archive_checksum=ARCHIVE_MD5)
