"""MNIST and Fashion-MNIST: gzipped IDX files, 60,000 + 10,000 images of 28 × 28."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments.data.dataset import Dataset, Split
from experiments.data.sources import DataError, SourceFile, fetch

FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist"
MNIST_MD5 = (
    "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "d53e105ee54ea40749a09fcbcd1e9432",
    "9fb629c4189551a2d022fa330f9573f3",
    "ec29112dd5afa0611ce80d1b7f02629c",
)
# The site serves plain http only; the checksums are what protects the transfer.
FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
FASHION_MD5 = (
    "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "25c81989df183df01b3e8a0aad5dffbe",
    "bef4ecab320f06d8554ea6380940ec79",
    "bb300cfdad3c16e7a12a480ee83cd310",
)


def load_mnist(seed: int) -> Dataset:
    """MNIST with its own split; `seed` is not used."""
    del seed
    note = "MNIST (LeCun, Cortes and Burges), CC BY-SA 3.0; the source's own split."
    return _load("mnist", MNIST_URL, MNIST_MD5, note)


def load_fashion_mnist(seed: int) -> Dataset:
    """Fashion-MNIST with its own split; `seed` is not used."""
    del seed
    note = "Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017), MIT licence; the source's own split."
    return _load("fashion-mnist", FASHION_URL, FASHION_MD5, note)


def _load(name: str, url: str, checksums: tuple[str, ...], note: str) -> Dataset:
    arrays = [
        read_idx(fetch(SourceFile(f"{name}/{file}", f"{url}/{file}", f"md5:{checksum}")))
        for file, checksum in zip(FILES, checksums, strict=True)
    ]
    train, test = _split(*arrays[:2]), _split(*arrays[2:])
    return Dataset(name=name, train=train, test=test, classes=10, note=note)


def _split(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> Split:
    inputs = images[:, None].astype(np.float32) / np.float32(255)  # (N, 1, 28, 28)
    return Split(inputs, labels.astype(np.int64))


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array of unsigned bytes in a gzipped IDX file.

    Raises:
        DataError: The file is not such a file, or is cut short.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"`{path}` must be a gzip file, but it cannot be unpacked ({error}); fetch it anew."
        ) from error
    # Two zero bytes, 8 for unsigned bytes, the number of dimensions, then each as a big-endian int.
    dimensions = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    header = 4 + 4 * dimensions
    shape: tuple[int, ...] = ()
    if dimensions and len(content) >= header:
        shape = tuple(int(size) for size in np.frombuffer(content[4:header], ">u4"))
    if not shape or len(content) - header != math.prod(shape):
        raise DataError(
            f"`{path}` must be an IDX file of unsigned bytes, complete, got {len(content)} bytes "
            f"that begin with {content[:header].hex()!r}; fetch it anew."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
