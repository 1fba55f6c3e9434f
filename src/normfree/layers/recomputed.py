"""What an operation saves of a standardized weight, made again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._snapshot import Snapshot
from ..standardize import Scale


@dataclass(frozen=True)
class _OfTheWeight:
    """A view of the whole weight, as its shape and strides: a linear layer saves it transposed."""

    shape: torch.Size
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Other:
    """A tensor that is kept; autograd looks at the versions only of what no hook has packed."""

    tensor: Tensor
    version: int


class Recomputed(torch.autograd.graph.saved_tensors_hooks):
    """A context for the operation that applies a standardized weight: what it saves of the weight is not kept.

    Args:
        standardize: of a raw weight, a gain and a scale; holds no layer, so that no graph does.
        raw: what ``weight`` was made from, in this order.
        weight: what the operation applies.
        name: of the layer, for errors.
    """

    def __init__(
        self, standardize: Callable[..., Tensor], raw: tuple[Tensor, Tensor | None, Scale], weight: Tensor, name: str
    ):
        address, version, shape, layout = weight.data_ptr(), weight._version, weight.shape, weight.stride()
        snapshot = Snapshot.of(*(tensor for tensor in raw if isinstance(tensor, Tensor)))

        def pack(tensor: Tensor) -> _OfTheWeight | _Other:
            if (
                tensor.layout is torch.strided
                and tensor.numel() == shape.numel()
                and tensor.data_ptr() == address
                and tensor._version == version
            ):
                return _OfTheWeight(tensor.shape, tensor.stride())
            return _Other(tensor.detach(), tensor._version)  # the tensor itself may be what the operation returns

        def unpack(kept: _OfTheWeight | _Other) -> Tensor:
            if isinstance(kept, _Other):
                if kept.tensor._version != kept.version:
                    raise RuntimeError(
                        f"one of the variables needed for gradient computation has been modified by an inplace "
                        f"operation: a tensor of shape {list(kept.tensor.shape)} that {name} has read is at version "
                        f"{kept.tensor._version}, not {kept.version}"
                    )
                return kept.tensor
            if not snapshot.is_unwritten():
                raise RuntimeError(f"a parameter of {name} changed between the forward and the backward pass")
            with torch.no_grad():
                again = standardize(*raw)
                if again.stride() != layout:  # under a transform the formula computes it, in an order of its own
                    again = torch.empty_strided(shape, layout, dtype=again.dtype, device=again.device).copy_(again)
            return again.as_strided(kept.shape, kept.strides)

        super().__init__(pack, unpack)
