"""Scaled Weight Standardization of a weight tensor (Brock et al. 2021, section 4.2, equation 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

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
        result = _fused(full, _factor(gain, scale, full), eps, eps_mode)
    else:
        result = _composed(full, gain, scale, eps, eps_mode)
    return result.to(weight.dtype)


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
    tensors = [tensor for tensor in (weight, gain, scale) if isinstance(tensor, Tensor)]
    return (
        weight.device.type == "cpu"
        and weight.numel() > 0
        and all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
        and _row_memory_is_dense(weight)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._functorch.peek_interpreter_stack()
        and forward_ad._current_level < 0
    )


def _row_memory_is_dense(weight: Tensor) -> bool:
    """Whether each output unit lies in one piece of memory, in whatever order of its axes."""
    if weight.is_contiguous():
        return True
    if weight.ndim == 4:
        return weight.is_contiguous(memory_format=torch.channels_last)
    return weight.ndim == 5 and weight.is_contiguous(memory_format=torch.channels_last_3d)


def _factor(gain: Tensor | None, scale: Scale, weight: Tensor) -> Tensor:
    """gain · scale: (out,), in the precision of ``weight``."""
    if gain is None:
        if not isinstance(scale, Tensor):
            return weight.new_full((weight.shape[0],), scale)
        return scale.reshape(1).to(weight.dtype).expand(weight.shape[0])
    flat = gain.reshape(-1)
    if isinstance(scale, Tensor):
        return (flat * scale.reshape(1)).to(weight.dtype)
    return (flat if scale == 1.0 else flat * scale).to(weight.dtype)


def _fused(weight: Tensor, factor: Tensor, eps: float, eps_mode: EpsMode) -> Tensor:
    if torch.is_grad_enabled() and (weight.requires_grad or factor.requires_grad):
        return _Standardize.apply(weight, factor, eps, eps_mode)  # type: ignore[no-untyped-call]
    return _forward(weight, factor, eps, eps_mode)[0]


def _as_rows(tensor: Tensor) -> Tensor:
    """(out, N) on the same memory, whatever the order of the axes behind the first."""
    fan_in = tensor.numel() // tensor.shape[0]
    return tensor.as_strided((tensor.shape[0], fan_in), (fan_in, 1))


def _forward(
    weight: Tensor, factor: Tensor, eps: float, eps_mode: EpsMode
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Ŵ with the strides of ``weight``; and (out, 1) each: the rows' means, their divisors, and factor / divisor."""
    rows = _as_rows(weight)
    mean = rows.mean(dim=1, keepdim=True)
    result = rows - mean
    norm = torch.linalg.vector_norm(result, dim=1, keepdim=True)
    added = rows.shape[1] * eps
    divisor = norm.clamp_(min=math.sqrt(eps)) if eps_mode == "floor" else norm.square_().add_(added).sqrt_()
    quotient = factor.detach().unsqueeze(1) / divisor
    result.mul_(quotient)
    return result.as_strided(weight.shape, weight.stride()), (mean, divisor, quotient)


class _Standardize(torch.autograd.Function):
    """Saves the raw weight and two numbers per row; the gradient is one call of BatchNorm's backward kernel.

    Each row is a channel to BatchNorm, (W − mean) · inverse_std · affine, and its kernel gives the gradients of the
    row and of affine in one go. It also projects the gradient on the row, with the square of inverse_std, which must
    not happen where ``eps`` bounds the variance from below: there inverse_std is next to nothing, and affine makes up
    for it.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, factor: Tensor, eps: float, eps_mode: EpsMode) -> Tensor:
        result, of_rows = _forward(weight, factor, eps, eps_mode)
        ctx.save_for_backward(weight, factor, *of_rows)
        ctx.eps, ctx.eps_mode = eps, eps_mode
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        weight, factor, *of_rows = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() or not _is_plain(gradient, None, 1.0):
            return *_differentiable_backward(weight, factor, gradient, wanted, ctx.eps, ctx.eps_mode), None, None
        return *_backward(weight, gradient, of_rows, wanted, ctx.eps, ctx.eps_mode), None, None


_VANISHING = 1e-15


def _backward(
    weight: Tensor, gradient: Tensor, of_rows: Sequence[Tensor], wanted: Sequence[bool], eps: float, eps_mode: EpsMode
) -> tuple[Tensor | None, Tensor | None]:
    if gradient.stride() != weight.stride():
        gradient = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype).copy_(gradient)
    rows, upstream = _as_rows(weight), _as_rows(gradient)
    mean, divisor, quotient = (tensor.view(-1) for tensor in of_rows)
    inverse_std = math.sqrt(rows.shape[1]) / divisor
    if eps_mode == "floor":
        inverse_std.masked_fill_(divisor <= math.sqrt(eps) * (1.0 + 1e-6), _VANISHING)
    of_weight, of_affine, _ = torch.ops.aten.native_batch_norm_backward(
        upstream.unsqueeze(0),
        rows.unsqueeze(0),
        quotient / inverse_std,
        None,
        None,
        mean,
        inverse_std,
        True,
        0.0,
        [wanted[0], wanted[1], False],
    )
    of_factor = None
    if wanted[0]:
        of_weight = of_weight.as_strided(weight.shape, weight.stride())
    if wanted[1]:
        of_factor = of_affine / inverse_std.mul_(divisor)
    return of_weight if wanted[0] else None, of_factor


def _differentiable_backward(
    weight: Tensor, factor: Tensor, gradient: Tensor, wanted: Sequence[bool], eps: float, eps_mode: EpsMode
) -> tuple[Tensor | None, Tensor | None]:
    """The same by autograd, which can go through it once more."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        if not create_graph:
            weight, factor = (t.detach().requires_grad_(w) for t, w in zip((weight, factor), wanted, strict=True))
        result = _composed(weight, factor, 1.0, eps, eps_mode)
        inputs = [tensor for tensor, is_wanted in zip((weight, factor), wanted, strict=True) if is_wanted]
        found = iter(torch.autograd.grad(result, inputs, gradient, create_graph=create_graph))
    return next(found) if wanted[0] else None, next(found) if wanted[1] else None


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
