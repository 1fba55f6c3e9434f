"""Scaled Weight Standardization of a weight tensor (Brock et al. 2021, section 4.2, equation 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

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
    _check_gain(gain, weight.shape[0])
    full = _at_least_float32(weight)
    if _is_plain(full, gain, scale):
        result = _fused(full, gain, scale, eps, eps_mode)
    else:
        result = _composed(full, gain, scale, eps, eps_mode)
    return result if result.dtype == weight.dtype else result.to(weight.dtype)


def _composed(weight: Tensor, gain: Tensor | None, scale: Scale, eps: float, eps_mode: EpsMode) -> Tensor:
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
        and type(weight) in _ORDINARY
        and (gain is None or type(gain) in _ORDINARY)
        and (not isinstance(scale, Tensor) or type(scale) in _ORDINARY)
        and weight.numel() > 0
        and _row_memory_is_dense(weight)
        and not looked_into()
    )


_ORDINARY = (nn.Parameter, Tensor)


def looked_into() -> bool:
    """Whether something follows operations other than autograd: a compiler, a tracer, a functional transform."""
    return bool(
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack()
        or forward_ad._current_level >= 0
    )


def _row_memory_is_dense(weight: Tensor) -> bool:
    """Whether each output unit lies in one piece of memory, in whatever order of its axes."""
    return weight.is_contiguous() or _is_channels_last(weight)


def _is_channels_last(weight: Tensor) -> bool:
    if weight.ndim == 4:
        return weight.is_contiguous(memory_format=torch.channels_last)
    return weight.ndim == 5 and weight.is_contiguous(memory_format=torch.channels_last_3d)


def _as_rows(tensor: Tensor) -> Tensor:
    """(out, N) on the same memory, whatever the order of the axes behind the first."""
    fan_in = tensor.numel() // tensor.shape[0]
    return tensor.as_strided((tensor.shape[0], fan_in), (fan_in, 1))


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
        return _composed(weight, gain, scale, eps, eps_mode)  # the kernel knows no lower bound
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


def standardize_transposed_weight(
    weight: Tensor,
    gain: Tensor | None = None,
    scale: Scale = 1.0,
    eps: float = DEFAULT_EPS,
    groups: int = 1,
    stride: Sequence[int] = (),
    dilation: Sequence[int] = (),
) -> Tensor:
    """Scaled Weight Standardization for a transposed convolution.

    The weight is (in, out / groups, *kernel). An element of the output at phase p = position mod stride meets only
    the kernel taps t with t · dilation ≡ p (mod stride), of every input channel of its group: those taps times
    in / groups are its fan-in. Each (output channel, phase) is therefore an output unit of its own. With stride 1
    there is one phase, and the unit is all of the channel's weights; with a larger stride, standardizing all taps
    together would leave the output with 1/stride of its variance per axis and a mean that differs between phases.

    Args:
        weight: (in, out / groups, *kernel).
        gain: (out,), or None.
        scale, eps: as in :func:`standardize_weight`.
        groups, stride, dilation: of the convolution; empty sequences mean 1 in every direction.

    Returns:
        Ŵ, with the shape and the dtype of ``weight``.

    Raises:
        ValueError: the shape does not fit ``groups`` or ``gain``.
    """
    if weight.ndim < 3 or weight.shape[0] % groups:
        raise ValueError(
            f"weight: expected (in, out / groups, *kernel) with in divisible by groups={groups}, "
            f"got shape {tuple(weight.shape)}"
        )
    per_group = weight.shape[1]
    _check_gain(gain, groups * per_group)
    kernel = weight.shape[2:]
    # (groups, in / groups, out / groups, taps)
    taps = _at_least_float32(weight).reshape(groups, weight.shape[0] // groups, per_group, -1)
    stride, dilation = stride or (1,) * len(kernel), dilation or (1,) * len(kernel)
    phase = _phase_of_taps(kernel, stride, dilation, taps.device)
    is_member = phase.unsqueeze(1) == torch.arange(math.prod(stride), device=taps.device)  # (taps, phases)
    member = is_member.to(taps.dtype)

    def sum_within_phase(values: Tensor) -> Tensor:  # (..., taps) to (..., phases)
        return (values.unsqueeze(-1) * member).sum(dim=-2)  # a matrix product would lose precision under autocast

    fan_in = (taps.shape[1] * member.sum(dim=0)).clamp(min=1.0)
    mean = sum_within_phase(taps.sum(dim=1)) / fan_in  # (groups, out / groups, phases)
    centred = taps - mean.index_select(-1, phase).unsqueeze(1)
    sum_of_squares = sum_within_phase(centred.square().sum(dim=1))
    factor = sum_of_squares.clamp(min=eps).rsqrt() * scale
    if gain is not None:
        factor = factor * gain.reshape(groups, per_group, 1)
    return (centred * factor.index_select(-1, phase).unsqueeze(1)).reshape(weight.shape).to(weight.dtype)


def _phase_of_taps(
    kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], device: torch.device
) -> Tensor:
    """For every kernel tap, in storage order, the number of the output phase that it contributes to."""
    phase = torch.zeros(1, dtype=torch.long, device=device)
    for size, step, spread in zip(kernel, stride, dilation, strict=True):
        phase = (phase.unsqueeze(1) * step + torch.arange(size, device=device) * spread % step).flatten()
    return phase


def _check_gain(gain: Tensor | None, units: int) -> None:
    if gain is not None and gain.numel() != units:
        raise ValueError(f"gain: expected one element for each of {units} output units, got shape {tuple(gain.shape)}")


def _at_least_float32(weight: Tensor) -> Tensor:
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
