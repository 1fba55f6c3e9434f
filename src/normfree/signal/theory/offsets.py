"""Offsets between positions: the near ones are told apart, all that lies further is taken together."""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np

from .grid import Array, Grid, Window

REACH = 3
"""Offsets along each axis that are told apart; what lies further is taken as equally correlated."""


def delta(grid: Grid) -> Array:
    """No correlation between neighbours."""
    near = np.zeros(window_shape(grid))
    near[tuple(n // 2 for n in near.shape)] = 1.0
    return near


def window_shape(grid: Grid) -> tuple[int, ...]:
    """Offsets that are kept for a map."""
    return tuple(2 * min(REACH, size - 1) + 1 for size in grid.sizes)


def offsets_of(grid: Grid) -> list[tuple[int, ...]]:
    """The offsets in the order of ``near``'s elements."""
    return list(itertools.product(*(range(-(n // 2), n // 2 + 1) for n in window_shape(grid))))


@lru_cache(maxsize=256)
def offsets_between(window: Window) -> tuple[Array, Array, Array]:
    """How far apart a window's positions are, how many pairs are, and how far apart windows are, in input pixels."""
    steps = np.array(window.offsets)
    difference = (steps[None, :, :] - steps[:, None, :]).reshape(-1, steps.shape[1])
    offsets, counts = np.unique(difference, axis=0, return_counts=True)
    shifts = np.array(offsets_of(Grid(window.outputs)), float) * np.array(window.stride)
    return offsets.astype(float), counts.astype(float), shifts
