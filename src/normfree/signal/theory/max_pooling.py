"""Maxima over positions."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .grid import Array, Grid, Indices, Window
from .linear import window_of
from .normal import log_ndtr, ndtri_exp
from .offsets import offsets_between, offsets_of, window_shape
from .quadrature import HERMITE, NODES, WEIGHTS, standardise, weighted_quantiles
from .rules import Call, NoRule, regrid, rules
from .spread import Spread, at_offsets, averaged_over
from .state import State


@rules("max_pool2d_with_indices", "max_pool2d", "max_pool3d_with_indices", "max_pool1d_with_indices")
def max_pool(call: Call) -> State:
    x = call.args[0]
    padding = call.argument(3, "padding", 0)
    window = window_of(call, x, call.args[1], call.argument(2, "stride"), padding, call.argument(4, "dilation", 1))
    raw = call.raw_state(x)
    assert raw is not None
    if raw.padding:  # −∞ around the map: as good as the operator's own padding
        before = tuple(low + own for (low, _), own in zip(raw.padding, window.before, strict=True))
        inner = raw.grid.sizes
        window = Window(inner, window.outputs, window.kernel, window.stride, window.dilation, before)
        state = raw
    else:
        state = call.state(x, window.inputs)
    # a position that two windows share gets the gradients of both; each window hands on its own whole
    call.flow(x, 1.0)
    return maximum(state, window)


def maximum(state: State, window: Window) -> State:
    """The largest of each window.

    The window's n valid positions are taken as exchangeable: latents √ρ u + √(1 − ρ) e_i with ρ their average
    correlation, of which the largest is √ρ u + √(1 − ρ) e, with P(e < t) = Φ(t)^n. What two examples share of u is
    K' (exactly: the covariance of the conditional means given u); windows that overlap share the elements in
    common. An increasing function commutes with the maximum, so that the distribution's quantiles carry over.
    """
    table, source, target = window.table, state.grid, Grid(window.outputs)
    valid = table < source.cells
    count = np.maximum(valid.sum(axis=1), 1)
    values = np.concatenate([_increasing(state), np.zeros((1, len(NODES)))])
    curves = _as_if_alike(values, table, valid)
    steps = np.array(window.offsets)
    difference = steps[None, :, :] - steps[:, None, :]
    same, across = _latent_levels(state, difference)
    correlation = min(max(same, 0.0), 1.0)
    shared = min(max(across, 0.0) / correlation, 1.0) if correlation > 1e-9 else 0.0
    mean, variance, common = np.empty(target.cells), np.empty(target.cells), np.empty(target.cells)
    shapes: list[Array] = []
    pairs = {}
    for cell, (n, curve) in enumerate(zip(count, curves, strict=True)):
        key = (int(n), curve.tobytes())
        if key not in pairs:
            pairs[key] = _largest(curve, int(n), correlation)
        mean[cell], variance[cell], conditional, sample = pairs[key]
        coefficients = conditional @ HERMITE
        squares = coefficients**2
        squares[0] = 0.0
        common[cell] = float(np.polynomial.polynomial.polyval(shared, squares))
        shapes.append(sample)
    deviation = np.sqrt(np.maximum(common, 0.0))
    cross = np.outer(deviation, deviation)
    scattered = _scattered_mean(state, window, curves[int(np.argmax(target.share))])
    cross += scattered
    common = common + scattered
    within = np.maximum(variance - common, 0.0)
    near, far = _overlap(state, window, target, variance, common, pairs, correlation)
    shape = standardise(target.share @ np.array(shapes))
    inside = curves[int(np.argmax(target.share))]
    spread = _spread_of_maximum(state, window, inside, correlation, near.shape)
    return State(target, mean, cross, within, near, far, shape, spread=spread)


def _spread_of_maximum(
    state: State, window: Window, curve: Array, correlation: float, shape: tuple[int, ...]
) -> Spread | None:
    """The scatter of kernels behind a maximum, and the part of it that all channels have in common.

    The mean of the largest of a window follows the average of v̂ over the window, by ∂m/∂ln v, and the correlations
    between its positions that the input at hand happens to have, by the slope that :func:`_scattered_mean` uses. Each
    of the n positions is the largest with probability 1/n: to first order K̂' is the mean of K̂ over pairs of them.
    """
    if state.spread is None:
        return None
    offsets, counts, shifts = offsets_between(window)
    step = 0.02
    variance = _largest(curve, window.taps, correlation)[1]
    wider = [_largest(curve, window.taps, correlation, 1.0 + sign * step) for sign in (-1.0, 1.0)]
    # ln v changes by twice the relative stretch of the latent
    steeper = (wider[1][0] - wider[0][0]) / (4.0 * step)
    response = (wider[1][1] - wider[0][1]) / (4.0 * step) / max(variance, 1e-30)
    level = variance / max(state.average_variance, 1e-30)
    norms = (at_offsets(state.spread.norms, offsets[None] + shifts[:, None]) * counts).sum(axis=1) / window.taps**2
    smooth = _scattered_mean(state, window, curve)
    alike = norms / max(float(norms.max(initial=0.0)), 1e-30)
    common = (steeper**2 * norms + smooth * alike**2) / max(variance, 1e-30)
    pairs = averaged_over(state.spread, counts, offsets, shifts, window.taps, level).pairs
    return Spread(pairs, response**2 * norms, common).laid_out(shape)


def _scattered_mean(state: State, window: Window, curve: Array) -> float:
    """Variance over channels of the mean of the largest, because filters of a small fan-in differ in smoothness.

    The neighbours' correlation of a channel's own output scatters about its average (``scatter``), and the mean of
    the largest falls as it grows: the variance is the slope squared times that of the window's average correlation.
    """
    if state.scatter is None or window.taps == 1:
        return 0.0
    steps = np.array(window.offsets)
    offsets = (steps[None, :, :] - steps[:, None, :]).reshape(-1, steps.shape[1])
    _, counts = np.unique(offsets, axis=0, return_counts=True)
    unique = np.unique(offsets, axis=0)
    pairs = window.taps * (window.taps - 1)
    variance = 0.0
    for offset, count in zip(unique, counts, strict=True):
        if offset.any():
            index = tuple(int(d) + n // 2 for d, n in zip(offset, state.scatter.shape, strict=True))
            inside = all(0 <= i < n for i, n in zip(index, state.scatter.shape, strict=True))
            # an offset and its opposite are one correlation
            variance += 2.0 * (count / pairs) ** 2 * (float(state.scatter[index]) if inside else 0.0)
    step = 0.02
    slope = (_largest(curve, window.taps, step)[0] - _largest(curve, window.taps, 0.0)[0]) / step
    return variance * slope**2


def _as_if_alike(values: Array, table: Indices, valid: NDArray[np.bool_]) -> Array:
    """(output cells, nodes): the distribution of which the largest of a window is that of its n own ones.

    Independent values with distribution functions F_i have a largest with Π F_i, which is F^n for their geometric
    mean F: near an edge, where zero padding takes variance away, positions differ.
    """
    curves = np.empty((len(table), values.shape[1]))
    seen: dict[bytes, Array] = {}
    for cell, (row, inside) in enumerate(zip(table, valid, strict=True)):
        kinds, counts = np.unique(row[inside], return_counts=True)
        key = kinds.tobytes() + counts.tobytes()
        if key not in seen:
            members = values[kinds] if len(kinds) else np.zeros((1, values.shape[1]))
            shares = counts / counts.sum() if len(kinds) else np.ones(1)
            if np.ptp(members, axis=0).max() <= 1e-9 * (1.0 + np.abs(members).max()):
                seen[key] = members[0]
            else:
                levels = np.sort(members.reshape(-1))
                above = levels + 1e-9 * (1.0 + np.abs(levels))  # a plateau is below its right end
                log_share = sum(
                    share * log_ndtr(np.interp(above, member, NODES))
                    for share, member in zip(shares, members, strict=True)
                )
                latent = np.maximum.accumulate(ndtri_exp(np.asarray(log_share)))
                seen[key] = np.interp(NODES, latent, levels)
        curves[cell] = seen[key]
    return curves


def _increasing(state: State) -> Array:
    values = state.values
    if (np.diff(values, axis=1) >= -1e-9).all():
        return values
    return np.stack([weighted_quantiles(row, WEIGHTS) for row in values])


def _latent_levels(state: State, difference: Array) -> tuple[float, float]:
    """Average correlation of a window's latents, and that of two examples' latents."""
    latent = state.latent
    taps = len(difference)
    across = float(state.grid.share @ np.diagonal(latent.cross))
    if taps == 1:
        return across, across
    stand_in = State(state.grid, state.mean, state.cross, state.within, latent.near, latent.far)
    near = stand_in.near_at(difference)
    return float((near.sum() - np.trace(near)) / (taps * (taps - 1))), across


@lru_cache(maxsize=256)
def _top(count: int) -> Array:
    """The latent's quantiles of the largest of so many independent ones: Φ(top)^count = Φ(node)."""
    return ndtri_exp(log_ndtr(NODES) / count)


