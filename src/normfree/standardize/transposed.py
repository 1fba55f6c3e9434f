"""Scaled Weight Standardization of a transposed convolution's weight, whose output units are spread over its taps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .formula import DEFAULT_EPS, Scale, at_least_float32, check_gain


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
    check_gain(gain, groups * per_group)
    kernel = weight.shape[2:]
    # (groups, in / groups, out / groups, taps)
    taps = at_least_float32(weight).reshape(groups, weight.shape[0] // groups, per_group, -1)
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
