"""The data layer: real files, checked, as NumPy arrays. `load("mnist")` is all that others need.

A file is taken from the folder that the environment variable APO_DATA_DIR names, where it lies
there, else from its canonical source, once, through a cache. Either way its checksum decides.
"""

from collections.abc import Callable

from experiments.data import cifar, digits, mnist, svhn, translation, uci
from experiments.data.dataset import Dataset, Split
from experiments.data.sources import DataError
from experiments.data.translation import Translation

__all__ = [
    "LOADERS",
    "TRANSLATIONS",
    "DataError",
    "Dataset",
    "Split",
    "Translation",
    "ensure",
    "load",
    "load_translation",
]

# A new family of sets is one file with its loaders, and their rows here.
LOADERS: dict[str, Callable[[int], Dataset]] = {
    "digits": digits.load_digits,
    "mnist": mnist.load_mnist,
    "fashion-mnist": mnist.load_fashion_mnist,
    "cifar-10": cifar.load_cifar10,
    "cifar-100": cifar.load_cifar100,
    "svhn": svhn.load_svhn,
    "parkinsons": uci.load_parkinsons,
    "protein": uci.load_protein,
    "slice": uci.load_slice,
}
TRANSLATIONS: dict[str, Callable[[], Translation]] = {
    "multi30k": translation.load_multi30k,
    "iwslt14": translation.load_iwslt14,
}


def load(name: str, *, seed: int = 0) -> Dataset:
    """The data set of that name.

    Args:
        name: A key of `LOADERS`.
        seed: Draws the held-out split of a set whose source has none; others ignore it.

    Raises:
        ValueError: There is no such set.
        DataError: Its files cannot be had, or are not what they should be.
    """
    if name not in LOADERS:
        raise ValueError(
            f"`name` must be a data set, one of {', '.join(LOADERS)}, got {name!r}; a new one is "
            "added to `experiments.data.LOADERS`."
        )
    return LOADERS[name](seed)


def load_translation(name: str) -> Translation:
    """The set of sentence pairs of that name, a key of `TRANSLATIONS`.

    Raises:
        ValueError: There is no such set.
        DataError: Its files cannot be had, or are not what they should be.
    """
    if name not in TRANSLATIONS:
        raise ValueError(
            f"`name` must be a set of sentence pairs, one of {', '.join(TRANSLATIONS)}, got "
            f"{name!r}; a new one is added to `experiments.data.TRANSLATIONS`."
        )
    return TRANSLATIONS[name]()


def ensure(name: str) -> None:
    """Make sure that the files of a set, of either kind, are here and are what they should be.

    Raises:
        ValueError: There is no such set.
        DataError: Its files cannot be had, or are not what they should be.
    """
    if name in TRANSLATIONS:
        load_translation(name)
    else:
        load(name)
