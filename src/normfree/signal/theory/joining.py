"""Channels side by side."""

from __future__ import annotations

import numpy as np

from .quadrature import WEIGHTS, standardise, weighted_quantiles
from .rules import Call, NoRule, regrid, rules
from .state import State


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
    weights = np.concatenate([share * WEIGHTS for share in shares])
    return State(
        first.grid, mean, uncentred - np.outer(mean, mean), within, np.asarray(near), float(far),
        standardise(weighted_quantiles(values, weights)),
    )  # fmt: skip
