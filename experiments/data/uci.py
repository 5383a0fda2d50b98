"""Regression sets of the UCI collection, standardized as in P22 appendix B.2.

The paper reports the training loss and names neither features nor a split. Here 10% are held out at
random all the same, and mean and variance are those of the other 90%.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments.data.dataset import Dataset, Split, held_out, standardized
from experiments.data.sources import DataError, SourceFile, fetch

HELD_OUT = 0.1
SITE = "https://archive.ics.uci.edu/static/public"
PARKINSONS = SourceFile(
    path="uci/parkinsons_updrs.data",
    url=f"{SITE}/189/parkinsons+telemonitoring.zip",
    checksum="sha256:f2c7d5025dec4e92e7feae367a5f7ccf58789a10ac6b54bdf15976c599f9dd39",
    member="parkinsons_updrs.data",
)
PROTEIN = SourceFile(
    path="uci/CASP.csv",
    url=f"{SITE}/265/physicochemical+properties+of+protein+tertiary+structure.zip",
    checksum="sha256:712d2759f8113622a3ba93a47e451397147df946111f6ffdd8c655385d564aef",
    member="CASP.csv",
    confirmed=False,
)
SLICE = SourceFile(
    path="uci/slice_localization_data.csv",
    url=f"{SITE}/206/relative+location+of+ct+slices+on+axial+axis.zip",
    checksum="",
    member="slice_localization_data.csv",
    archive_checksum="sha256:9411f92082678169d2a01356f036708498c3ab507f6595919456bbb04a1d942a",
    confirmed=False,
)


def load_parkinsons(seed: int) -> Dataset:
    """5,875 recordings: total_UPDRS from age, sex, test_time and 16 voice measures.

    Left out: subject#, which is a name, and motor_UPDRS, which is a part of the target.
    """
    return _regression(
        "parkinsons",
        PARKINSONS,
        target="total_UPDRS",
        left_out=("subject#", "motor_UPDRS"),
        seed=seed,
        note="Parkinsons Telemonitoring (Tsanas and Little, 2009; UCI 189), CC BY 4.0. Predicts "
        "total_UPDRS from age, sex, test_time and the 16 voice measures; subject# and motor_UPDRS "
        "are left out. The split is by recording, so a subject may be on both sides.",
    )


def load_protein(seed: int) -> Dataset:
    """45,730 decoys: RMSD from the 9 physicochemical properties F1 … F9."""
    return _regression(
        "protein",
        PROTEIN,
        target="RMSD",
        left_out=(),
        seed=seed,
        note="Physicochemical Properties of Protein Tertiary Structure (Rana, 2013; UCI 265), "
        "CC BY 4.0. Predicts RMSD from F1 … F9.",
    )


def load_slice(seed: int) -> Dataset:
    """53,500 CT images: the relative position along the body from 384 histogram bins.

    Left out: patientId, which is a name.
    """
    return _regression(
        "slice",
        SLICE,
        target="reference",
        left_out=("patientId",),
        seed=seed,
        note="Relative location of CT slices on axial axis (Graf et al., 2011; UCI 206), CC BY "
        "4.0. Predicts reference from value0 … value383; patientId is left out. The split is by "
        "image, so a patient may be on both sides.",
    )


def _regression(
    name: str,
    source: SourceFile,
    *,
    target: str,
    left_out: Sequence[str],
    seed: int,
    note: str,
) -> Dataset:
    columns, values = read_table(fetch(source))
    features = [i for i, column in enumerate(columns) if column not in (target, *left_out)]
    inputs = values.take(features, axis=1)
    targets = values.take([columns.index(target)], axis=1)  # (N, 1)
    train, test = held_out(len(values), HELD_OUT, seed)
    train_inputs, test_inputs = standardized(inputs[train], inputs[test])
    train_targets, test_targets = standardized(targets[train], targets[test])
    return Dataset(
        name=name,
        train=Split(train_inputs, train_targets),
        test=Split(test_inputs, test_targets),
        classes=0,
        note=note,
    )


def read_table(path: Path) -> tuple[list[str], NDArray[np.float64]]:
    """Column names and (rows, columns) values of a comma-separated file with one header line.

    Raises:
        DataError: A line is not as long as the header, or a value is not a finite number.
    """
    with path.open() as file:
        columns = file.readline().strip().split(",")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "loadtxt: input contained no data", UserWarning)
            try:
                values = np.loadtxt(file, delimiter=",", ndmin=2, comments=None)
                values = values.reshape(-1, len(columns))
            except ValueError as error:
                raise DataError(
                    f"`{path}` must be a table of numbers with {len(columns)} columns, but "
                    f"{error}; fetch it anew."
                ) from error
    if not values.size or not np.isfinite(values).all():
        raise DataError(f"`{path}` must hold finite numbers, got none or others; fetch it anew.")
    return columns, values
