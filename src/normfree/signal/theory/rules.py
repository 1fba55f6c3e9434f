"""The table of rules: what each operator makes of the states that it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .grid import Grid
from .offsets import delta
from .state import State


class NoRule(Exception):
    """The theory stops here; the message says why."""


@dataclass
class Flow:
    """How much of the gradient's energy at the output reaches one input: Σ_in g² = factor · Σ_out g².

    Attributes:
        tensor: the input.
        factor: the ratio of energies.
        coherence: what becomes of the share of it in which all positions agree.
        fresh: whether the rest is spread over positions and examples at random, as behind a random slope.
        centred: whether the mean over examples and positions is taken out of it, as behind BatchNorm.
    """

    tensor: Tensor
    factor: float
    coherence: float = 1.0
    fresh: bool = False
    centred: bool = False


@dataclass
class Call:
    """One operator's call, as a rule sees it.

    Attributes:
        func: the ATen overload.
        args, kwargs: as it was called; activations are on the meta device, weights are what they are.
        result: the first tensor that it returned.
        examples: number of examples in the batch.
        module: the innermost module that is running.
        output_scale: scalar that the module was called with, to be carried by its weight.
        raw_state: gives the state of an input as it is; None if nothing is known of it. See :meth:`state`.
        axis_of: gives the channel axis of a tensor.
        wants_flows: whether gradients are asked for.
        flows: what a rule says of the gradient; see :meth:`flow`.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Tensor
    examples: int
    module: nn.Module | None
    output_scale: float
    raw_state: Callable[[Tensor], State | None]
    axis_of: Callable[[Tensor], int]
    wants_flows: bool = True
    flows: list[Flow] = field(default_factory=list)

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """A positional or keyword argument."""
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)

    def is_activation(self, value: Any) -> bool:
        """Whether it is a tensor with a state."""
        return isinstance(value, Tensor) and self.raw_state(value) is not None

    def sizes(self, tensor: Tensor) -> tuple[int, ...]:
        """Sizes of the axes that are neither examples nor channels."""
        channel = self.axis_of(tensor) % max(tensor.ndim, 1)
        return tuple(n for axis, n in enumerate(tensor.shape) if axis not in (0, channel))

    def state(self, tensor: Tensor, sizes: Sequence[int] | None = None) -> State:
        """The state of an input, laid out as the tensor is, or as ``sizes`` say."""
        state = self.raw_state(tensor)
        if state is None:
            raise NoRule("one of its inputs is not known")
        return regrid(state, self.sizes(tensor) if sizes is None else tuple(sizes))

    def flow(
        self, tensor: Any, factor: float, coherence: float = 1.0, fresh: bool = False, centred: bool = False
    ) -> None:
        """Says that a share of the gradient's energy goes to an input; see :class:`Flow`."""
        if self.wants_flows and self.is_activation(tensor):
            self.flows.append(Flow(tensor, float(factor), float(coherence), fresh, centred))


Rule = Callable[[Call], State]
_RULES: dict[str, Rule] = {}


def register_rule(op: Any, rule: Rule | None = None) -> Any:
    """Teaches :func:`normfree.predict_spp` an operator.

    Args:
        op: an operator (``torch.ops.aten.relu.default``, ``torch.ops.mylib.op``) or its name (``"aten::relu"``);
            a name holds for every overload, and an in-place operator (``relu_``) has the rule of its namesake.
        rule: takes a :class:`~normfree.signal.theory.rules.Call` and returns the output's
            :class:`~normfree.signal.theory.State`; may call ``call.flow(input, factor)`` to say how the gradient
            goes back. Left out, the function is returned as a decorator.

    Raises:
        TypeError: ``op`` is neither.
    """
    name = _name(op)
    if rule is None:
        return lambda function: register_rule(op, function)
    _RULES[name] = rule
    return rule


def rule_of(func: Any) -> Rule | None:
    """The rule of an overload, or None."""
    name = func._schema.name
    return _RULES.get(name) or (_RULES.get(name.removesuffix("_")) if name.endswith("_") else None)


def _name(op: Any) -> str:
    if isinstance(op, str):
        return op if "::" in op else f"aten::{op}"
    if isinstance(op, torch._ops.OpOverload):
        return op._schema.name
    if isinstance(op, torch._ops.OpOverloadPacket):
        return op._qualified_op_name
    raise TypeError(f"op: expected an operator of torch.ops or its name, got {type(op).__name__}")


def rules(*names: str) -> Callable[[Rule], Rule]:
    """Decorator: one rule for several ATen operators."""

    def register(rule: Rule) -> Rule:
        for name in names:
            _RULES[f"aten::{name}"] = rule
        return rule

    return register


def regrid(state: State, sizes: tuple[int, ...]) -> State:
    """The state on another map, all of whose positions are then alike; itself where nothing changes.

    Positions that are flattened into channels, or of which one is taken, add the variance of m over positions.
    """
    if state.grid.sizes == sizes:
        return state
    if state.grid.positions == 1 and Grid(sizes).positions > 1:
        return broadcast(state, sizes)
    grid, share = Grid(sizes), state.grid.share
    cells = np.ones(grid.cells)
    mean = float(share @ state.mean)
    cross = float(share @ np.diagonal(state.cross)) + float(share @ state.mean**2) - mean**2
    within = float(share @ state.within)
    far = state.pooled_near() if state.grid.positions > 1 else 0.0
    near = delta(grid)
    near[near == 0.0] = far
    shape = state.standardised()
    return State(
        grid, mean * cells, np.full((grid.cells,) * 2, cross), within * cells, near, far, shape, simplex=state.simplex
    )


def broadcast(state: State, sizes: tuple[int, ...]) -> State:
    """One value for all positions of a map."""
    grid = Grid(sizes)
    ones = np.ones(grid.cells)
    near = np.ones_like(delta(grid))
    if state.grid.cells != 1:
        state = regrid(state, ())
    return State(
        grid,
        state.mean[0] * ones,
        np.full((grid.cells,) * 2, state.cross[0, 0]),
        state.within[0] * ones,
        near,
        1.0,
        state.standardised(),
    )
