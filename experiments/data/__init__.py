"""The data layer: real files, checked, as NumPy arrays. `load("mnist")` is all that others need.

A file is taken from the folder that the environment variable APO_DATA_DIR names, where it lies
there, else from its canonical source, once, through a cache. Either way its checksum decides.
"""

from collections.abc import Callable

from experiments.data import cifar, digits, mnist, uci
from experiments.data.dataset import Dataset, Split
from experiments.data.sources import DataError

__all__ = ["LOADERS", "DataError", "Dataset", "Split", "load"]

# A new family of sets is one file with its loaders, and their rows here.
LOADERS: dict[str, Callable[[int], Dataset]] = {
    "digits": digits.load_digits,
    "mnist": mnist.load_mnist,
    "fashion-mnist": mnist.load_fashion_mnist,
    "cifar-10": cifar.load_cifar10,
    "parkinsons": uci.load_parkinsons,
    "protein": uci.load_protein,
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
