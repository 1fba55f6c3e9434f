"""Convolutions and matrix products with weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from .grid import Array, Grid, Indices, Window
from .offsets import offsets_of, window_shape
from .rules import Call, NoRule, rules
from .spread import Spread, at_offsets, middle, nothing
from .state import State
from .weights import WeightMoments, of_declared, of_tensor


def through_window(state: State, window: Window, weight: WeightMoments) -> tuple[State, float]:
    """A convolution: every output channel is a weighted sum over channels and taps; zeros beyond the edge.

    With A, B and b of the weight (see :mod:`.weights`), the taps' input cells p + t, and everything that lies outside
    of the map left out of the sums,

        m'(p)     = Σ_t b_t m(p + t)
        K'(p, p') = Σ_tt' A_tt' K(p + t, p' + t') + B_tt' m(p + t) m(p' + t') − m'(p) m'(p')
        W'(p, p') = Σ_tt' A_tt' W(p + t, p' + t').

    For independent weights A is diagonal: correlations are not widened, only looked at ``stride`` apart.

    Returns:
        The output, and the mean over positions of Σ_t A_tt over valid taps: what the weights of one output square up
        to, which is the share of the gradient that goes back.
    """
    if window.taps == 1 and window.inputs == window.outputs and not any(window.before):
        return _pointwise(state, weight)
    table = window.table
    source, target = state.grid, Grid(window.outputs)
    taps = weight.taps
    padded = np.zeros((source.cells + 1, source.cells + 1))
    padded[:-1, :-1] = state.cross
    coverage = window.coverage
    root = np.sqrt(coverage)
    mean_in = np.append(state.mean, 0.0)[table] * coverage  # (cells, taps)
    mean = mean_in @ weight.mean
    within_in = np.append(state.within, 0.0)[table] * coverage
    cross = np.zeros((target.cells, target.cells))
    near_in = state.near
    if weight.pairs.ndim == 1:
        if state.cross.any():
            for tap, square in enumerate(taps):
                cross += square * np.outer(root[:, tap], root[:, tap]) * padded[np.ix_(table[:, tap], table[:, tap])]
        within = within_in @ taps
        near, far = _strided_near(near_in, state, target, window.stride)
    else:
        if state.cross.any():
            for one, two in itertools.product(range(len(taps)), repeat=2):
                cross += weight.pairs[one, two] * padded[np.ix_(table[:, one], table[:, two])]
        near, far, gain = _mixed_near(state, target, window, weight.pairs)
        within = within_in @ taps * (gain / max(float(taps.sum()), 1e-300))
    cross += mean_in @ weight.sums @ mean_in.T - np.outer(mean, mean)
    if state.spread is not None and state.spread.common.any():
        within = within + _common_part(state, window, weight)
    scatter = _scatter(target, window, weight.channels)
    valid = coverage @ taps
    result = State(
        target,
        mean + weight.bias_mean,
        cross + weight.bias_variance,
        np.maximum(within, 0.0),
        near,
        far,
        scatter=scatter,
        spread=read(state, window, weight),
    )
    return result, float(target.share @ valid)


def _pointwise(state: State, weight: WeightMoments) -> tuple[State, float]:
    """The same where every position is read by itself."""
    square, sums, mean = float(weight.taps[0]), float(weight.sums[0, 0]), state.mean * float(weight.mean[0])
    cross = square * state.cross + weight.bias_variance
    if state.mean.any():
        cross += sums * np.outer(state.mean, state.mean) - np.outer(mean, mean)
    within = square * state.within
    if state.spread is not None:
        removed = (square - sums) * middle(state.spread.common) * state.average_variance
        within = np.maximum(within - removed, 0.0)
    window = Window(*(state.grid.sizes,) * 2, *((1,) * len(state.grid.sizes),) * 3, (0,) * len(state.grid.sizes))
    spread = read(state, window, weight)
    return State(state.grid, mean + weight.bias_mean, cross, within, state.near, state.far, spread=spread), square


def _common_part(state: State, window: Window, weight: WeightMoments) -> Array:
    """(output cells,): what the common part of all channels adds to W' through B in place of A."""
    assert state.spread is not None
    steps = np.array(window.offsets)
    between = at_offsets(state.spread.common, steps[None, :, :] - steps[:, None, :])
    own = np.diag(weight.pairs) if weight.pairs.ndim == 1 else weight.pairs
    difference = (weight.sums - own) * between * state.average_variance
    coverage = window.coverage
    return ((coverage @ difference) * coverage).sum(axis=1)


