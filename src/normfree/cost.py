"""What a model costs: parameters and multiply-adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class ModelCost:
    """Number of parameters, and of multiply-adds of one forward pass (convolutions and matrix products)."""

    parameters: int
    multiply_adds: int


def model_cost(model: nn.Module, input_shape: Sequence[int] = (1, 3, 224, 224)) -> ModelCost:
    """Parameters and multiply-adds of any model, counted without computing anything.

    Args:
        model: any module whose forward takes one tensor and runs on the ``meta`` device.
        input_shape: (N, C, H, W), or whatever the model takes.

    Raises:
        RuntimeError: the forward pass fails at this input shape; the model's own error.
    """
    from torch.utils.flop_counter import FlopCounterMode

    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    on_meta = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            torch.func.functional_call(model, on_meta, (torch.empty(*input_shape, device="meta", dtype=dtype),))
    finally:
        for module, training in modes.items():
            module.training = training
    return ModelCost(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)
