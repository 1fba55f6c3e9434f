"""Running any model, however it is wrapped, and leaving it exactly as it was."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

NormStatistics = Literal["batch", "running"]
"""What BatchNorm normalises with: the statistics of the batch, as in training, or its running ones."""


def plain_module(model: nn.Module) -> nn.Module:
    """The module inside compiled and data-parallel wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def default_label(model: nn.Module) -> str:
    """The name that a model of this library was made by, or that of its class."""
    plain = plain_module(model)
    return getattr(getattr(plain, "info", None), "name", "") or type(plain).__name__


@contextlib.contextmanager
def undisturbed(model: nn.Module, norm_statistics: NormStatistics) -> Iterator[None]:
    """Evaluation mode, BatchNorm as asked for; afterwards modes, buffers and random numbers are as before."""
    training = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    for module in training:  # not eval(): what modules keep between passes, and do when the mode changes, is theirs
        module.training = norm_statistics == "batch" and isinstance(module, _BatchNorm)
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operation would hide a whole transformer layer
    try:
        with (
            torch.random.fork_rng(devices=cuda_devices(model)),
            _uncompiled(),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, mode in training.items():
            module.training = mode
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
            # compared by value: BatchNorm updates its statistics without telling their version counters
            if buffer is not None and value is not None and not buffer.is_meta and not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)


def _uncompiled() -> contextlib.AbstractContextManager[None]:
    """Compiled modules run as they were written; where nothing is compiled, the compiler need not be imported."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def cuda_devices(model: nn.Module) -> list[int]:
    """Indices of the CUDA devices that a model is on."""
    return sorted({parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"})