def _largest(curve: Array, n: int, correlation: float, stretch: float = 1.0) -> tuple[float, float, Array, Array]:
    """Mean, variance, conditional means given u at the nodes, and quantiles of the largest of n.

    ``stretch`` multiplies the latents.
    """
    top = _top(n)
    if correlation < 1e-9:
        values = np.interp(stretch * top, NODES, curve)
        average = float(WEIGHTS @ values)
        return average, float(WEIGHTS @ (values - average) ** 2), np.full(len(NODES), average), values
    z = np.sqrt(correlation) * NODES[:, None] + np.sqrt(1.0 - correlation) * top[None, :]
    values = np.interp(stretch * z, NODES, curve)
    conditional = values @ WEIGHTS
    average = float(WEIGHTS @ conditional)
    variance = float(WEIGHTS @ ((values - average) ** 2 @ WEIGHTS))
    coarse = values[::4, ::4]
    weights = np.outer(WEIGHTS[::4], WEIGHTS[::4])
    return average, variance, conditional, weighted_quantiles(coarse.reshape(-1), weights.reshape(-1) / weights.sum())


def _overlap(
    state: State, window: Window, target: Grid, variance: Array, common: Array, pairs: Any, correlation: float
) -> tuple[Array, float]:
    """Excess correlation of neighbouring maxima: through u, and through the elements that both windows hold."""
    total = float(target.share @ variance)
    across = float(target.share @ common)
    own = max(total - across, 1e-30)
    spread = max((float(WEIGHTS @ (c - WEIGHTS @ c) ** 2) for _, _, c, _ in pairs.values()), default=0.0)
    through_u = max(spread - across, 0.0)
    values = []
    for offset in offsets_of(target):
        held = 1
        for d, k, s, spread_ in zip(offset, window.kernel, window.stride, window.dilation, strict=True):
            shift = abs(d) * s
            held *= max(k - shift // spread_, 0) if shift % spread_ == 0 else 0
        share = _overlap_correlation(window.taps, held)
        values.append((through_u + share * max(own - through_u, 0.0)) / own)
    return np.array(values).reshape(window_shape(target)), through_u / own


def _overlap_correlation(n: int, held: int) -> float:
    """Correlation of the maxima of two sets of n independent normals that have ``held`` in common."""
    if held == n:
        return 1.0
    if held == 0:
        return 0.0

    common, rest = _top(held), _top(n - held)
    conditional = np.maximum(common[:, None], rest[None, :]) @ WEIGHTS
    whole = _top(n)
    average = WEIGHTS @ whole
    return float((WEIGHTS @ conditional**2 - average**2) / (WEIGHTS @ whole**2 - average**2))


@rules("amax")
def amax(call: Call) -> State:
    x = call.args[0]
    state = call.state(x)
    dims = sorted(dim % x.ndim for dim in call.argument(1, "dim", []))
    channel = call.axis_of(x) % x.ndim
    if dims != [axis for axis in range(1, x.ndim) if axis != channel]:
        raise NoRule("it is a maximum over some of the positions")
    return _global_maximum(state)


@rules("adaptive_max_pool2d")
def adaptive_max_pool(call: Call) -> State:
    if math.prod(call.result.shape[2:]) != 1:
        raise NoRule("only global adaptive max-pooling is known")
    return regrid(_global_maximum(call.state(call.args[0])), tuple(call.result.shape[2:]))


def _global_maximum(state: State) -> State:
    flat = regrid(state, ())
    latent = flat.latent
    curve = _increasing(flat)[0]
    across = float(np.clip(latent.cross[0, 0], 0.0, 1.0))
    average, variance, conditional, sample = _largest(curve, state.grid.positions, across)
    spread = float(WEIGHTS @ (conditional - average) ** 2)
    shape = standardise(sample)
    return State(
        Grid(()), np.array([average]), np.array([[spread]]), np.array([variance - spread]), np.ones(()), 0.0, shape
    )
