"""Standardizing again in the backward pass, in place of keeping standardized weights until then."""

from __future__ import annotations

from typing import Literal

from torch import nn

from .layers.standardized_weight import StandardizedWeight


def recompute_standardization(model: nn.Module, enable: bool | Literal["auto"] = True) -> None:
    """Whether the layers of a model standardize their weights again in the backward pass.

    A training pass otherwise keeps every standardized weight from the forward to the backward pass, beside the raw
    one, and on the CPU its memory until the next pass. With this it keeps neither, so that a normaliser-free network
    takes the memory of one with plain convolutions, for one standardization more. Inside
    :func:`normfree.shared_standardization`, in blocks that are checkpointed and under ``torch.compile`` it changes
    nothing, and under autocast little. Parameters that change between the forward and the backward pass raise
    RuntimeError there, as autograd does for any tensor that it has saved.

    Args:
        model: its layers of this library take part; a copy of the model does as the model does.
        enable: True for every layer; False for none; ``"auto"``, which is what layers do from the start, for the large
            weights on a CPU that are applied in so many places that the convolution takes far longer than one
            standardization: from about batch 16 on at 224 px.

    Raises:
        ValueError: ``enable`` is none of these.
    """
    if not (enable == "auto" or isinstance(enable, bool)):
        raise ValueError(f'enable: expected True, False or "auto", got {enable!r}')
    for module in model.modules():
        if isinstance(module, StandardizedWeight):
            module._recomputes = enable
