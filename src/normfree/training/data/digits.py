"""The 1 797 handwritten digits that come with scikit-learn."""

from __future__ import annotations

import numpy as np

from .examples import DecodedExamples, Examples
from .opened import Opened, Split, held_out_in_classes

_EVERY = 5
NOTE = "digits: every fifth image of each digit is held out for validation"


def digits(channels: int) -> Opened:
    """8×8 images in 256 greys; every fifth of each class is for validation.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("scikit-learn is needed for the digits: pip install scikit-learn") from error
    bunch = load_digits()
    pixels = np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8)[..., None].repeat(channels, axis=3)
    whole = DecodedExamples("digits", pixels, bunch.target.astype(np.int64), [f"digit {i}" for i in range(len(pixels))])
    held_out = held_out_in_classes(whole.labels, _EVERY)

    def split(wanted: Split) -> Examples:
        return whole.at(np.flatnonzero(held_out == (wanted == "validation")), f"digits ({wanted})")

    return Opened(tuple(str(digit) for digit in range(10)), split, [NOTE])
