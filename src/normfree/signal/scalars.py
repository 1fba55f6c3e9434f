"""The scalars that activations are multiplied with, so that a residual branch can be reported as it was before them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .graph import Graph, Node, tensors_in
from .moments import ChannelMoments

aten = torch.ops.aten
_SCALINGS = {aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar, aten.mul_.Scalar}
_DIVISIONS = {aten.div.Tensor, aten.div_.Tensor, aten.div.Scalar, aten.div_.Scalar}
_SHIFTS = {aten.add.Tensor, aten.add_.Tensor, aten.add.Scalar, aten.add_.Scalar, aten.sub.Tensor, aten.sub.Scalar}
_BY_SCALARS = _SCALINGS | _DIVISIONS | _SHIFTS
_COPIES = {aten._to_copy.default, aten.clone.default}


def scale_after(
    func: Any, args: Any, graph: Graph, erased: ChannelMoments | None
) -> tuple[float, ChannelMoments | None]:
    """A result's ``scale`` and ``unscaled``, as a node has them.

    Args:
        erased: what a multiplication by zero has erased; None for any other operation.
    """
    operand = scaled_operand(func, args, graph)
    if operand is None:
        return 1.0, None
    node, factor = operand
    return node.scale * factor, erased or node.unscaled


def about_to_be_erased(func: Any, args: Any, graph: Graph) -> tuple[Tensor, Node] | None:
    """The activation in a multiplication by zero, unless it is zero already."""
    if func not in _SCALINGS:
        return None
    operand = scaled_operand(func, args, graph)
    if operand is None or operand[1] != 0.0 or operand[0].scale == 0.0:
        return None
    return next(tensor for tensor in tensors_in(args) if graph.node(tensor) is operand[0]), operand[0]


def without_scale(moments: ChannelMoments, scale: float) -> ChannelMoments:
    """The moments of an activation before it was multiplied with ``scale``, which is not 0."""
    return ChannelMoments(
        moments.count,
        moments.mean * (1.0 / scale),
        moments.squared_deviation * (1.0 / scale) ** 2,
        moments.nan_count,
        moments.inf_count,
    )


def scaled_operand(func: Any, args: Any, graph: Graph) -> tuple[Node, float] | None:
    """The activation and the scalar in a multiplication, division or addition by a scalar, or in a copy."""
    if func in _COPIES:
        node = graph.node(args[0])
        return None if node is None else (node, 1.0)
    if len(args) < 2 or func not in _BY_SCALARS:
        return None
    for operand, other in ((args[0], args[1]), (args[1], args[0])):
        node = graph.node(operand) if isinstance(operand, Tensor) else None
        value = scalar_value(other, graph) if node is not None else None
        if node is None or value is None:
            continue
        if func in _SHIFTS:
            return node, 1.0
        if func in _DIVISIONS:
            if operand is args[1] or value == 0.0:
                continue
            value = 1.0 / value
        # a constant above 1 amplifies, as the doubling of a gate does: it belongs to the branch
        return None if abs(value) > 1.0 and not isinstance(other, Tensor) else (node, value)
    return None


def scalar_value(value: Any, graph: Graph) -> float | None:
    """The number in a Python scalar or a one-element tensor that does not descend from the input, else None."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, Tensor) and value.numel() == 1 and graph.node(value) is None and not value.is_meta:
        return float(value.detach().double().item()) if value.dtype != torch.bool else None
    return None
