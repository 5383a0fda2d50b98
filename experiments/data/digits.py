"""scikit-learn's handwritten digits: 1,797 images of 8 × 8, embedded, no download."""

import numpy as np

from experiments.data.dataset import Dataset, Split, held_out

HELD_OUT = 0.2


def load_digits(seed: int) -> Dataset:
    """64 pixels in [0, 1] a digit, row by row; 1,438 to train on and 359 held out at random."""
    # Imported here: only this set needs scikit-learn, whose import takes a second.
    from sklearn import datasets

    pixels, labels = datasets.load_digits(return_X_y=True)
    inputs, targets = np.asarray(pixels) / 16.0, np.asarray(labels).astype(np.int64)
    train, test = held_out(len(inputs), HELD_OUT, seed)
    return Dataset(
        name="digits",
        train=Split(inputs[train], targets[train]),
        test=Split(inputs[test], targets[test]),
        classes=10,
        note="Optical recognition of handwritten digits (Alpaydin and Kaynak, 1998), the test part "
        "of the UCI set as scikit-learn ships it; 20% held out at random.",
    )
