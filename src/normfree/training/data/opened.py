"""What every kind of source gives, and which examples it holds out where nothing is named for validation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .examples import Examples

HELD_OUT_EVERY = 10


@dataclass(frozen=True)
class Opened:
    """Both splits, as far as they were wanted and are there, and the names of the classes."""

    train: Examples | None
    validation: Examples | None
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()


def held_out_in_classes(labels: np.ndarray, every: int = HELD_OUT_EVERY) -> np.ndarray:
    """(N,) bool: in each class the last of every so many; of a smaller class, the last one if it is not alone."""
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        chosen[members[held_out_rows(len(members), every)]] = True
    return chosen


def held_out_rows(count: int, every: int = HELD_OUT_EVERY) -> np.ndarray:
    """(count,) bool: the last of every so many rows; of fewer rows than that, the last one if it is not alone."""
    chosen = np.arange(count) % every == every - 1
    if 1 < count < every:
        chosen[-1] = True
    return chosen
