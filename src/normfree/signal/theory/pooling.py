"""Pooling, resizing, padding, concatenation and attention: what mixes positions or joins channels."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .grid import Array, Grid, Indices, Window
from .linear import _near_many, window_of
from .normal import log_ndtr, ndtri_exp
from .rules import Call, NoRule, regrid, rules
from .spread import Spread, at_offsets, averaged_over
from .state import _HERMITE, _NODES, _WEIGHTS, State, delta, offsets_of, standardise, weighted_quantiles, window_shape

# ---------------------------------------------------------------- averages


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
    within = np.einsum("pt,ts,ps->p", deviations, _near_many(state, difference), deviations)
    level = _near_many(state, difference).sum()
    near = [
        _near_many(state, difference + np.array(offset) * np.array(window.stride)).sum() / max(level, 1e-300)
        for offset in offsets_of(target)
    ]
    far = state.far * float(window.taps) ** 2 / max(level, 1e-300)
    shape = state.standardised() if window.taps == 1 else None
    shaped = np.array(near).reshape(window_shape(target))
    before, after = state.average_variance, float(target.share @ (np.diagonal(cross) + within))
    spread = None
    if state.spread is not None and before > 0.0 and after > 0.0:
        offsets, counts, shifts = _offsets_between(window)
        spread = averaged_over(state.spread, counts, offsets, shifts, window.taps, after / before)
        spread = spread.laid_out(shaped.shape)
    return State(target, mean, cross, within, shaped, float(far), shape, spread=spread)


@lru_cache(maxsize=256)
def _offsets_between(window: Window) -> tuple[Array, Array, Array]:
    """How far apart a window's positions are, how many pairs are, and how far apart windows are, in input pixels."""
    steps = np.array(window.offsets)
    difference = (steps[None, :, :] - steps[:, None, :]).reshape(-1, steps.shape[1])
    offsets, counts = np.unique(difference, axis=0, return_counts=True)
    shifts = np.array(offsets_of(Grid(window.outputs)), float) * np.array(window.stride)
    return offsets.astype(float), counts.astype(float), shifts


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


# ---------------------------------------------------------------- maxima


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
    values = np.concatenate([_increasing(state), np.zeros((1, len(_NODES)))])
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
        coefficients = conditional @ _HERMITE
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
    offsets, counts, shifts = _offsets_between(window)
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
                    share * log_ndtr(np.interp(above, member, _NODES))
                    for share, member in zip(shares, members, strict=True)
                )
                latent = np.maximum.accumulate(ndtri_exp(np.asarray(log_share)))
                seen[key] = np.interp(_NODES, latent, levels)
        curves[cell] = seen[key]
    return curves


def _increasing(state: State) -> Array:
    values = state.values
    if (np.diff(values, axis=1) >= -1e-9).all():
        return values
    return np.stack([weighted_quantiles(row, _WEIGHTS) for row in values])


def _latent_levels(state: State, difference: Array) -> tuple[float, float]:
    """Average correlation of a window's latents, and that of two examples' latents."""
    latent = state.latent
    taps = len(difference)
    across = float(state.grid.share @ np.diagonal(latent.cross))
    if taps == 1:
        return across, across
    stand_in = State(state.grid, state.mean, state.cross, state.within, latent.near, latent.far)
    near = _near_many(stand_in, difference)
    return float((near.sum() - np.trace(near)) / (taps * (taps - 1))), across


@lru_cache(maxsize=256)
def _top(count: int) -> Array:
    """The latent's quantiles of the largest of so many independent ones: Φ(top)^count = Φ(node)."""
    return ndtri_exp(log_ndtr(_NODES) / count)


def _largest(curve: Array, n: int, correlation: float, stretch: float = 1.0) -> tuple[float, float, Array, Array]:
    """Mean, variance, conditional means given u at the nodes, and quantiles of the largest of n.

    ``stretch`` multiplies the latents.
    """
    top = _top(n)
    if correlation < 1e-9:
        values = np.interp(stretch * top, _NODES, curve)
        average = float(_WEIGHTS @ values)
        return average, float(_WEIGHTS @ (values - average) ** 2), np.full(len(_NODES), average), values
    z = np.sqrt(correlation) * _NODES[:, None] + np.sqrt(1.0 - correlation) * top[None, :]
    values = np.interp(stretch * z, _NODES, curve)
    conditional = values @ _WEIGHTS
    average = float(_WEIGHTS @ conditional)
    variance = float(_WEIGHTS @ ((values - average) ** 2 @ _WEIGHTS))
    coarse = values[::4, ::4]
    weights = np.outer(_WEIGHTS[::4], _WEIGHTS[::4])
    return average, variance, conditional, weighted_quantiles(coarse.reshape(-1), weights.reshape(-1) / weights.sum())


