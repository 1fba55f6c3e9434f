"""Elementwise functions, additions and products of activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .grid import Array
from .quadrature import NODES
from .rules import Call, NoRule, broadcast, rules
from .spread import together
from .state import State, elementwise, from_values, sum_shape


def is_elementwise(func: Any) -> bool:
    """Whether an operator, or the one that it is the in-place form of, is tagged as elementwise."""
    return torch.Tag.pointwise in func.tags or torch.Tag.pointwise in out_of_place(func).tags


def out_of_place(func: Any) -> Any:
    """The operator that returns what an in-place one writes; itself for any other."""
    name = func._schema.name.removeprefix("aten::")
    if not name.endswith("_") or not func._schema.name.startswith("aten::"):
        return func
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    return getattr(packet, func._overloadname, func) if packet is not None else func


def pointwise(call: Call) -> State:
    """Any elementwise operator, applied to the values at the nodes of the latent that its operands share."""
    tensors = [value for value in call.args if isinstance(value, Tensor)]
    tensors += [value for value in call.kwargs.values() if isinstance(value, Tensor)]
    operands = [tensor for tensor in tensors if call.is_activation(tensor)]
    others = [tensor for tensor in tensors if not call.is_activation(tensor) and tensor.numel() > 1]
    if len(operands) > 1 and others:
        raise NoRule("it combines activations and parameters")
    states = _on_one_map(call, operands)
    name = call.func._schema.name.removeprefix("aten::").removesuffix("_")
    if len(operands) == 1 and others and name in ("add", "sub", "mul", "div"):
        return _with_parameter(call, name, operands[0], states[0])
    if len(operands) == 1 and name in ("add", "sub", "mul", "div", "neg") and not others:
        scaled = _with_scalar(call, name, operands[0], states[0])
        if scaled is not None:
            return scaled
    varying = [state for state in states if not state.is_constant]
    shared = all(state.latent is varying[0].latent for state in varying[1:])
    if name in ("add", "sub") and len(states) == 2 and not shared:
        alpha = float(call.kwargs.get("alpha", 1)) * (-1.0 if name == "sub" else 1.0)
        call.flow(operands[0], 1.0)
        call.flow(operands[1], alpha**2)
        return added(states[0], states[1], alpha)
    if name == "mul" and len(states) == 2 and not shared:
        call.flow(operands[0], states[1].second_moment)
        call.flow(operands[1], states[0].second_moment)
        return multiplied(states[0], states[1])
    if not shared:
        raise NoRule("its operands are different functions of the input")
    return _function(call, operands, states)


def _function(call: Call, operands: Sequence[Tensor], states: list[State]) -> State:
    place = {id(tensor): index for index, tensor in enumerate(operands)}

    def evaluate(values: list[Array]) -> Array:
        def swap(value: Any) -> Any:
            if isinstance(value, Tensor):
                if id(value) in place:
                    return torch.from_numpy(values[place[id(value)]].copy())
                if value.is_meta:
                    raise NoRule("a parameter of it has no value")
                value = value.double() if value.is_floating_point() else value
                return value if value.numel() == 1 else value.mean()
            return value

        kwargs = {key: swap(value) for key, value in call.kwargs.items() if key not in ("out", "generator")}
        return out_of_place(call.func)(*(swap(value) for value in call.args), **kwargs).double().numpy()

    result = elementwise(evaluate, states)
    _slopes(call, operands, states, evaluate)
    return result


def _slopes(call: Call, operands: Sequence[Tensor], states: list[State], function: Callable[..., Array]) -> None:
    """The gradient's way back: E[(∂y/∂x)²] of its energy, of which (E ∂y/∂x)² is the same at all positions.

    A slope that jumps, as ReLU's does, is no matter for the nodes of the moments: one of them would decide over 1/40
    of a Gaussian. It is taken between finer ones, none of which is 0.
    """
    if not call.wants_flows:
        return
    base = max(states, key=lambda state: state.grid.cells)
    shape = base.values.shape
    values = [_between_nodes(np.broadcast_to(state.values, shape)) for state in states]
    for index, tensor in enumerate(operands):
        step = 1e-5 * (1.0 + np.abs(values[index]).max())
        # from the left: the slope of ReLU at 0, where half of a rectified signal lies, is 0
        lower = [value - step if place == index else value for place, value in enumerate(values)]
        with np.errstate(all="ignore"):
            slope = (function(values) - function(lower)) / step
        energy = float(base.grid.share @ (slope**2 @ _FINE_WEIGHTS))
        mean = float(base.grid.share @ (slope @ _FINE_WEIGHTS))
        call.flow(tensor, energy, min(mean**2 / energy, 1.0) if energy > 0 else 1.0, fresh=True)


_FINER = 8
_FINE_PLACES = (np.arange(_FINER) + 0.5) / _FINER
_FINE_WEIGHTS = np.exp(-0.5 * np.add.outer(NODES[:-1], (NODES[1] - NODES[0]) * _FINE_PLACES).reshape(-1) ** 2)
_FINE_WEIGHTS /= _FINE_WEIGHTS.sum()


def _between_nodes(values: Array) -> Array:
    """(cells, finer nodes): straight lines between the values at the nodes; where those are equal, exactly so."""
    rise = np.diff(values, axis=1)[:, :, None] * _FINE_PLACES
    return (values[:, :-1, None] + rise).reshape(len(values), -1)


def _with_scalar(call: Call, name: str, operand: Tensor, state: State) -> State | None:
    """x + c, x − c, c − x, c · x, x / c."""
    if name == "neg":
        call.flow(operand, 1.0)
        return state.scaled(-1.0)
    first, second = call.args[0], call.args[1]
    other = second if first is operand else first
    if isinstance(other, Tensor):
        if other.is_meta:
            return None
        other = other.double().item() if other.numel() == 1 else None
    if isinstance(other, bool) or not isinstance(other, (int, float)):
        return None
    alpha = float(call.kwargs.get("alpha", 1))
    leads = first is operand
    factor, shift = {
        "add": (1.0, other * alpha) if leads else (alpha, other),
        "sub": (1.0, -other * alpha) if leads else (-alpha, other),
        "mul": (float(other), 0.0),
        "div": (1.0 / other if leads and other else 0.0, 0.0),
    }[name]
    if name == "div" and (not leads or not other):
        return None
    if name == "mul" and state.padding:
        return None
    call.flow(operand, factor**2)
    return state if (factor, shift) == (1.0, 0.0) else state.scaled(float(factor), float(shift))


def _with_parameter(call: Call, name: str, operand: Tensor, state: State) -> State:
    """An activation and a parameter with more than one element."""
    first, second = call.args[0], call.args[1]
    other = second if first is operand else first
    if name == "div" and first is not operand:
        raise NoRule("it divides by an activation")
    if other.is_meta:
        raise NoRule("a parameter of it has no value")
    values = other.detach().double()
    if name == "div":
        values = 1.0 / values
    mean, variance = float(values.mean()), float(values.var(unbiased=False))
    channels = call.result.shape[call.axis_of(call.result)]
    per_channel = values.numel() == channels
    if name in ("mul", "div"):
        call.flow(operand, mean**2 + variance)
        return multiplied_by_parameter(state, mean, mean**2 + variance)
    call.flow(operand, 1.0)
    sign = -1.0 if name == "sub" and first is operand else 1.0
    base = state if name == "add" or first is operand else state.scaled(-1.0)
    return shifted_by_parameter(base, sign * mean, variance, per_channel)


def multiplied_by_parameter(state: State, mean: float, second: float) -> State:
    """x_c · a_c, the factors independent of the activation: uncentred moments times E a², the mean times E a."""
    if abs(second - mean**2) <= 1e-12 * second:
        return state.scaled(mean)
    cross = second * (state.cross + np.outer(state.mean, state.mean)) - mean**2 * np.outer(state.mean, state.mean)
    return state.with_moments(state.mean * mean, cross, state.within * second, shape=state.standardised())


def shifted_by_parameter(state: State, mean: float, variance: float, per_channel: bool) -> State:
    """x_c + b_c, with a variance of b over channels, or over channels and positions."""
    if variance <= 1e-24:
        return state if mean == 0.0 else state.scaled(1.0, mean)
    if per_channel:
        return state.with_moments(
            state.mean + mean, state.cross + variance, state.within, shape=_widened(state, variance)
        )
    total = state.within + variance
    centre = tuple(n // 2 for n in state.near.shape)
    near = state.near * float(state.within.mean() / total.mean())
    near[centre] = 1.0
    far = state.far * float(state.within.mean() / total.mean())
    return state.with_moments(
        state.mean + mean, state.cross, total, near=near, far=far, shape=_widened(state, variance)
    )


def _widened(state: State, variance: float) -> Array | None:
    normal = State.noise(())
    return sum_shape(state, normal.scaled(variance**0.5))


def _on_one_map(call: Call, operands: Sequence[Tensor]) -> list[State]:
    """The operands' states as they are if they lie on one map, whatever the tensors' axes are taken for."""
    raw = [call.raw_state(tensor) for tensor in operands]
    states = [state for state in raw if state is not None]
    if len({state.grid.sizes for state in states}) == 1 and len(states) == len(operands):
        return states
    states = [call.state(tensor) for tensor in operands]
    largest = max(states, key=lambda state: state.grid.positions).grid
    laid_out = []
    for state in states:
        if state.grid.sizes == largest.sizes:
            laid_out.append(state)
        elif state.grid.positions == 1:
            laid_out.append(broadcast(state, largest.sizes))
        else:
            raise NoRule("its operands are maps of different sizes")
    return laid_out


def added(first: State, second: State, alpha: float = 1.0) -> State:
    """x + α y: covariances add, and twice those of the sources that both are sums of."""
    scaled = second if alpha == 1.0 else second.scaled(alpha)
    cross = first.cross + scaled.cross
    pairs = [(1.0, first), (1.0, scaled)]
    parts = dict(first.parts)
    for source, coefficient in scaled.parts.items():
        if source in first.parts and source.grid.sizes == first.grid.sizes:
            both = 2.0 * first.parts[source] * coefficient
            cross = cross + both * source.cross
            pairs.append((both, source))
        parts[source] = parts.get(source, 0.0) + coefficient
    within = np.maximum(sum(factor * state.within for factor, state in pairs), 0.0)
    levels = [factor * float(state.grid.share @ state.within) for factor, state in pairs]
    total = sum(levels)
    if total > 0:
        near = sum(level * state.near for level, (_, state) in zip(levels, pairs, strict=True)) / total
        far = sum(level * state.far for level, (_, state) in zip(levels, pairs, strict=True)) / total
    else:
        near, far = first.near, first.far
    shape = sum_shape(first, scaled)
    spread = together([(state.average_variance, state.spread) for state in (first, scaled)])
    return State(
        first.grid, first.mean + scaled.mean, cross, within, np.asarray(near), float(far), shape, parts, spread=spread
    )


def multiplied(first: State, second: State) -> State:
    """x · y for independent x and y: uncentred moments multiply."""
    mean = first.mean * second.mean
    uncentred = [state.cross + np.outer(state.mean, state.mean) for state in (first, second)]
    both = uncentred[0] * uncentred[1]
    diagonals = [np.diagonal(matrix) for matrix in uncentred]
    within = (diagonals[0] + first.within) * (diagonals[1] + second.within) - diagonals[0] * diagonals[1]
    share = first.grid.share
    levels = [float(share @ diagonal) for diagonal in diagonals]
    own = [float(share @ state.within) for state in (first, second)]
    total = (levels[0] + own[0]) * (levels[1] + own[1]) - levels[0] * levels[1]

    def excess(one: Any, two: Any) -> Any:
        value = (levels[0] + own[0] * one) * (levels[1] + own[1] * two) - levels[0] * levels[1]
        return value / max(total, 1e-30)

    lead = max((first, second), key=_relative_variance)
    return State(
        first.grid,
        mean,
        both - np.outer(mean, mean),
        within,
        excess(first.near, second.near),
        float(excess(first.far, second.far)),
        lead.standardised(),
        spread=lead.spread,
    )


def _relative_variance(state: State) -> float:
    return state.average_variance / max(state.second_moment, 1e-30)


rules("hardswish", "mish", "celu", "selu", "rrelu", "rrelu_with_noise_functional")(pointwise)  # some lack the tag


@rules("native_dropout", "dropout", "_to_copy", "clone", "contiguous", "detach", "alias", "roll", "flip", "lift_fresh")
def identity(call: Call) -> State:
    """The same statistics: a copy, a permutation of positions, or dropout, which is off."""
    state = call.raw_state(call.args[0])
    assert state is not None
    call.flow(call.args[0], 1.0)
    return state


@rules("_prelu_kernel")
def prelu(call: Call) -> State:
    """A slope per channel; their mean stands for all."""
    x, weight = call.args[:2]
    slope = 0.25 if weight.is_meta else float(weight.double().mean())
    state = call.state(x)

    def function(values: list[Array]) -> Array:
        return np.where(values[0] > 0, values[0], slope * values[0])

    _slopes(call, [x], [state], function)
    return elementwise(function, [state])


__all__ = ["added", "from_values", "is_elementwise", "multiplied", "pointwise"]
