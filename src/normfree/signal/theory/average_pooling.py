"""Means over positions."""

from __future__ import annotations

import math

import numpy as np

from .grid import Grid, Window
from .linear import window_of
from .offsets import offsets_between, offsets_of, window_shape
from .rules import Call, NoRule, regrid, rules
from .spread import averaged_over
from .state import State


def averaged(state: State, window: Window, count_padding: bool) -> State:
    """A mean over windows: the same filter on every channel, so that neighbours' covariances add up.

    K'(p, p') = Σ_tt' a_t a_t' K(p + t, p' + t') and the same for W, whose sum over a window of uncorrelated
    positions is w / taps, and w itself if all are one.
    """
    table, source, target = window.table, state.grid, Grid(window.outputs)
    valid = table < source.cells
    count = np.full(len(table), float(window.taps)) if count_padding else np.maximum(valid.sum(axis=1), 1)
    weights = valid / count[:, None]
    matrix = np.zeros((target.cells, source.cells + 1))
    np.add.at(matrix, (np.arange(target.cells)[:, None], table), weights)
    matrix = matrix[:, :-1]
    mean, cross = matrix @ state.mean, matrix @ state.cross @ matrix.T
    steps = np.array(window.offsets)
    difference = steps[None, :, :] - steps[:, None, :]
    deviations = weights * np.sqrt(np.append(state.within, 0.0)[table])
    within = np.einsum("pt,ts,ps->p", deviations, state.near_at(difference), deviations)
    level = state.near_at(difference).sum()
    near = [
        state.near_at(difference + np.array(offset) * np.array(window.stride)).sum() / max(level, 1e-300)
        for offset in offsets_of(target)
    ]
    far = state.far * float(window.taps) ** 2 / max(level, 1e-300)
    shape = state.standardised() if window.taps == 1 else None
    shaped = np.array(near).reshape(window_shape(target))
    before, after = state.average_variance, float(target.share @ (np.diagonal(cross) + within))
    spread = None
    if state.spread is not None and before > 0.0 and after > 0.0:
        offsets, counts, shifts = offsets_between(window)
        spread = averaged_over(state.spread, counts, offsets, shifts, window.taps, after / before)
        spread = spread.laid_out(shaped.shape)
    return State(target, mean, cross, within, shaped, float(far), shape, spread=spread)


def global_average(state: State) -> State:
    """The mean over all positions: (N, C)."""
    share = state.grid.share
    within = float(share @ np.sqrt(state.within)) ** 2 * state.pooled_near()
    return State(
        Grid(()),
        np.array([share @ state.mean]),
        np.array([[share @ state.cross @ share]]),
        np.array([within]),
        np.ones(()),
    )


@rules("avg_pool2d", "avg_pool1d", "avg_pool3d")
def avg_pool(call: Call) -> State:
    x = call.args[0]
    window = window_of(call, x, call.args[1], call.argument(2, "stride"), call.argument(3, "padding", 0))
    count_padding = bool(call.argument(5, "count_include_pad", True)) and any(window.before)
    state = call.state(x, window.inputs)
    call.flow(x, 1.0 / window.taps)
    return averaged(state, window, count_padding)


@rules("adaptive_avg_pool2d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d")
def adaptive_avg_pool(call: Call) -> State:
    x = call.args[0]
    dims = x.ndim - 2
    inputs, outputs = tuple(x.shape[-dims:]), tuple(call.result.shape[-dims:])
    state = call.state(x, inputs)
    if inputs == outputs:
        return state
    call.flow(x, math.prod(outputs) / math.prod(inputs))
    if math.prod(outputs) == 1:
        return regrid(global_average(state), outputs)
    if any(m > n for n, m in zip(inputs, outputs, strict=True)):
        return regrid(state, outputs)  # positions are repeated, at most two of them averaged
    kernel = tuple(-(-n // m) for n, m in zip(inputs, outputs, strict=True))
    stride = tuple(max(n // m, 1) for n, m in zip(inputs, outputs, strict=True))
    return averaged(state, Window(inputs, outputs, kernel, stride, (1,) * dims, (0,) * dims), False)


@rules("mean")
def mean(call: Call) -> State:
    """Over all positions: global pooling. Over channels: a number that is the same for all examples."""
    x = call.args[0]
    dims = call.argument(1, "dim")
    dims = list(range(x.ndim)) if not dims else [dim % x.ndim for dim in dims]
    channel = call.axis_of(x) % x.ndim
    state = call.state(x)
    if dims == [channel]:
        return State(
            state.grid, state.mean, np.zeros_like(state.cross), np.zeros_like(state.within), state.near, state.far
        )
    positions = [axis for axis in range(1, x.ndim) if axis != channel]
    if sorted(dims) != positions:
        raise NoRule("it is a mean over some of the positions")
    call.flow(x, 1.0 / state.grid.positions)
    pooled = global_average(state)
    return regrid(pooled, (1,) * len(positions)) if call.argument(2, "keepdim", False) else pooled
