"""SVHN, cropped digits: MATLAB files, 73,257 + 26,032 colour images of 32 × 32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.io import loadmat

from experiments.data.dataset import Dataset, Split
from experiments.data.sources import DataError, SourceFile, fetch

# The site serves plain http only; the checksums are what protects the transfer.
SITE = "http://ufldl.stanford.edu/housenumbers"
MD5 = {"train": "e26dedcc434d2e4c54c9b2d4a06d8373", "test": "eb5a983be6a315427106f1b164d9cef3"}


def load_svhn(seed: int) -> Dataset:
    """SVHN with its own split, without the extra set; `seed` is not used."""
    del seed
    train, test = (
        read_mat(
            fetch(
                SourceFile(f"svhn/{part}_32x32.mat", f"{SITE}/{part}_32x32.mat", f"md5:{checksum}")
            )
        )
        for part, checksum in MD5.items()
    )
    note = "SVHN, format 2 (Netzer et al., 2011), non-commercial use; the source's own split."
    return Dataset(name="svhn", train=train, test=test, classes=10, note=note)


def read_mat(path: Path) -> Split:
    """The images and digits of a file that has X (32, 32, 3, N) and y (N, 1) in 1 … 10.

    The source's label 10 is the digit 0.

    Raises:
        DataError: The file is no such file, or is cut short.
    """
    try:
        content = loadmat(path, variable_names=("X", "y"))
        pixels, labels = content["X"], content["y"].reshape(-1).astype(np.int64)
    except Exception as error:  # what SciPy raises depends on where the damage is
        raise DataError(
            f"`{path}` must be a MATLAB file with X and y, but it cannot be read ({error}); fetch "
            "it anew."
        ) from error
    examples = len(labels)
    right = pixels.shape == (32, 32, 3, examples) and pixels.dtype == np.uint8
    if not right or examples == 0 or not ((labels >= 1) & (labels <= 10)).all():
        raise DataError(
            f"`{path}` must hold X of shape (32, 32, 3, N) in bytes and N labels in 1 … 10, got "
            f"shape {pixels.shape} in {pixels.dtype} and {examples} labels; fetch it anew."
        )
    images = pixels.transpose(3, 2, 0, 1)  # (N, 3, 32, 32)
    return Split(images.astype(np.float32) / np.float32(255), labels % 10)
