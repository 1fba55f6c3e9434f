"""Standardizing many weights at once: in one launch where a kernel for it may be used."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec

import torch
from torch import Tensor

from .formula import EpsMode, Scale, composed
from .ordinary import ORDINARY, looked_into, row_memory_is_dense

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Request:
    """The arguments of one :func:`normfree.standardize_weight`."""

    weight: Tensor
    gain: Tensor | None
    scale: Scale
    eps: float
    eps_mode: EpsMode

    def kind(self) -> tuple[torch.device, torch.dtype, float, EpsMode]:
        """What requests of one launch have in common."""
        return self.weight.device, self.weight.dtype, self.eps, self.eps_mode


def may_launch(weight: Tensor, gain: Tensor | None, scale: Scale) -> bool:
    """Whether the Triton kernel may standardize this weight.

    That takes a dense weight on a CUDA device, Triton, and nothing that looks into operations. The environment
    variable ``NORMFREE_TRITON=0`` turns the kernel off; ``interpret`` lets it run on the CPU, together with Triton's
    own ``TRITON_INTERPRET=1``, to check it.
    """
    if weight.device.type != "cuda" and _switch() != "interpret":
        return False
    tensors = [tensor for tensor in (weight, gain, scale) if isinstance(tensor, Tensor)]
    return (
        _switch() != "0"
        and not looked_into()
        and not _only_formula.get()
        and _has_triton()
        and weight.dtype in _DTYPES
        and weight.numel() > 0
        and all(type(t) in ORDINARY and t.device == weight.device for t in tensors)
        and row_memory_is_dense(weight)
        and not (weight.is_cuda and torch.cuda.is_current_stream_capturing())  # addresses travel from the host
    )


_only_formula: ContextVar[bool] = ContextVar("only_formula", default=False)


@contextmanager
def formula_only() -> Iterator[None]:
    """Inside, the formula standardizes and not the Triton kernel, as where a CUDA graph is captured."""
    token = _only_formula.set(True)
    try:
        yield
    finally:
        _only_formula.reset(token)


def standardize_together(requests: Sequence[Request]) -> list[Tensor]:
    """Every request's standardized weight, with one launch for all requests of a kind; each must be one that may be."""
    results: list[Tensor | None] = [None] * len(requests)
    for kind in dict.fromkeys(request.kind() for request in requests):
        indices = [index for index, request in enumerate(requests) if request.kind() == kind]
        for index, result in zip(indices, _launch([requests[index] for index in indices]), strict=True):
            results[index] = result
    return [result for result in results if result is not None]


def _launch(requests: Sequence[Request]) -> Sequence[Tensor]:
    from .triton_kernel import StandardizeMany

    first = requests[0]
    truth = partial(_truth, eps=first.eps, eps_mode=first.eps_mode)
    weights = [request.weight for request in requests]
    return StandardizeMany.apply(_factors(requests), first.eps, first.eps_mode == "added", truth, *weights)  # type: ignore[no-untyped-call, no-any-return]


def _truth(weight: Tensor, factor: Tensor, eps: float, eps_mode: EpsMode) -> Tensor:
    full = weight.to(factor.dtype)
    return composed(full, factor, 1.0, eps, eps_mode).to(weight.dtype)


def _factors(requests: Sequence[Request]) -> Tensor:
    """gain · scale of every unit of all requests."""
    dtype = torch.float64 if requests[0].weight.dtype == torch.float64 else torch.float32
    gains, scales = [], []
    for request in requests:
        units, gain, scale = len(request.weight), request.gain, request.scale
        gain = request.weight.new_ones(units, dtype=dtype) if gain is None else gain.reshape(-1).to(dtype)
        if isinstance(scale, Tensor):
            gain, scale = gain * scale.reshape(1), 1.0
        gains.append(gain)
        scales.append(float(scale))
    return torch.cat(torch._foreach_mul(gains, scales)).to(dtype)


def _switch() -> str:
    return os.environ.get("NORMFREE_TRITON", "")


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
