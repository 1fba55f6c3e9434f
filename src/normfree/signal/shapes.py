"""Shapes of results on the ``meta`` device, for the operators that networks are made of.

Torch knows them all; but it computes many of them in Python, through machinery whose first use takes a second and each
use a fraction of a millisecond. What is not answered here is left to torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .graph import name_of

_UNARY = frozenset(
    f"aten::{name}"
    for name in (
        *("relu", "silu", "gelu", "tanh", "sigmoid", "elu", "leaky_relu", "hardtanh", "hardswish", "hardsigmoid"),
        *("mish", "softplus", "relu6", "selu", "celu", "neg", "exp"),
    )
)
_BINARY = frozenset(f"aten::{name}" for name in ("add", "sub", "mul", "div"))


def shape_of_result(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Empty tensors like the result, the written one for an operator in place; None if that is for torch to say.

    Args:
        func: the ATen overload.
        args, kwargs: as it was called.
    """
    if kwargs.get("out") is not None or not args or not isinstance(args[0], Tensor):
        return None
    name, first = name_of(func), args[0]
    if not (first.is_meta or name == "aten::addmm"):
        return None
    if name == "aten::convolution" and not args[6]:
        return _convolved(first, args[1], *args[3:6]) if not kwargs else None
    if not first.is_floating_point():
        return None
    if name == "aten::addmm" and len(args) == 3:
        return _multiplied(args[1], args[2]) if not kwargs else None
    if name == "aten::mm":
        return _multiplied(first, args[1])
    if name == "aten::max_pool2d_with_indices":
        return _pooled(first, *args[1:], **kwargs)
    if name == "aten::mean" and len(args) in (2, 3) and not kwargs:
        return _averaged(first, *args[1:])
    in_place = name.endswith("_")
    name = name.removesuffix("_")
    if name in _BINARY:
        if len(args) < 2 or "rounding_mode" in kwargs or not _leaves_shape(first, args[1]):
            return None
    elif name not in _UNARY:
        return None
    if in_place:
        return first
    return _empty(first, first.shape) if first.is_contiguous() else None


def _multiplied(left: Tensor, right: Tensor) -> Tensor | None:
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0] or not left.is_meta:
        return None
    return _empty(left, (left.shape[0], right.shape[1]))


def _leaves_shape(first: Tensor, other: Any) -> bool:
    """Whether an operation with it gives a tensor like the first."""
    if isinstance(other, Tensor):
        fits = other.ndim == 0 or (other.shape == first.shape and other.stride() == first.stride())
        return fits and other.dtype == first.dtype
    return isinstance(other, (int, float))


def _convolved(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> Tensor | None:
    sizes = _slid(x, weight.shape[2:], stride, padding, dilation)
    if sizes is None or x.shape[1] % weight.shape[1]:
        return None  # torch says what is wrong
    return _empty(x, (x.shape[0], weight.shape[0], *sizes))


def _pooled(
    x: Tensor, kernel: Any, stride: Any = (), padding: Any = (0, 0), dilation: Any = (1, 1), ceil_mode: bool = False
) -> tuple[Tensor, Tensor] | None:
    # torch says what is wrong with a padding beyond half the kernel
    if ceil_mode or len(kernel) != len(padding) or any(2 * p > k for k, p in zip(kernel, padding, strict=True)):
        return None
    sizes = _slid(x, kernel, stride or kernel, padding, dilation)
    if sizes is None:
        return None
    shape = (*x.shape[:2], *sizes)
    return _empty(x, shape), torch.empty(shape, dtype=torch.int64, device="meta")


def _slid(x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any) -> list[int] | None:
    """Sizes of the map that a window makes; None if it does not fit or comes in a short form."""
    dims = len(kernel)
    if x.ndim != dims + 2 or not x.is_contiguous():
        return None
    if any(len(values) != dims for values in (stride, padding, dilation)):
        return None
    sizes = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    ]
    return sizes if min(sizes, default=1) >= 1 else None


def _averaged(x: Tensor, dims: Any, keepdim: bool = False) -> Tensor | None:
    if not dims or any(not -x.ndim <= dim < x.ndim for dim in dims):
        return None
    gone = {dim % x.ndim for dim in dims}
    shape = [1 if axis in gone else size for axis, size in enumerate(x.shape) if keepdim or axis not in gone]
    return _empty(x, shape)


def _empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device="meta")
