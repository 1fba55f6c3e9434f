"""What has to hold before a weight is handed, as plain memory, to a kernel that nothing but autograd knows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

ORDINARY = (nn.Parameter, Tensor)
"""The types of tensors that do not follow operations themselves."""


def looked_into() -> bool:
    """Whether something follows operations other than autograd: a compiler, a tracer, a functional transform."""
    return bool(
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack()
        or forward_ad._current_level >= 0
    )


def row_memory_is_dense(weight: Tensor) -> bool:
    """Whether each output unit lies in one piece of memory, in whatever order of its axes."""
    return weight.is_contiguous() or _is_channels_last(weight)


def _is_channels_last(weight: Tensor) -> bool:
    if weight.ndim == 4:
        return weight.is_contiguous(memory_format=torch.channels_last)
    return weight.ndim == 5 and weight.is_contiguous(memory_format=torch.channels_last_3d)


def as_rows(tensor: Tensor) -> Tensor:
    """(out, N) on the same memory, whatever the order of the axes behind the first."""
    fan_in = tensor.numel() // tensor.shape[0]
    return tensor.as_strided((tensor.shape[0], fan_in), (fan_in, 1))