def read(state: State, window: Window, weight: WeightMoments) -> Spread | None:
    """The scatter of the kernels that a layer makes of C channels through T taps (see :mod:`.spread`).

    Independent channels add to what the input brings (:meth:`.State.sampling`). The taps average: Q'(d) =
    Σ_tt' a_t a_t' Q(d + t' − t), with a_t = A_tt / Σ A. Of the mean over channels a share Σ B / Σ A of its square is
    passed on, none of it by rows that sum to zero, and what scatters is x − m + √share · m: a site's own mean over
    channels, whose variance is ``common``, goes along with it.
    """
    total = float(weight.taps.sum())
    if not weight.channels or total <= 0.0 or len(window.outputs) != len(state.near.shape):
        return None
    before = state.spread or nothing(state.near.shape)
    passed = float(np.clip(weight.sums.sum() / total, 0.0, 1.0))
    mean = float(state.grid.share @ state.mean) * math.sqrt(passed)
    level = state.average_variance
    if not level > 0.0:
        return None
    part = level / (level + mean**2)
    pairs, norms = state.sampling(mean)
    common = np.maximum(before.common, 0.0) * part * (1.0 - part)
    brought_pairs = part**2 * before.pairs + 2.0 * common
    brought_norms = part**2 * before.norms + 4.0 * common
    brought_norms = brought_norms + 4.0 * part * np.sqrt(np.maximum(before.norms, 0.0) * common)
    channels, groups = weight.channels, weight.groups
    share = weight.taps / total
    shape = window_shape(Grid(window.outputs))
    if window.taps == 1 and shape == pairs.shape and all(step == 1 for step in window.stride):

        def through(values: Array) -> Array:
            return values
    else:
        reached, place = _read_geometry(window)
        together = np.bincount(place, np.outer(share, share).reshape(-1))

        def through(values: Array) -> Array:
            return (at_offsets(values, reached) @ together).reshape(shape)

    sampled = through(pairs / channels)
    own = middle(sampled) * (1.0 - 1.0 / groups)
    own += 0.5 * weight.norm_scatter - float(share @ share) / channels
    return Spread(
        through(brought_pairs) + sampled / groups,
        through(brought_norms + norms / (channels * groups)),
        np.zeros(shape),
        own,
    )


@lru_cache(maxsize=1024)
def _read_geometry(window: Window) -> tuple[Array, Indices]:
    """Input offsets behind every output offset and difference of taps, and which difference each pair of taps has."""
    steps = np.array(window.offsets)
    difference = (steps[None, :, :] - steps[:, None, :]).reshape(-1, steps.shape[1])
    offsets, place = np.unique(difference, axis=0, return_inverse=True)
    shift = np.array(offsets_of(Grid(window.outputs))) * np.array(window.stride)
    reached: Array = (offsets[None, :, :] + shift[:, None, :]).astype(float)
    return reached, place.reshape(-1)


