"""Scaled Weight Standardization of many weights in one launch, forward and backward, in Triton.

:func:`~normfree.standardize.formula.composed` is the truth for both kernels. This module is imported only where
Triton is.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _forward_kernel(
    weights,  # one address for each layer
    results,
    layers,  # for each row of all layers together, the layer that it belongs to
    first_rows,  # for each layer
    fan_ins,
    factors,  # for each row
    means,
    inverses,  # of the divisors
    EPS: tl.constexpr,
    ADDED: tl.constexpr,
    ELEMENT: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    layer = tl.load(layers + row)
    fan_in = tl.load(fan_ins + layer)
    start = (row - tl.load(first_rows + layer)).to(tl.int64) * fan_in
    source = tl.load(weights + layer).to(tl.pointer_type(ELEMENT)) + start
    target = tl.load(results + layer).to(tl.pointer_type(ELEMENT)) + start
    columns = tl.arange(0, BLOCK)

    total = tl.zeros([BLOCK], FULL)
    for offset in range(0, fan_in, BLOCK):
        total += tl.load(source + offset + columns, mask=offset + columns < fan_in, other=0.0).to(FULL)
    mean = tl.sum(total, 0) / fan_in

    squares = tl.zeros([BLOCK], FULL)
    for offset in range(0, fan_in, BLOCK):
        inside = offset + columns < fan_in
        centred = tl.load(source + offset + columns, mask=inside, other=0.0).to(FULL) - mean
        squares += tl.where(inside, centred * centred, 0.0)
    guarded = tl.sum(squares, 0)
    eps = tl.full([], EPS, FULL)
    guarded = guarded + fan_in * eps if ADDED else tl.maximum(guarded, eps)
    inverse = 1.0 / tl.sqrt(guarded)

    factor = tl.load(factors + row) * inverse
    for offset in range(0, fan_in, BLOCK):
        inside = offset + columns < fan_in
        centred = tl.load(source + offset + columns, mask=inside, other=0.0).to(FULL) - mean
        tl.store(target + offset + columns, (centred * factor).to(ELEMENT), mask=inside)
    tl.store(means + row, mean)
    tl.store(inverses + row, inverse)


@triton.jit
def _backward_kernel(
    weights,
    upstreams,
    gradients,  # of the weights
    layers,
    first_rows,
    fan_ins,
    factors,
    means,
    inverses,
    of_factors,
    EPS: tl.constexpr,
    ADDED: tl.constexpr,
    ELEMENT: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    layer = tl.load(layers + row)
    fan_in = tl.load(fan_ins + layer)
    start = (row - tl.load(first_rows + layer)).to(tl.int64) * fan_in
    source = tl.load(weights + layer).to(tl.pointer_type(ELEMENT)) + start
    upstream = tl.load(upstreams + layer).to(tl.pointer_type(ELEMENT)) + start
    target = tl.load(gradients + layer).to(tl.pointer_type(ELEMENT)) + start
    mean, inverse = tl.load(means + row), tl.load(inverses + row)
    columns = tl.arange(0, BLOCK)

    total, product = tl.zeros([BLOCK], FULL), tl.zeros([BLOCK], FULL)
    for offset in range(0, fan_in, BLOCK):
        inside = offset + columns < fan_in
        gradient = tl.load(upstream + offset + columns, mask=inside, other=0.0).to(FULL)
        total += gradient
        product += gradient * (tl.load(source + offset + columns, mask=inside, other=0.0).to(FULL) - mean)
    average, dot = tl.sum(total, 0) / fan_in, tl.sum(product, 0)
    tl.store(of_factors + row, dot * inverse)

    slope = dot * inverse * inverse
    if not ADDED:  # a row that eps bounds is divided by a constant
        slope = tl.where(inverse * inverse * tl.full([], EPS, FULL) < 1.0 - 1e-6, slope, 0.0)
    factor = tl.load(factors + row) * inverse
    for offset in range(0, fan_in, BLOCK):
        inside = offset + columns < fan_in
        gradient = tl.load(upstream + offset + columns, mask=inside, other=0.0).to(FULL)
        centred = tl.load(source + offset + columns, mask=inside, other=0.0).to(FULL) - mean
        tl.store(target + offset + columns, ((gradient - average - centred * slope) * factor).to(ELEMENT), mask=inside)


_ELEMENTS = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


@dataclass(frozen=True)
class _Layout:
    """Where the rows of all layers lie, on the device."""

    layers: Tensor
    first_rows: Tensor
    fan_ins: Tensor
    rows: int


@lru_cache(maxsize=64)
def _layout(shapes: tuple[tuple[int, int], ...], device: torch.device) -> _Layout:
    """``shapes`` are (units, fan-in)."""
    units = torch.tensor([shape[0] for shape in shapes], dtype=torch.int32)
    first_rows = torch.cumsum(units, 0, dtype=torch.int32) - units
    layers = torch.repeat_interleave(torch.arange(len(shapes), dtype=torch.int32), units)
    fan_ins = torch.tensor([shape[1] for shape in shapes], dtype=torch.int32)
    return _Layout(layers.to(device), first_rows.to(device), fan_ins.to(device), len(layers))


def _addresses(tensors: Sequence[Tensor]) -> Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64).to(tensors[0].device)


def _launch(
    kernel: Any, layout: _Layout, weight: Tensor, tables: Sequence[Tensor], *rest: Tensor, eps: float, added: bool
) -> None:
    full = torch.float64 if weight.dtype == torch.float64 else torch.float32
    with torch.cuda.device(weight.device) if weight.is_cuda else nullcontext():
        kernel[(layout.rows,)](
            *tables,
            layout.layers,
            layout.first_rows,
            layout.fan_ins,
            *rest,
            EPS=eps,
            ADDED=added,
            ELEMENT=_ELEMENTS[weight.dtype],
            FULL=_ELEMENTS[full],
            BLOCK=_BLOCK,
        )


class StandardizeMany(torch.autograd.Function):
    """``apply(factors, eps, added, truth, *weights)``: the standardized weights, as a tuple.

    Args:
        factors: (units of all weights,), gain · scale, in float32 (float64 for float64 weights).
        eps, added: the lower bound on fan-in · variance, or what is added to the variance.
        truth: weight and its part of ``factors`` to the standardized weight, in operations that autograd knows; used
            where the gradient itself is to be differentiated.
        weights: on one device, of one dtype, each output unit in one piece of memory.
    """

    @staticmethod
    def forward(ctx: Any, factors: Tensor, eps: float, added: bool, truth: Any, *weights: Tensor) -> Any:
        layout = _layout(tuple((len(w), w.numel() // len(w)) for w in weights), weights[0].device)
        factors = factors.contiguous()
        results = tuple(torch.empty_like(weight) for weight in weights)
        means, inverses = torch.empty_like(factors), torch.empty_like(factors)
        tables = (_addresses(weights), _addresses(results))
        _launch(_forward_kernel, layout, weights[0], tables, factors, means, inverses, eps=eps, added=added)
        ctx.save_for_backward(factors, means, inverses, *weights)
        ctx.layout, ctx.eps, ctx.added, ctx.truth = layout, eps, added, truth
        return results

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> Any:
        factors, means, inverses, *weights = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, factors, weights, upstreams)
        upstreams = tuple(_like(upstream, weight) for upstream, weight in zip(upstreams, weights, strict=True))
        gradients = tuple(torch.empty_like(weight) for weight in weights)
        of_factors = torch.empty_like(factors)
        tables = (_addresses(weights), _addresses(upstreams), _addresses(gradients))
        rest = (factors, means, inverses, of_factors)
        _launch(_backward_kernel, ctx.layout, weights[0], tables, *rest, eps=ctx.eps, added=ctx.added)
        return of_factors, None, None, None, *gradients


def _like(tensor: Tensor, weight: Tensor) -> Tensor:
    """The tensor in the memory layout of the weight."""
    same = tensor.stride() == weight.stride() and tensor.dtype == weight.dtype
    return tensor if same else torch.empty_like(weight).copy_(tensor)


def _differentiable_backward(ctx: Any, factors: Tensor, weights: Sequence[Tensor], upstreams: Sequence[Tensor]) -> Any:
    parts = factors.split([len(weight) for weight in weights])
    results = [ctx.truth(weight, part) for weight, part in zip(weights, parts, strict=True)]
    inputs = [factors, *weights]
    wanted = [index for index, tensor in enumerate(inputs) if tensor.requires_grad]
    found = torch.autograd.grad(results, [inputs[i] for i in wanted], upstreams, create_graph=True, allow_unused=True)
    gradients: list[Tensor | None] = [None] * len(inputs)
    for index, gradient in zip(wanted, found, strict=True):
        gradients[index] = gradient
    return gradients[0], None, None, None, *gradients[1:]