def _overlap(
    state: State, window: Window, target: Grid, variance: Array, common: Array, pairs: Any, correlation: float
) -> tuple[Array, float]:
    """Excess correlation of neighbouring maxima: through u, and through the elements that both windows hold."""
    total = float(target.share @ variance)
    across = float(target.share @ common)
    own = max(total - across, 1e-30)
    spread = max((float(_WEIGHTS @ (c - _WEIGHTS @ c) ** 2) for _, _, c, _ in pairs.values()), default=0.0)
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
    conditional = np.maximum(common[:, None], rest[None, :]) @ _WEIGHTS
    whole = _top(n)
    average = _WEIGHTS @ whole
    return float((_WEIGHTS @ conditional**2 - average**2) / (_WEIGHTS @ whole**2 - average**2))


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
    spread = float(_WEIGHTS @ (conditional - average) ** 2)
    shape = standardise(sample)
    return State(
        Grid(()), np.array([average]), np.array([[spread]]), np.array([variance - spread]), np.ones(()), 0.0, shape
    )


# ---------------------------------------------------------------- padding, resizing, joining


@rules("constant_pad_nd", "pad")
def constant_pad(call: Call) -> State:
    x, pads = call.args[0], list(call.args[1])
    value = float(call.argument(2, "value", 0.0) or 0.0)
    if not any(pads):
        return identity_of(call)
    dims = x.ndim - 2
    pads += [0] * (2 * dims - len(pads))
    per_axis = [(pads[2 * (dims - 1 - axis)], pads[2 * (dims - 1 - axis) + 1]) for axis in range(dims)]
    inputs, outputs = tuple(x.shape[2:]), tuple(call.result.shape[2:])
    if len(pads) > 2 * dims or x.ndim != call.result.ndim:
        raise NoRule("it pads channels or examples")
    state = call.state(x, inputs)
    call.flow(x, 1.0)
    if value == -math.inf:
        return State(
            state.grid, state.mean, state.cross, state.within, state.near, state.far, state.standardised(),
            padding=tuple(per_axis),
        )  # fmt: skip
    if value != 0.0:
        raise NoRule(f"it pads with {value}")
    ones = (1,) * dims
    return averaged(state, Window(inputs, outputs, ones, ones, ones, tuple(low for low, _ in per_axis)), True)


@rules("reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d",
       "replication_pad3d", "_pad_circular")  # fmt: skip
def valid_pad(call: Call) -> State:
    """Padding with values of the map itself: every position stays what it was, and an edge is no edge any more."""
    x = call.args[0]
    call.flow(x, 1.0)
    return regrid(call.state(x, x.shape[2:]), tuple(call.result.shape[2:]))


@rules("upsample_nearest2d", "upsample_nearest1d", "upsample_nearest3d", "upsample_bilinear2d",
       "_upsample_bilinear2d_aa", "upsample_bicubic2d")  # fmt: skip
def upsample(call: Call) -> State:
    """Nearest: copies. Bilinear: a mean of two neighbours per axis, of variance 2/3 on average if uncorrelated."""
    x = call.args[0]
    inputs, outputs = tuple(x.shape[2:]), tuple(call.result.shape[2:])
    state = regrid(call.state(x, inputs), outputs)
    ratio = [m / n for n, m in zip(inputs, outputs, strict=True)]
    source = call.state(x, inputs)
    nearest = "nearest" in call.func._schema.name
    if not nearest and ("bilinear" not in call.func._schema.name or min(ratio) < 1.0):
        raise NoRule("only nearest and bilinear enlargement are known")
    near = []
    for offset in offsets_of(state.grid):
        near.append(math.prod(_resized_near(d / r, nearest) for d, r in zip(offset, ratio, strict=True)))
    level = math.prod(_resized_near(0.0, nearest) for _ in ratio)
    values = np.array(near).reshape(window_shape(state.grid)) / level
    call.flow(x, math.prod(ratio) * level)
    return state.with_moments(state.mean, state.cross, state.within * level, near=values, far=source.far)


def _resized_near(distance: float, nearest: bool) -> float:
    """Covariance of two interpolated values at a distance in source pixels, for uncorrelated source pixels."""
    distance = abs(distance)
    if nearest:
        return max(1.0 - distance, 0.0)
    if distance >= 2.0:
        return 0.0
    # the autocorrelation of the triangle: a cubic B-spline
    return 2.0 / 3.0 - distance**2 + distance**3 / 2.0 if distance < 1.0 else (2.0 - distance) ** 3 / 6.0


