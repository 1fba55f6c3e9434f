"""Positions of an activation map that need telling apart: those near an edge, and one for all the others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Indices = NDArray[np.intp]

_EDGE = {0: 0, 1: 8, 2: 3, 3: 1}  # positions told apart at either end of an axis, by number of axes


@lru_cache(maxsize=4096)
def _axis(size: int, edge: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Representative coordinates of one axis, and how many real ones each stands for."""
    if size <= 2 * edge + 1:
        return tuple(range(size)), (1,) * size
    ends = (1,) * edge
    coordinates = (*range(edge), size // 2, *range(size - edge, size))
    return coordinates, (*ends, size - 2 * edge, *ends)


@dataclass(frozen=True)
class Grid:
    """The cells of a map of ``sizes`` elements: exact near the edges, where zero padding shows, one cell inside.

    A convolution reads beyond the edge only within half a kernel of it, and a few layers later that is still felt
    only a few positions further in. An axis of up to seven positions (in two dimensions) is kept as it is.
    """

    sizes: tuple[int, ...] = ()

    @property
    def edge(self) -> int:
        """How many positions at either end of an axis are cells of their own."""
        return _EDGE.get(len(self.sizes), 1)

    @cached_property
    def axes(self) -> tuple[tuple[int, ...], ...]:
        """Per axis, the coordinate that represents each cell."""
        return tuple(_axis(size, self.edge)[0] for size in self.sizes)

    @cached_property
    def share(self) -> Array:
        """(cells,): the share of all positions that each cell stands for; sums to 1."""
        share = np.ones(1)
        for size in self.sizes:
            share = np.outer(share, np.asarray(_axis(size, self.edge)[1], float) / size).reshape(-1)
        return share

    @property
    def cells(self) -> int:
        return math.prod(len(axis) for axis in self.axes)

    @property
    def positions(self) -> int:
        return math.prod(self.sizes)

    def lookup(self, coordinates: Sequence[Sequence[Sequence[int]]]) -> Indices:
        """The cells at the coordinates of a product of windows.

        Args:
            coordinates: per axis, for each output cell, the coordinates of its window's taps.

        Returns:
            (output cells, taps): flat indices, or ``cells`` where a coordinate lies outside of the map.
        """
        per_axis = [
            np.array([[self._cell(axis, c) for c in taps] for taps in windows], dtype=np.intp)
            for axis, windows in enumerate(coordinates)
        ]
        lengths = [len(axis) for axis in self.axes]
        index, valid = np.zeros((1, 1), dtype=np.intp), np.ones((1, 1), dtype=bool)
        for table, length in zip(per_axis, lengths, strict=True):
            rows = len(index)
            index = (index[:, None, :, None] * length + table[None, :, None, :]).reshape(rows * table.shape[0], -1)
            valid = (valid[:, None, :, None] & (table >= 0)[None, :, None, :]).reshape(rows * table.shape[0], -1)
        return np.where(valid, index, self.cells)

    def _cell(self, axis: int, coordinate: int) -> int:
        size, edge = self.sizes[axis], self.edge
        if not 0 <= coordinate < size:
            return -1
        if size <= 2 * edge + 1 or coordinate < edge:
            return coordinate
        return edge + 1 + coordinate - (size - edge) if coordinate >= size - edge else edge


@dataclass(frozen=True)
class Window:
    """A sliding window: for each output position, the input positions that it reads.

    Attributes:
        inputs: sizes of the map that it reads.
        outputs: sizes of the map that it makes.
        kernel, stride, dilation: per axis.
        before: per axis, how far the first window begins in front of the map.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def table(self) -> Indices:
        """(output cells, taps): input cells, or the number of input cells where a tap meets padding."""
        return _window_table(self)

    @property
    def coverage(self) -> Array:
        """(output cells, taps): of the real positions that a cell stands for, the share whose tap is on the map.

        Only where a window reaches further than the cells at an edge does this differ from what ``table`` shows.
        """
        return _window_coverage(self)

    @property
    def offsets(self) -> list[tuple[int, ...]]:
        """Per tap, in storage order, where it reads relative to the first one."""
        spans = (range(0, k * d, d) for k, d in zip(self.kernel, self.dilation, strict=True))
        return list(itertools.product(*spans))


@lru_cache(maxsize=1024)
def _window_coverage(window: Window) -> Array:
    target = Grid(window.outputs)
    coverage = np.ones((1, 1))
    for axis, (size, length, k, s, d, b) in enumerate(
        zip(window.inputs, window.outputs, window.kernel, window.stride, window.dilation, window.before, strict=True)
    ):
        reads = np.arange(length)[:, None] * s - b + np.arange(k) * d
        valid = ((reads >= 0) & (reads < size)).astype(float)
        edge = target.edge
        if length > 2 * edge + 1:
            middle = valid[edge : length - edge].mean(axis=0, keepdims=True)
            valid = np.concatenate([valid[:edge], middle, valid[length - edge :]])
        assert len(valid) == len(target.axes[axis])
        rows, taps = coverage.shape
        coverage = (coverage[:, None, :, None] * valid[None, :, None, :]).reshape(rows * len(valid), taps * k)
    return coverage


@lru_cache(maxsize=1024)
def _window_table(window: Window) -> Indices:
    source, target = Grid(window.inputs), Grid(window.outputs)
    coordinates = [
        [[o * s - b + t * d for t in range(k)] for o in cells]
        for cells, k, s, d, b in zip(
            target.axes, window.kernel, window.stride, window.dilation, window.before, strict=True
        )
    ]
    return source.lookup(coordinates)
