"""Training examples that are kept for validation, so that settings can be chosen without a look at other data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from .errors import DataError
from .examples import Contents, DecodedExamples, EncodedExamples, Examples, spread
from .opened import Opened


def hold_out(opened: Opened, count: int) -> Opened:
    """Moves ``count`` training examples, evenly spread over all, to validation, in place of what was there.

    Raises:
        DataError: there are no more than so many, or the data is streamed.
    """
    examples: Any = opened.train
    if not isinstance(examples, (DecodedExamples, EncodedExamples)):
        raise DataError("data.holdout: needs training examples that can be had by number, so data.streaming=false")
    if count >= len(examples):
        raise DataError(f"data.holdout: {count} of {len(examples)} training examples leave none to train on")
    held = np.zeros(len(examples), dtype=bool)
    held[spread(len(examples), count)] = True
    note = f"data: {count} training examples, evenly spread, are held out for validation"
    return replace(
        opened,
        train=_part(examples, np.flatnonzero(~held)),
        validation=_part(examples, np.flatnonzero(held)),
        notes=(*opened.notes, note),
    )


def _part(examples: DecodedExamples | EncodedExamples, rows: np.ndarray) -> Examples:
    labels = examples.labels[rows]
    if isinstance(examples, EncodedExamples):
        return EncodedExamples(examples.name, _Rows(examples.contents, rows), labels, examples.channels)
    failures = {new: examples.failures[old] for new, old in enumerate(rows.tolist()) if old in examples.failures}
    images: Any = examples.uniform[rows] if examples.uniform is not None else [examples._images[i] for i in rows]
    return DecodedExamples(examples.name, images, labels, lambda i: examples.describe(int(rows[i])), failures)


class _Rows:
    """Some of the encoded images of another source."""

    def __init__(self, contents: Contents, rows: np.ndarray):
        self.contents, self.rows = contents, rows

    def __len__(self) -> int:
        return len(self.rows)

    def describe(self, index: int) -> str:
        return self.contents.describe(int(self.rows[index]))

    def read(self, index: int) -> bytes:
        return self.contents.read(int(self.rows[index]))
