"""Standardizing again in the backward pass, in place of keeping standardized weights until then."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._snapshot import Snapshot
from .layers.standardized_weight import StandardizedWeight
from .standardize import Scale


def recompute_standardization(model: nn.Module, enable: bool = True) -> None:
    """Whether the layers of a model standardize their weights again in the backward pass.

    A training pass otherwise keeps every standardized weight from the forward to the backward pass, beside the raw
    one, and on the CPU its memory until the next pass. With this it keeps neither, so that a normaliser-free network
    takes the memory of one with plain convolutions, for one standardization more. Inside
    :func:`normfree.shared_standardization`, in blocks that are checkpointed and under ``torch.compile`` it changes
    nothing. Parameters that change between the forward and the backward pass raise RuntimeError there, as autograd
    does for any tensor that it has saved.

    Args:
        model: its layers of this library take part; a copy of the model does as the model does.
        enable: False turns it off again.
    """
    for module in model.modules():
        if isinstance(module, StandardizedWeight):
            module._recomputes = Recomputed if enable else None


class Recomputed(torch.autograd.graph.saved_tensors_hooks):
    """A context for the operation that applies a standardized weight: what it saves of the weight is not kept."""

    def __init__(self, layer: Any, weight: Tensor, output_scale: Scale | None):
        address, layout = weight.data_ptr(), (weight.shape, weight.stride())
        scale = layer.weight_scale if output_scale is None else output_scale * layer.weight_scale
        sources = [tensor for tensor in (layer.weight, layer.gain, output_scale) if isinstance(tensor, Tensor)]
        snapshot = Snapshot.of(*sources)

        def pack(tensor: Tensor) -> Tensor | None:
            same = tensor.data_ptr() == address and (tensor.shape, tensor.stride()) == layout
            return None if same else tensor

        def unpack(kept: Tensor | None) -> Tensor:
            if kept is not None:
                return kept
            if not snapshot.is_of(*(t for t in (layer.weight, layer.gain, output_scale) if isinstance(t, Tensor))) or (
                not snapshot.is_current()
            ):
                raise RuntimeError(f"a parameter of {layer} changed between the forward and the backward pass")
            with torch.no_grad():
                again: Tensor = layer._scaled_weight(scale)
            return again

        super().__init__(pack, unpack)
