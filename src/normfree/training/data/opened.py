"""What every kind of source gives, and which examples it holds out where nothing is named for validation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from .examples import Examples

Split = Literal["train", "validation"]

SPLITS: tuple[Split, ...] = ("train", "validation")
VALIDATION: tuple[Split, ...] = ("validation",)
HELD_OUT_EVERY = 10


@dataclass(frozen=True)
class Opened:
    """A source of labelled images.

    Attributes:
        classes: names, by label.
        split: gives the examples of a split, none of them decoded yet; None if the source has nothing for it.
        notes: what was assumed, a sentence each; opening a split may add some.
    """

    classes: tuple[str, ...]
    split: Callable[[Split], Examples | None]
    notes: list[str] = field(default_factory=list)


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
