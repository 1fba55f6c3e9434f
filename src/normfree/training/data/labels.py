"""Labels as they are stored, checked at the door."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import DataError


def integer_labels(column: Any, name: str, place: str) -> np.ndarray:
    """(N,) int64 from an Arrow column of labels.

    Raises:
        DataError: the column holds something else, or a label is missing.
    """
    import pyarrow as pa

    if not pa.types.is_integer(column.type):
        raise DataError(
            f"data: column {name!r} of {place} holds {column.type}, not integers; "
            "name the column of labels with data.label_column"
        )
    if column.null_count:
        missing = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        raise DataError(
            f"data: {column.null_count} of {len(column)} labels of {place} are missing, the first in row {missing}; "
            "leave these rows out, or name another column with data.label_column"
        )
    return np.asarray(column.to_numpy(), dtype=np.int64)


def check_range(labels: np.ndarray, classes: Sequence[str] | None, place: str, names: Sequence[str] = ()) -> None:
    """Whether labels are numbers of classes; without known classes, whether they are not negative.

    Raises:
        DataError: one is not.
    """
    if not len(labels):
        return
    if labels.min() < 0:
        row = int(np.argmin(labels))
        raise DataError(
            f"data: {place} has the label {labels[row]} (row {row}), and labels count from 0; "
            "-1 often marks a test set whose labels are not public: name another split with data.validation"
        )
    if classes is not None and labels.max() >= len(classes):
        row = int(np.argmax(labels))
        raise DataError(
            f"data: {place} has the label {labels[row]} (row {row}), out of range for {len(classes)} classes "
            f"(0 to {len(classes) - 1}); correct the labels or the class names in the metadata"
        )


def check_classes(labels: np.ndarray, classes: Sequence[str], place: str) -> None:
    """Whether there is something to tell apart.

    Raises:
        DataError: all labels are equal, or there is one class only.
    """
    present = np.unique(labels)
    if len(present) < 2:
        raise DataError(
            f"data: all {len(labels)} training examples of {place} are of one class "
            f"({classes[int(present[0])] if len(present) else 'none'}); training needs two or more"
        )
