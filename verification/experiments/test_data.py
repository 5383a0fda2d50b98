"""The data layer: formats, where files come from, checksums; and the real sets where they lie."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.io import savemat

from experiments.data import (
    LOADERS,
    TRANSLATIONS,
    DataError,
    Dataset,
    Translation,
    cifar,
    ensure,
    load,
    load_translation,
    mnist,
    svhn,
    translation,
    uci,
)
from experiments.data.dataset import held_out, standardized
from experiments.data.sources import SourceFile
from verification.profiles import share

# A column's mean and variance after standardization: a sum of N rounded terms of size about 1 errs
# by N eps at most, and no test here has more than 1e5 rows.
STANDARDIZED_ATOL = 1e5 * np.finfo(np.float64).eps


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that APO_DATA_DIR names."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("APO_DATA_DIR", str(folder))
    return folder


def idx(array: np.ndarray) -> bytes:
    """The array as a gzipped IDX file of unsigned bytes."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return gzip.compress(header + array.astype(np.uint8).tobytes(), mtime=0)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one of digits, mnist, .*, got 'mnits'"):
        load("mnits")


@given(examples=st.integers(1, 500), fraction=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_the_split_is_a_partition_that_the_seed_decides(
    examples: int, fraction: float, seed: int
) -> None:
    train, test = held_out(examples, fraction, seed)
    assert len(test) == round(examples * fraction)
    assert sorted([*train, *test]) == list(range(examples))
    again = held_out(examples, fraction, seed)
    np.testing.assert_array_equal(train, again[0])
    np.testing.assert_array_equal(test, again[1])


@given(
    train=hnp.arrays(
        np.float64,
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=30),
        elements=st.floats(-100, 100).map(lambda x: round(x, 3)),
    ),
    shift=st.floats(-10, 10),
)
def test_standardization_is_fitted_on_the_training_part(train: np.ndarray, shift: float) -> None:
    inside, outside = standardized(train, train + shift)
    constant = np.ptp(train, axis=0) == 0
    # A rounded mean of N numbers below 100 errs by 100 N eps at most. It is divided by a deviation,
    # which is least where one value is 1e-3 off all others: 1e-3 √(N - 1) / N.
    n = len(train)
    atol = 100 * n * np.finfo(np.float64).eps / (1e-3 * np.sqrt(n - 1) / n)
    np.testing.assert_allclose(inside.mean(axis=0), 0, atol=atol)
    np.testing.assert_allclose(inside.std(axis=0)[~constant], 1, atol=atol)
    np.testing.assert_allclose(inside[:, constant], 0, atol=atol)
    scale = np.where(constant, 1, train.std(axis=0))
    # The other part keeps its shift, which a fit of its own would have taken away.
    np.testing.assert_allclose((outside - inside) * scale, shift, atol=atol)


def test_digits_are_embedded_and_split_by_seed() -> None:
    first, other = load("digits", seed=0), load("digits", seed=1)
    assert first.train.inputs.shape == (1438, 64)
    assert first.test.inputs.shape == (359, 64)
    assert first.train.inputs.min() == 0.0
    assert first.train.inputs.max() == 1.0
    assert set(first.train.targets) == set(range(first.classes))
    np.testing.assert_array_equal(load("digits", seed=0).test.inputs, first.test.inputs)
    assert not np.array_equal(other.test.inputs, first.test.inputs)


@given(array=hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=5)))
def test_an_idx_file_is_read_as_it_was_written(array: np.ndarray) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gz"
        path.write_bytes(idx(array))
        np.testing.assert_array_equal(mnist.read_idx(path), array)


@given(data=st.data())
def test_an_idx_file_cut_anywhere_is_refused(data: st.DataObject) -> None:
    packed = idx(np.arange(24).reshape(2, 3, 4))
    plain = gzip.decompress(packed)
    cut = data.draw(st.integers(0, len(plain) - 1), label="cut of the content")
    cut_packed = data.draw(st.integers(0, len(packed) - 1), label="cut of the gzip file")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gz"
        for content in (gzip.compress(plain[:cut]), packed[:cut_packed]):
            path.write_bytes(content)
            with pytest.raises(DataError, match=r"must be (an IDX|a gzip) file.*anew"):
                mnist.read_idx(path)


