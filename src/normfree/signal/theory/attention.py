"""Attention: scores, their softmax, and means of the values."""

from __future__ import annotations

import math

import numpy as np

from .offsets import delta
from .rules import Call, NoRule, rules
from .state import State


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