@rules("cat")
def cat(call: Call) -> State:
    """Channels side by side: uncentred moments are averaged, each with its share of the channels."""
    tensors = call.args[0]
    dim = call.argument(1, "dim", 0) % tensors[0].ndim
    states = [call.raw_state(tensor) for tensor in tensors]
    if any(state is None for state in states):
        known = [state for state in states if state is not None]
        if not known:
            raise NoRule("none of its inputs is known")
        return regrid(known[-1], call.sizes(call.result))
    if dim != call.axis_of(tensors[0]) % tensors[0].ndim:
        if dim == 0:
            raise NoRule("it joins examples")
        largest = max(tensors, key=lambda tensor: tensor.numel())
        return regrid(call.state(largest), call.sizes(call.result))
    shares = [tensor.shape[dim] / call.result.shape[dim] for tensor in tensors]
    for tensor, share in zip(tensors, shares, strict=True):
        call.flow(tensor, share)
    return joined([call.state(tensor) for tensor in tensors], shares)


def joined(states: list[State], shares: list[float]) -> State:
    """Channels of several activations side by side."""
    first = states[0]
    if any(state.grid.sizes != first.grid.sizes for state in states):
        raise NoRule("it joins maps of different sizes")
    pairs = list(zip(shares, states, strict=True))
    mean = np.asarray(sum(share * state.mean for share, state in pairs))
    uncentred = sum(share * (state.cross + np.outer(state.mean, state.mean)) for share, state in pairs)
    within = np.asarray(sum(share * state.within for share, state in pairs))
    levels = [share * float(state.grid.share @ state.within) for share, state in pairs]
    total = max(sum(levels), 1e-30)
    near = sum(level * state.near for level, state in zip(levels, states, strict=True)) / total
    far = sum(level * state.far for level, state in zip(levels, states, strict=True)) / total
    values = np.concatenate([state.grid.share @ state.values for state in states])
    weights = np.concatenate([share * _WEIGHTS for share in shares])
    return State(
        first.grid, mean, uncentred - np.outer(mean, mean), within, np.asarray(near), float(far),
        standardise(weighted_quantiles(values, weights)),
    )  # fmt: skip


# ---------------------------------------------------------------- attention


@rules("bmm", "baddbmm")
def bmm(call: Call) -> State:
    """Attention: scores from queries and keys, or a mean of values with the softmax's weights.

    A score Σ_d q_d k_d of independent queries and keys has variance d E[q²] E[k²] and is taken as Gaussian; the
    theory stops where scores are so spread out that single positions are picked.
    """
    left, right = call.args[-2:] if call.func._schema.name == "aten::bmm" else call.args[1:3]
    if not (call.is_activation(left) and call.is_activation(right)):
        raise NoRule("it multiplies activations by a parameter along positions")
    first, second = call.raw_state(left), call.raw_state(right)
    assert first is not None
    assert second is not None
    if first.simplex is not None:
        return attended(second, first.simplex, left.shape[-1])
    variance = left.shape[-1] * first.second_moment * second.second_moment
    return State.noise(()).scaled(math.sqrt(variance))


@rules("_softmax", "_safe_softmax", "softmax")
def softmax(call: Call) -> State:
    """Weights e^s / Σ e^s of T scores of variance τ²: their squares sum to e^(τ²) / T, at most 1."""
    x = call.args[0]
    state = call.raw_state(x)
    assert state is not None
    count = x.shape[call.argument(1, "dim", -1)]
    simplex = min(math.exp(min(state.average_variance, 50.0)), float(count))
    result = State.constant(1.0 / count, ())
    result.simplex = simplex
    return result


@rules("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu",
       "_scaled_dot_product_efficient_attention", "_scaled_dot_product_flash_attention")  # fmt: skip
def fused_attention(call: Call) -> State:
    query, key, value = call.args[:3]
    q, k, v = call.raw_state(query), call.raw_state(key), call.raw_state(value)
    if q is None or k is None or v is None:
        raise NoRule("one of its inputs is not known")
    scale = call.kwargs.get("scale") or query.shape[-1] ** -0.5
    variance = query.shape[-1] * q.second_moment * k.second_moment * scale**2
    count = key.shape[-2]
    return attended(v, min(math.exp(min(variance, 50.0)), float(count)), count)


def attended(values: State, simplex: float, count: int) -> State:
    """Means of the values with weights whose squares sum to ``simplex / count``."""
    share = values.grid.share
    ones = np.ones(values.grid.cells)
    pooled = values.pooled_near()
    level = float(share @ values.within)
    own = pooled + (1.0 - pooled) * simplex / max(count, 1)
    near = np.where(delta(values.grid) == 1.0, 1.0, pooled / max(own, 1e-30))
    return State(
        values.grid,
        float(share @ values.mean) * ones,
        np.full((values.grid.cells,) * 2, float(share @ values.cross @ share)),
        level * own * ones,
        near,
        pooled / max(own, 1e-30),
    )


def identity_of(call: Call) -> State:
    state = call.raw_state(call.args[0])
    assert state is not None
    call.flow(call.args[0], 1.0)
    return state
