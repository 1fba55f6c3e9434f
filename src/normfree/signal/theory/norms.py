"""Normalisation over examples and positions, over channels, and over both."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from .grid import Array
from .pointwise import multiplied_by_parameter, shifted_by_parameter
from .rules import Call, NoRule, rules
from .spread import middle
from .state import State

_OWN = 0.8  # share of the variance that is not between channels


def _affine(state: State, weight: Any, bias: Any) -> tuple[State, float]:
    """The learnable scale and shift per channel, and the mean square of the scale."""
    second = 1.0
    if isinstance(weight, Tensor) and not weight.is_meta:
        values = weight.detach().double()
        second = float(values.square().mean())
        state = multiplied_by_parameter(state, float(values.mean()), second)
    if isinstance(bias, Tensor) and not bias.is_meta:
        values = bias.detach().double()
        state = shifted_by_parameter(state, float(values.mean()), float(values.var(unbiased=False)), True)
    return state, second


@rules("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
def batch_norm(call: Call) -> State:
    """BatchNorm: by the statistics of the batch in training, by the running ones in evaluation.

    In training every channel's mean over examples and positions goes, to which a position p contributes
    c(p) = mean over p' of the uncentred covariance, and the average variance V is divided out:
    U'(p, p') = (U(p, p') − c(p) − c(p') + mean of c) / (V + eps).
    """
    x, weight, bias = call.args[:3]
    state = call.state(x, x.shape[2:])
    short = call.func._schema.name == "aten::_native_batch_norm_legit_no_training"
    training = False if short else bool(call.args[5])
    eps = float(call.args[6] if short else call.args[7])
    if not training:
        return _with_running_statistics(call, state, eps)
    share = state.grid.share
    _, variance = state.statistics(call.examples)
    own = state.chance(call.examples)
    uncentred = state.cross + np.outer(state.mean, state.mean)
    towards = uncentred @ share + own
    scale = 1.0 / (variance + eps)
    rest = (uncentred - towards[:, None] - towards[None, :] + share @ towards) * scale
    total = np.diagonal(rest) + state.within * scale
    mean = (state.mean - share @ state.mean) * scale**0.5
    cross = rest - np.outer(mean, mean)
    within = np.maximum(total - mean**2 - np.diagonal(cross), 0.0)
    spread = state.spread
    if spread is not None:  # every channel has the same variance now
        spread = replace(spread, own=-middle(spread.pairs))
    result = state.with_moments(mean, cross, within, shape=_own_shape(state), spread=spread)
    result, second = _affine(result, weight, bias)
    # the mean of the gradient and its component along the output go
    left = max(1.0 - 2.0 / max(call.examples * state.grid.positions, 2), 0.0)
    call.flow(x, scale * second * left, centred=True)
    return result


def _own_shape(state: State) -> Array | None:
    """A channel's distribution where channels hardly differ in their means; else that of a Gaussian: what the means
    make of the joint distribution goes when they do."""
    own = float(state.grid.share @ state.within)
    return state.standardised() if own > _OWN * state.average_variance else None


def _with_running_statistics(call: Call, state: State, eps: float) -> State:
    x, weight, bias, running_mean, running_var = call.args[:5]
    if running_mean is None or running_mean.is_meta:
        raise NoRule("its running statistics have no values")
    scale = (running_var.double() + eps).rsqrt()
    if isinstance(weight, Tensor) and not weight.is_meta:
        scale = scale * weight.detach().double()
    shift = -running_mean.double() * scale
    if isinstance(bias, Tensor) and not bias.is_meta:
        shift = shift + bias.detach().double()
    second = float(scale.square().mean())
    call.flow(x, second)
    state = multiplied_by_parameter(state, float(scale.mean()), second)
    return shifted_by_parameter(state, float(shift.mean()), float(shift.var(unbiased=False)), True)


@rules("native_layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(call: Call) -> State:
    """Over channels, position by position: m goes and K + w becomes 1. Over a whole map, see GroupNorm."""
    x, normalized, weight = call.args[:3]
    state = call.raw_state(x)
    if state is None:
        raise NoRule("its input is not known")
    if len(normalized) > 1 and state.grid.positions > 1:
        return _group_norm(call, x, state, int(np.prod(normalized)), weight, call.args[3], float(call.args[4]))
    if call.func._schema.name != "aten::native_layer_norm":
        bias, eps = None, float(call.argument(3, "eps") or 1e-6)
        mean, level = state.mean, state.mean**2 + state.variance
    else:
        bias, eps = call.args[3], float(call.args[4])
        mean, level = np.zeros_like(state.mean), state.variance
    scale = 1.0 / np.sqrt(level + eps)
    # what all channels of a site have in common goes, and so does the scatter of its norm
    result = state.with_moments(
        mean * scale,
        state.cross * np.outer(scale, scale),
        state.within * scale**2,
        shape=state.standardised(),
        spread=None,
    )
    result, second = _affine(result, weight, bias)
    call.flow(x, float(state.grid.share @ scale**2) * second)
    return result


@rules("native_group_norm")
def group_norm(call: Call) -> State:
    x, weight, bias, _, channels, _, groups, eps = call.args[:8]
    return _group_norm(call, x, call.state(x, x.shape[2:]), channels // groups, weight, bias, float(eps))


def _group_norm(call: Call, x: Tensor, state: State, channels: int, weight: Any, bias: Any, eps: float) -> State:
    """Over the map and a group of n channels: the group's mean holds 1/n of each channel's own mean."""
    share = state.grid.share
    mean = state.mean - share @ state.mean
    own_mean = float(share @ state.cross @ share) + float(share @ state.within) * state.pooled_near()
    removed = own_mean / channels
    level = max(float(share @ (mean**2 + state.variance)) - removed, 0.0)
    scale = 1.0 / (level + eps)
    common = float(share @ state.cross @ share) / channels
    cross = (state.cross - common) * scale
    within = np.maximum(state.within - (removed - common), 0.0) * scale
    result = state.with_moments(mean * scale**0.5, cross, within, shape=state.standardised())
    result, second = _affine(result, weight, bias)
    call.flow(x, scale * second)
    return result


@rules("linalg_vector_norm")
def norm(call: Call) -> State:
    """A norm over channels is the same for all examples in a wide network."""
    x = call.args[0]
    dims = call.argument(2, "dim")
    if float(call.argument(1, "ord", 2)) != 2.0 or dims is None:
        raise NoRule("only the Euclidean norm over channels is known")
    state, count = call.state(x), 1
    for dim in dims:
        count *= x.shape[dim]
    return State.constant((count * state.second_moment) ** 0.5, call.sizes(call.result))
