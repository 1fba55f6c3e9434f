"""What an operation saves of a standardized weight, made again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._snapshot import Snapshot
from ..standardize import Scale

_View = tuple[torch.Size, tuple[int, ...]]
"""Shape and strides of a view of the whole weight: a linear layer saves it transposed."""


class Recomputed(torch.autograd.graph.saved_tensors_hooks):
    """A context for the operation that applies a standardized weight: what it saves of the weight is not kept.

    Args:
        standardize: of a raw weight, a gain and a scale.
        raw: what ``weight`` was made from, in this order.
        weight: what the operation applies.
        name: of the layer, for errors.
    """

    def __init__(
        self, standardize: Callable[..., Tensor], raw: tuple[Tensor, Tensor | None, Scale], weight: Tensor, name: str
    ):
        address, elements, layout = weight.data_ptr(), weight.numel(), weight.stride()
        snapshot = Snapshot.of(*(tensor for tensor in raw if isinstance(tensor, Tensor)))

        def pack(tensor: Tensor) -> Tensor | _View:
            same = tensor.data_ptr() == address and tensor.numel() == elements
            return (tensor.shape, tensor.stride()) if same else tensor

        def unpack(kept: Tensor | _View) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            if not snapshot.is_unwritten():
                raise RuntimeError(f"a parameter of {name} changed between the forward and the backward pass")
            with torch.no_grad():
                again = standardize(*raw)
            assert again.stride() == layout
            return again.as_strided(*kept)

        super().__init__(pack, unpack)
