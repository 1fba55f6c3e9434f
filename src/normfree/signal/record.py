"""What a watched forward pass shows: where residual branches are added, and the signal there."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from .graph import Node
from .moments import ChannelMoments


@dataclass(eq=False, slots=True)
class ModuleCall:
    """One running or finished call of a module."""

    path: str
    first_node: int  # how many nodes there were when it began
    input: Tensor | None  # its first tensor, held only until the first block is known
    input_moments: ChannelMoments | None = None


@dataclass(eq=False)
class Merge:
    """One addition of a residual branch to a skip path.

    Attributes:
        block: the call of the innermost module that holds the whole branch; None for the model itself.
        branch_path: path of the module, directly below the block, that made the branch; "" if there is none.
        identity: whether nothing was computed on the skip path and the shape is that of the block's input.
        shape: of the block's output.
        axis: of its channels.
        moments: of the block's output.
        residual: of the branch, divided by the scalars that it was multiplied with.
        gradient: of the loss with respect to the block's output, if asked for.
    """

    block: ModuleCall | None
    branch_path: str
    identity: bool
    shape: tuple[int, ...]
    residual: ChannelMoments
    node: Node
    axis: int
    pending: Tensor | None = None  # the block's output as far as it is known, until it is measured
    moments: ChannelMoments | None = None
    gradient: ChannelMoments | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Number of channels, and of elements: what a stage has in common."""
        return size_of(self.shape, self.shape[self.axis])


@dataclass(eq=False)
class LayerOutput:
    """The output of one layer, for networks without residual merges."""

    path: str
    shape: tuple[int, ...]
    axis: int
    moments: ChannelMoments
    gradient: ChannelMoments | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Number of channels, and of elements."""
        return size_of(self.shape, self.shape[self.axis])


@dataclass
class TraceResult:
    """What one forward pass showed, or several together."""

    merges: list[Merge] = field(default_factory=list)
    layers: list[LayerOutput] = field(default_factory=list)
    stem_path: str = ""
    stem_shape: tuple[int, ...] = ()
    stem_moments: ChannelMoments | None = None
    stem_gradient: ChannelMoments | None = None

    def add(self, new: TraceResult) -> None:
        """Takes in another batch.

        Raises:
            ValueError: it has other merges or layers.
        """
        if len(self.merges) != len(new.merges) or len(self.layers) != len(new.layers):
            raise ValueError(
                f"model: it has {len(new.merges) or len(new.layers)} residual merges or layers on this batch and "
                f"{len(self.merges) or len(self.layers)} on the ones before; they must be the same on all"
            )
        self.stem_moments = _both(self.stem_moments, new.stem_moments)
        self.stem_gradient = _both(self.stem_gradient, new.stem_gradient)
        for merge, other in zip(self.merges, new.merges, strict=True):
            merge.moments = _both(merge.moments, other.moments)
            merge.residual = merge.residual.merge(other.residual)
            merge.gradient = _both(merge.gradient, other.gradient)
        for layer, other_layer in zip(self.layers, new.layers, strict=True):
            layer.moments = layer.moments.merge(other_layer.moments)
            layer.gradient = _both(layer.gradient, other_layer.gradient)


def _both(first: ChannelMoments | None, second: ChannelMoments | None) -> ChannelMoments | None:
    return first.merge(second) if first is not None and second is not None else None


def size_of(shape: tuple[int, ...], channels: int) -> tuple[int, int]:
    """What tells one stage from the next, in whatever layout: the number of channels, and of elements."""
    return channels, math.prod(shape)