def test_mnist_has_its_own_split(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, high, shape)
        for high, shape in ((256, (5, 28, 28)), (10, (5,)), (256, (3, 28, 28)), (10, (3,)))
    ]
    (data_dir / "mnist").mkdir()
    for name, array in zip(mnist.FILES, arrays, strict=True):
        (data_dir / "mnist" / name).write_bytes(idx(array))
    sums = tuple(hashlib.md5(idx(array)).hexdigest() for array in arrays)
    monkeypatch.setattr(mnist, "MNIST_MD5", sums)
    found = load("mnist")
    assert found.train.inputs.dtype == np.float32
    np.testing.assert_array_equal(
        found.train.inputs[:, 0], arrays[0].astype(np.float32) / np.float32(255)
    )
    np.testing.assert_array_equal(found.train.targets, arrays[1])
    assert found.test.inputs.shape == (3, 1, 28, 28)
    np.testing.assert_array_equal(found.test.targets, arrays[3])


def _cifar(folder: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """A CIFAR-10 of 4 images a file below that folder; the records of all files, the test last."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (6, 4, cifar.RECORD)).astype(np.uint8)
    rows[:, :, 0] %= 10
    monkeypatch.setattr(cifar, "RECORDS", 4)
    sums = tuple(hashlib.sha256(part.tobytes()).hexdigest() for part in rows[:5])
    monkeypatch.setattr(cifar, "TRAIN_SHA256", sums)
    (folder / cifar.FOLDER).mkdir()
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    for name, part in zip(names, rows, strict=True):
        (folder / cifar.FOLDER / name).write_bytes(part.tobytes())
    return rows


def test_cifar_is_read_as_the_format_says(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _cifar(data_dir, monkeypatch)
    found = load("cifar-10")
    assert found.train.inputs.shape == (20, 3, 32, 32)
    np.testing.assert_array_equal(found.train.targets, rows[:5, :, 0].ravel())
    # The red plane comes first, row by row: its pixel (1, 2) is byte 1 + 32 + 2.
    np.testing.assert_array_equal(
        found.test.inputs[:, 0, 1, 2], rows[5, :, 35].astype(np.float32) / np.float32(255)
    )


def test_cifar_leaves_out_test_images_that_are_declared_inexact(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = _cifar(data_dir, monkeypatch)
    declared = data_dir / cifar.FOLDER / "cifar10-inexact.json"
    declared.write_text(json.dumps({"inexact_test_indices": [1, 3]}))
    found = load("cifar-10")
    np.testing.assert_array_equal(found.test.targets, rows[5, [0, 2], 0])
    assert "2 test images" in found.note


def test_a_cifar_file_of_another_size_or_label_is_refused(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = _cifar(data_dir, monkeypatch)
    test = data_dir / cifar.FOLDER / "test_batch.bin"
    test.write_bytes(rows[5].tobytes()[:-1])
    with pytest.raises(DataError, match="must hold 4 records of 3073 bytes, got 12291 bytes"):
        load("cifar-10")
    rows[5, 2, 0] = 10
    test.write_bytes(rows[5].tobytes())
    with pytest.raises(DataError, match="must hold labels below 10, got 10"):
        load("cifar-10")


def test_cifar100_takes_the_fine_label(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (2, 4, 2 + cifar.PIXELS)).astype(np.uint8)
    rows[:, :, 1] %= 100
    rows[0, 0, 1], rows[:, :, 0] = 99, 255  # a coarse label has no say
    (data_dir / "cifar-100-binary").mkdir()
    for name, part in zip(("train", "test"), rows, strict=True):
        (data_dir / "cifar-100-binary" / f"{name}.bin").write_bytes(part.tobytes())
    monkeypatch.setattr(cifar, "RECORDS_100", (4, 4))
    sums = tuple(hashlib.md5(part.tobytes()).hexdigest() for part in rows)
    monkeypatch.setattr(cifar, "MD5_100", sums)
    found = load("cifar-100")
    assert found.classes == 100
    np.testing.assert_array_equal(found.train.targets, rows[0, :, 1])
    # The blue plane comes last, row by row: its last pixel is the record's last byte.
    np.testing.assert_array_equal(
        found.test.inputs[:, 2, 31, 31], rows[1, :, -1].astype(np.float32) / np.float32(255)
    )


def _svhn(path: Path, labels: list[int], *, compressed: bool = False) -> np.ndarray:
    """A MATLAB file with random images; the images."""
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, len(labels))).astype(np.uint8)
    path.parent.mkdir(exist_ok=True)
    content = {"X": images, "y": np.array(labels, np.uint8)[:, None]}
    savemat(path, content, do_compression=compressed)
    return images


def test_svhn_calls_the_digit_0_by_its_name(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {part: data_dir / "svhn" / f"{part}_32x32.mat" for part in ("train", "test")}
    images = _svhn(paths["train"], [1, 10, 9], compressed=True)
    _svhn(paths["test"], [2, 3])
    sums = {part: hashlib.md5(path.read_bytes()).hexdigest() for part, path in paths.items()}
    monkeypatch.setattr(svhn, "MD5", sums)
    found = load("svhn")
    assert list(found.train.targets) == [1, 0, 9]
    assert found.test.inputs.shape == (2, 3, 32, 32)
    np.testing.assert_array_equal(
        found.train.inputs[1, 2, 5, 7], images[5, 7, 2, 1].astype(np.float32) / np.float32(255)
    )


@pytest.mark.parametrize("compressed", [False, True])
@given(cut=st.floats(0, 1, exclude_max=True))
@share(0.5)
def test_a_matlab_file_cut_anywhere_is_refused(compressed: bool, cut: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.mat"
        _svhn(path, [1, 2], compressed=compressed)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(cut * len(whole))])
        with pytest.raises(DataError, match=r"must be a MATLAB file with X and y.*anew"):
            svhn.read_mat(path)


@pytest.mark.parametrize("labels", [[0, 1], [11], []])
def test_svhn_labels_outside_1_to_10_are_refused(tmp_path: Path, labels: list[int]) -> None:
    path = tmp_path / "svhn" / "x.mat"
    _svhn(path, labels)
    with pytest.raises(DataError, match=rf"N labels in 1 … 10, got .* {len(labels)} labels"):
        svhn.read_mat(path)


def test_slice_leaves_the_patient_out(data_dir: Path) -> None:
    values = np.random.default_rng(0).normal(size=(20, 4)).round(4)
    lines = ["patientId,value0,value1,reference", *(",".join(map(str, row)) for row in values)]
    path = data_dir / uci.SLICE.path
    path.parent.mkdir()
    path.write_text("\n".join(lines))
    found = load("slice", seed=2)
    train, test = held_out(20, 0.1, 2)
    expected = standardized(values[train][:, 1:3], values[test][:, 1:3])
    np.testing.assert_array_equal(found.train.inputs, expected[0])
    np.testing.assert_array_equal(found.test.inputs, expected[1])
    assert found.train.targets.shape == (18, 1)


def _parkinsons(folder: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """A table of 30 rows with the columns of the source below that folder; its values."""
    values = np.random.default_rng(0).normal(size=(30, 5)).round(4)
    columns = "subject#,age,motor_UPDRS,total_UPDRS,PPE"
    lines = [columns, *(",".join(str(value) for value in row) for row in values)]
    content = "\r\n".join(lines).encode() + b"\r\n"
    path = folder / uci.PARKINSONS.path
    path.parent.mkdir()
    path.write_bytes(content)
    checksum = f"sha256:{hashlib.sha256(content).hexdigest()}"
    monkeypatch.setattr(uci, "PARKINSONS", SourceFile(uci.PARKINSONS.path, "unused", checksum))
    return values


def test_parkinsons_predicts_the_total_from_all_but_name_and_part(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = _parkinsons(data_dir, monkeypatch)
    found = load("parkinsons", seed=4)
    train, test = held_out(30, 0.1, 4)
    features = values.take([1, 4], axis=1)
    inputs = standardized(features[train], features[test])
    np.testing.assert_array_equal(found.train.inputs, inputs[0])
    np.testing.assert_array_equal(found.test.inputs, inputs[1])
    targets = standardized(values[train][:, [3]], values[test][:, [3]])
    np.testing.assert_array_equal(found.train.targets, targets[0])
    assert found.test.targets.shape == (3, 1)
    assert found.classes == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a,b\n1,2\n3\n", "must be a table of numbers with 2 columns"),
        ("a,b\n1,x\n", "must be a table of numbers with 2 columns"),
        ("a,b\n1,nan\n", "must hold finite numbers"),
        ("a,b\n", "must hold finite numbers"),
        ("", "must hold finite numbers"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=reason):
        uci.read_table(path)


def _multi30k(folder: Path, monkeypatch: pytest.MonkeyPatch, **texts: str) -> None:
    """A Multi30k of two captions a file, but for those texts, below that folder."""
    (folder / "multi30k-de-en").mkdir()
    sums = {}
    for name in translation.MULTI30K_SHA256:
        text = texts.get(name.replace(".", "_"), f"Ein {name}.\nZwei {name}.\n")
        content = gzip.compress(text.encode(), mtime=0)
        (folder / "multi30k-de-en" / f"{name}.gz").write_bytes(content)
        sums[name] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(translation, "MULTI30K_SHA256", sums)


def test_multi30k_pairs_line_by_line(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # an empty line is a caption, and a separator of another kind stands inside one
    odd = {"train_de": "a\u2028b\n\nÄ\n", "train_en": "a\nb\nc\n"}
    _multi30k(data_dir, monkeypatch, **odd)
    found = load_translation("multi30k")
    assert found.train == [("a\u2028b", "a"), ("", "b"), ("Ä", "c")]
    assert found.validation[1] == ("Zwei val.de.", "Zwei val.en.")
    assert found.test[0] == ("Ein test_2016_flickr.de.", "Ein test_2016_flickr.en.")


@pytest.mark.parametrize("english", ["a\nb\nc\n", ""])
def test_sentences_without_a_partner_are_refused(
    english: str, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _multi30k(data_dir, monkeypatch, val_en=english)
    with pytest.raises(DataError, match=r"as many sentences, at least one, got 2 and"):
        load_translation("multi30k")


def test_iwslt14_is_split_as_in_the_recipe(data_dir: Path) -> None:
    folder = data_dir / "iwslt14" / "de-en"
    folder.mkdir(parents=True)
    for language in translation.LANGUAGES:
        talk = ["<url>http://x</url>", "<talkid>1</talkid>", "<keywords>a, b</keywords>"]
        talk += ["<title>T</title>", "<description>D</description>"]
        talk += [f" {language} {i} & <i>" for i in range(3, 48)]
        (folder / f"train.tags.de-en.{language}").write_text("\n".join(talk) + "\n")
        for test in translation.IWSLT14_TESTS:
            text = f'<doc docid="1"><title>no</title>\n<seg id="1"> {test} &amp; </seg>\n</doc>\n'
            (folder / f"IWSLT14.{test}.de-en.{language}.xml").write_text(text)
    found = load_translation("iwslt14")
    assert len(found.train) == 45
    assert found.train[:3] == [("T", "T"), ("D", "D"), ("de 3 & <i>", "en 3 & <i>")]
    assert found.validation == [
        ("de 23 & <i>", "en 23 & <i>"),
        ("de 46 & <i>", "en 46 & <i>"),
    ]
    assert [pair[0] for pair in found.test] == [f"{test} &" for test in translation.IWSLT14_TESTS]


def test_an_unknown_translation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one of multi30k, iwslt14, got 'wmt'"):
        load_translation("wmt")


def test_real_multi30k() -> None:
    found = _real("multi30k", "multi30k-de-en")
    assert isinstance(found, Translation)
    assert [len(part) for part in (found.train, found.validation, found.test)] == [
        29_000,
        1_014,
        1_000,
    ]
    assert found.train[0][1] == "Two young, White males are outside near many bushes."
    assert all(german and english for german, english in found.train)


def _real(name: str, path: str) -> Dataset | Translation:
    """A real data set, or a skip that says why."""
    named = os.environ.get("APO_DATA_DIR")
    if not named:
        pytest.skip("APO_DATA_DIR is not set: real data are read where it names their folder")
    if not (Path(named) / path).exists():
        pytest.skip(f"the folder that APO_DATA_DIR names has no {path}")
    return load_translation(name) if name in TRANSLATIONS else load(name)


@pytest.mark.parametrize(
    ("name", "shape", "first", "mean"),
    [
        # The mean pixel as published with each set's usual normalization, to its four digits.
        ("mnist", (1, 28, 28), [5, 0, 4, 1, 9, 2, 1, 3, 1, 4], 0.1307),
        ("fashion-mnist", (1, 28, 28), [9, 0, 0, 3, 0, 2, 7, 2, 5, 5], 0.2860),
    ],
)
def test_real_images(name: str, shape: tuple, first: list[int], mean: float) -> None:
    found = _real(name, name)
    assert isinstance(found, Dataset)
    assert found.train.inputs.shape == (60_000, *shape)
    assert found.test.inputs.shape == (10_000, *shape)
    assert list(found.train.targets[:10]) == first
    assert abs(found.train.inputs.mean(dtype=np.float64) - mean) <= 5e-5


def test_real_cifar10() -> None:
    found = _real("cifar-10", cifar.FOLDER)
    assert isinstance(found, Dataset)
    assert found.train.inputs.shape == (50_000, 3, 32, 32)
    assert list(np.bincount(found.train.targets)) == [5_000] * 10
    means = found.train.inputs.mean(axis=(0, 2, 3), dtype=np.float64)
    np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("name", "path", "rows", "columns"),
    [
        ("parkinsons", uci.PARKINSONS.path, 5_875, 19),
        ("protein", uci.PROTEIN.path, 45_730, 9),
    ],
)
def test_real_regression(name: str, path: str, rows: int, columns: int) -> None:
    found = _real(name, path)
    assert isinstance(found, Dataset)
    held = round(rows / 10)
    assert found.train.inputs.shape == (rows - held, columns)
    assert found.test.inputs.shape == (held, columns)
    for part in (found.train.inputs, found.train.targets):
        np.testing.assert_allclose(part.mean(axis=0), 0, atol=STANDARDIZED_ATOL)
        np.testing.assert_allclose(part.std(axis=0), 1, atol=STANDARDIZED_ATOL)


def test_every_set_of_the_catalogue_has_a_loader_that_says_both_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("APO_DATA_DIR", raising=False)
    monkeypatch.setattr("experiments.data.sources.pooch.os_cache", lambda name: tmp_path)
    monkeypatch.setattr("experiments.data.sources.pooch.retrieve", _no_network)
    for name in {*LOADERS, *TRANSLATIONS} - {"digits"}:
        with pytest.raises(DataError) as caught:
            ensure(name)
        assert re.search(
            r"connect to the network and run again, or set APO_DATA_DIR to a folder that holds \S+",
            str(caught.value),
        ), f"{name}: {caught.value}"
    assert load("digits").name == "digits"


def _no_network(**options: object) -> str:
    del options
    raise ConnectionRefusedError("no network in this test")
