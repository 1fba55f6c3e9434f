"""Padding and resizing."""

from __future__ import annotations

import math

import numpy as np

from .average_pooling import averaged
from .grid import Window
from .offsets import offsets_of, window_shape
from .pointwise import identity
from .rules import Call, NoRule, regrid, rules
from .state import State


@rules("constant_pad_nd", "pad")
def constant_pad(call: Call) -> State:
    x, pads = call.args[0], list(call.args[1])
    value = float(call.argument(2, "value", 0.0) or 0.0)
    if not any(pads):
        return identity(call)
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
    source = call.state(x, inputs)
    state = regrid(source, outputs)
    ratio = [m / n for n, m in zip(inputs, outputs, strict=True)]
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
