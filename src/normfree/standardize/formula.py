"""Scaled Weight Standardization of a weight tensor (Brock et al. 2021, section 4.2, equation 3)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .ordinary import ORDINARY, looked_into, row_memory_is_dense

Scale = float | Tensor
"""A scalar that a weight carries: a constant, or a tensor with one element that may be learned."""

DEFAULT_EPS = 1e-4

EpsMode = Literal["floor", "added"]
"""How ``eps`` guards the division by the fan-in N times the variance: max(N · var, eps), or N · (var + eps)."""


def standardize_weight(
    weight: Tensor,
    gain: Tensor | None = None,
    scale: Scale = 1.0,
    eps: float = DEFAULT_EPS,
    eps_mode: EpsMode = "floor",
) -> Tensor:
    """Ŵ_i = gain_i · scale · (W_i − mean(W_i)) / sqrt(max(N · var(W_i), eps)) for each output unit i of fan-in N.

    The output units lie along the first axis, as in the weights of ``nn.Linear`` and ``nn.Conv*d``, whose fan-in is
    every other axis (for a grouped convolution that is the channels of one group times the taps). Every row of Ŵ
    then sums to 0 and has squares that sum to (gain_i · scale)².

    Args:
        weight: (out, *fan_in), at least two axes. Half-precision weights are standardized in float32.
        gain: (out,) or (out, 1, ...), one learnable factor per output unit; None for 1.
        scale: γ and any other scalar that the weight carries.
        eps: lower bound on N · var(W_i), which keeps a constant row finite.
        eps_mode: ``"floor"`` as above, or ``"added"`` for sqrt(N · (var(W_i) + eps)), timm's rule.

    Returns:
        Ŵ, with the shape and the dtype of ``weight``.

    Raises:
        ValueError: ``weight`` has fewer than two axes, or ``gain`` has not one element per output unit.
    """
    if weight.ndim < 2:
        raise ValueError(f"weight: expected (out, *fan_in) with at least two axes, got shape {tuple(weight.shape)}")
    check_gain(gain, weight.shape[0])
    full = at_least_float32(weight)
    if _is_plain(full, gain, scale):
        result = _fused(full, gain, scale, eps, eps_mode)
    else:
        result = composed(full, gain, scale, eps, eps_mode)
    return result if result.dtype == weight.dtype else result.to(weight.dtype)


def composed(weight: Tensor, gain: Tensor | None, scale: Scale, eps: float, eps_mode: EpsMode) -> Tensor:
    """The formula in operations that autograd, vmap and compilers know."""
    rows = weight.flatten(1)
    centred = rows - rows.mean(dim=1, keepdim=True)
    sum_of_squares = centred.square().sum(dim=1, keepdim=True)  # N · var
    guarded = sum_of_squares.clamp(min=eps) if eps_mode == "floor" else sum_of_squares + rows.shape[1] * eps
    factor = guarded.rsqrt() * scale
    if gain is not None:
        factor = factor * gain.reshape(-1, 1)
    return (centred * factor).reshape(weight.shape)


def _is_plain(weight: Tensor, gain: Tensor | None, scale: Scale) -> bool:
    """Whether the fused version may be used: ordinary tensors on the CPU, and nothing that looks into operations."""
    return (
        weight.device.type == "cpu"
        and type(weight) in ORDINARY
        and (gain is None or type(gain) in ORDINARY)
        and (not isinstance(scale, Tensor) or type(scale) in ORDINARY)
        and weight.numel() > 0
        and row_memory_is_dense(weight)
        and not looked_into()
    )


def _fused(weight: Tensor, gain: Tensor | None, scale: Scale, eps: float, eps_mode: EpsMode) -> Tensor:
    """The formula as one call of GroupNorm's kernel, forward and backward.

    Each row is a group with one channel, (W − mean) · rstd · affine. The kernel reads a row twice while it is in the
    cache, writes the result, and saves the raw weight and three numbers per row for its gradient.
    """
    if not weight.is_contiguous():
        last = weight.permute(0, *range(2, weight.ndim), 1)  # contiguous: channels_last
        return _fused(last, gain, scale, eps, eps_mode).permute(0, -1, *range(1, weight.ndim - 1))
    units, fan_in = weight.shape[0], weight.numel() // weight.shape[0]
    affine = _affine(gain, scale, weight, fan_in**-0.5)
    added = 0.0 if eps_mode == "floor" else eps
    rows = weight.view(units, fan_in)  # of more axes, the kernel would read some as channels_last
    result, _, rstd = torch.native_group_norm(rows, affine, None, 1, units, fan_in, units, added)  # one "example"
    if eps_mode == "floor" and rstd.max().item() > math.sqrt(fan_in / eps):
        return composed(weight, gain, scale, eps, eps_mode)  # the kernel knows no lower bound
    return result.view(weight.shape)


def _affine(gain: Tensor | None, scale: Scale, weight: Tensor, constant: float) -> Tensor:
    """gain · scale · constant: (out,), in the precision of ``weight``."""
    if isinstance(scale, Tensor):
        factor = scale.reshape(1) * constant
        result = factor.repeat(weight.shape[0]) if gain is None else gain.reshape(-1) * factor
    elif gain is None:
        return weight.new_full((weight.shape[0],), scale * constant)
    else:
        result = (gain if gain.ndim == 1 else gain.reshape(-1)) * (scale * constant)
    return result if result.dtype == weight.dtype else result.to(weight.dtype)


def check_gain(gain: Tensor | None, units: int) -> None:
    if gain is not None and gain.numel() != units:
        raise ValueError(f"gain: expected one element for each of {units} output units, got shape {tuple(gain.shape)}")


def at_least_float32(weight: Tensor) -> Tensor:
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
