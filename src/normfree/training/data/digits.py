"""The 1 797 handwritten digits that come with scikit-learn."""

from __future__ import annotations

import numpy as np

from ..recipe import DataSection
from .examples import DecodedExamples
from .opened import Opened, held_out_in_classes

_EVERY = 5
NOTE = "digits: every fifth image of each digit is held out for validation"


def digits(section: DataSection, channels: int) -> Opened:
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
    labels = bunch.target.astype(np.int64)
    held_out = held_out_in_classes(labels, _EVERY)

    def part(name: str, rows: np.ndarray) -> DecodedExamples:
        return DecodedExamples(f"digits ({name})", pixels[rows], labels[rows], lambda i: f"digit {rows[i]}")

    return Opened(
        part("train", np.flatnonzero(~held_out)[: section.limit]),
        part("validation", np.flatnonzero(held_out)[: section.validation_limit]),
        tuple(str(digit) for digit in range(10)),
        (NOTE,),
    )