def _scatter(target: Grid, window: Window, channels: int) -> Array | None:
    """Variance over filters of the correlation of their outputs, for white input: Σ_ct W_ct W_c,t+d has variance
    C · overlap(d) σ⁴ for independent weights, against (C T σ²)² of the variance squared."""
    if not channels or window.taps == 1 or not window.kernel:
        return None
    counts = np.ones(())
    for taps, step, spread, length in zip(
        window.kernel, window.stride, window.dilation, window_shape(target), strict=True
    ):
        shift = np.abs(np.arange(length) - length // 2) * step
        counts = np.multiply.outer(counts, np.where(shift % spread == 0, np.maximum(taps - shift // spread, 0), 0))
    return counts / (channels * float(window.taps) ** 2)


def _strided_near(near: Array, state: State, target: Grid, stride: Sequence[int]) -> tuple[Array, float]:
    if all(step == 1 for step in stride) and near.shape == window_shape(target):
        return near, state.far
    return state.near_at(np.array(offsets_of(target)) * np.array(stride)).reshape(window_shape(target)), state.far


def _mixed_near(state: State, target: Grid, window: Window, pairs: Array) -> tuple[Array, float, float]:
    """Excess correlation behind a filter with second moments A, and its variance for an input of variance 1."""
    steps = np.array(window.offsets)
    difference = steps[None, :, :] - steps[:, None, :]  # t' − t
    values = [
        float((pairs * state.near_at(difference + np.array(offset) * np.array(window.stride))).sum())
        for offset in offsets_of(target)
    ]
    gain = float((pairs * state.near_at(difference)).sum())
    scale = 1.0 / gain if gain > 0 else 0.0
    return np.array(values).reshape(window_shape(target)) * scale, state.far * float(pairs.sum()) * scale, gain


def weight_moments(call: Call, weight: Tensor, bias: Any, groups: int = 1) -> WeightMoments:
    """Of the weight that an operator was given: its values, or what its layer declares."""
    if call.is_activation(weight):
        raise NoRule("its weight depends on the input")
    if weight.is_meta:
        moments = of_declared(tuple(weight.shape), call.module).scaled(call.output_scale)
    else:
        moments = of_tensor(weight)
    moments = replace(moments, groups=groups)
    if isinstance(bias, Tensor) and not bias.is_meta:
        mean, variance = float(bias.double().mean()), float(bias.double().var(unbiased=False))
        return replace(moments, bias_mean=mean, bias_variance=variance)
    return moments


@rules("convolution")
def convolution(call: Call) -> State:
    """See :func:`through_window`; groups only change how many channels an output reads."""
    x, weight, bias, stride, padding, dilation, transposed = call.args[:7]
    dims = weight.ndim - 2
    if x.ndim != dims + 2:
        raise NoRule("its input has no batch axis")
    state = call.state(x, x.shape[2:])
    if transposed:
        return _transposed(call, state)
    stride, padding, dilation = (_spread(value, dims) for value in (stride, padding, dilation))
    window = Window(
        tuple(x.shape[2:]), tuple(call.result.shape[2:]), tuple(weight.shape[2:]), stride, dilation, padding
    )
    moments = weight_moments(call, weight, bias, int(call.args[8]))
    result, squares = through_window(state, window, moments)
    call.flow(x, squares, 1.0 / math.prod(stride))
    return result


def _transposed(call: Call, state: State) -> State:
    """Each output reads the taps of its phase: 1/stride of them on average, fewer at the edges, counted exactly.

    Positions are taken as alike, which is exact for the average second moment.
    """
    used = _used_taps(call)
    x, weight, bias = call.args[:3]
    groups = call.args[8]
    if weight.is_meta:
        shape = (weight.shape[1] * groups, weight.shape[0] // groups, *weight.shape[2:])
        declared = of_declared(shape, call.module).scaled(call.output_scale)
        # the declared row is one phase's: all taps together hold ``stride`` times as much
        phases = math.prod(_spread(call.args[3], weight.ndim - 2))
        per_output, row_sum = float(declared.taps.sum()) * phases * used, float(declared.mean.sum()) * phases * used
    else:
        rows = weight.detach().double().flatten(2)  # (in, out / groups, taps)
        per_group = rows.reshape(groups, rows.shape[0] // groups, rows.shape[1], -1)
        per_output = float(per_group.square().sum(dim=(1, 3)).mean()) * used
        row_sum = float(per_group.sum(dim=(1, 3)).mean()) * used
    share = state.grid.share
    mean = float(share @ state.mean)
    cross = float(share @ np.diagonal(state.cross))
    within = float(share @ state.within)
    grid = Grid(tuple(call.result.shape[2:]))
    ones = np.ones(grid.cells)
    bias_mean = bias_variance = 0.0
    if isinstance(bias, Tensor) and not bias.is_meta:
        bias_mean, bias_variance = float(bias.mean()), float(bias.var(unbiased=False))
    fresh = State.noise(grid.sizes)
    call.flow(x, per_output * call.result[0].numel() / max(x[0].numel(), 1))
    return State(
        grid,
        (mean * row_sum + bias_mean) * ones,
        np.full((grid.cells,) * 2, per_output * cross + bias_variance),
        per_output * within * ones,
        fresh.near,
    )


def _used_taps(call: Call) -> float:
    """Mean over outputs of the share of all taps that an output reads."""
    x, weight = call.args[:2]
    dims = weight.ndim - 2
    stride, padding, dilation = (_spread(value, dims) for value in call.args[3:6])
    used = 1.0
    for axis in range(dims):
        n, m, k = x.shape[2 + axis], call.result.shape[2 + axis], weight.shape[2 + axis]
        lands = np.arange(n)[:, None] * stride[axis] - padding[axis] + np.arange(k) * dilation[axis]
        used *= float(((lands >= 0) & (lands < m)).sum()) / (k * m)
    return used


@rules("addmm")
def addmm(call: Call) -> State:
    bias, x, weight = call.args[:3]
    return _matrix_product(call, x, weight.t(), bias)


@rules("mm")
def mm(call: Call) -> State:
    x, weight = call.args[:2]
    return _matrix_product(call, x, weight.t(), None)


@rules("linear")
def linear(call: Call) -> State:
    return _matrix_product(call, call.args[0], call.args[1], call.argument(2, "bias"))


def _matrix_product(call: Call, x: Tensor, weight: Tensor, bias: Any) -> State:
    """A layer on every position by itself: a 1×1 convolution."""
    if not call.is_activation(x):
        raise NoRule("its left operand is not an activation")
    state = call.raw_state(x)
    assert state is not None
    positions = x.numel() // x.shape[-1] // call.examples
    if state.grid.positions != max(positions, 1):
        # features that were positions, a token that was picked, or windows in the batch axis
        sizes = (positions,) if positions > 1 else ()
        state = call.state(x, sizes)
    moments = weight_moments(call, weight, bias)
    ones = (1,) * len(state.grid.sizes)
    window = Window(state.grid.sizes, state.grid.sizes, ones, ones, ones, (0,) * len(ones))
    result, squares = through_window(state, window, moments)
    call.flow(x, squares)
    return result


def _spread(value: Any, dims: int) -> tuple[int, ...]:
    values = tuple(int(v) for v in value) if isinstance(value, (list, tuple)) else (int(value),)
    return values * dims if len(values) == 1 else values


def window_of(call: Call, x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any = 1) -> Window:
    """The window of a pooling operator: its arguments come in short forms."""
    dims = len(kernel) if isinstance(kernel, (list, tuple)) and len(kernel) > 1 else call.result.ndim - 2
    kernel = _spread(kernel, dims)
    stride = kernel if stride in (None, [], ()) else _spread(stride, dims)
    return Window(
        tuple(x.shape[-dims:]),
        tuple(call.result.shape[-dims:]),
        kernel,
        stride,
        _spread(dilation, dims),
        _spread(padding, dims),
    )
