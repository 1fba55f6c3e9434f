"""The points of a signal, from what a watched forward pass recorded."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from .moments import ChannelMoments
from .propagation import Kind, SignalPoint
from .record import Merge, TraceResult


def points_of(result: TraceResult) -> tuple[SignalPoint, ...]:
    """The stem and every block, or, without residual merges, every layer; in the order of execution."""
    if not result.merges:
        names = _unique([layer.path or "model" for layer in result.layers])
        stages = _stages([layer.size for layer in result.layers], first=0)
        return tuple(
            _point(name, stage, "layer", layer.shape, layer.moments, layer.gradient)
            for name, stage, layer in zip(names, stages, result.layers, strict=True)
        )
    assert result.stem_moments is not None
    stem = _point(result.stem_path or "input", 0, "stem", result.stem_shape, result.stem_moments, result.stem_gradient)
    names = _unique(_merge_names(result.merges))
    stages = _stages([merge.size for merge in result.merges], first=1)
    blocks = []
    for name, stage, merge in zip(names, stages, result.merges, strict=True):
        kind: Kind = "block" if merge.identity else "transition"
        assert merge.moments is not None
        blocks.append(_point(name, stage, kind, merge.shape, merge.moments, merge.gradient, merge.residual))
    return (stem, *blocks)


def _point(
    name: str,
    stage: int,
    kind: Kind,
    shape: tuple[int, ...],
    moments: ChannelMoments,
    gradient: ChannelMoments | None,
    residual: ChannelMoments | None = None,
) -> SignalPoint:
    return SignalPoint(
        name,
        stage,
        kind,
        shape,
        moments.average_squared_mean,
        moments.average_variance,
        None if residual is None else residual.average_variance,
        moments.nan_count,
        moments.inf_count,
        None if gradient is None else gradient.average_squared_mean,
        None if gradient is None else gradient.average_variance,
    )


def _merge_names(merges: Sequence[Merge]) -> list[str]:
    """A block's path for its last merge; for the others, and outside of blocks, the path of what made the branch."""
    last = {id(merge.block): index for index, merge in enumerate(merges) if merge.block is not None}
    names = []
    for index, merge in enumerate(merges):
        if merge.block is not None and last[id(merge.block)] == index:
            names.append(merge.block.path)
        else:
            names.append(merge.branch_path or (merge.block.path if merge.block is not None else "add"))
    return names


def _unique(names: Sequence[str]) -> list[str]:
    """Names that occur again, because a module is called more than once, get a number."""
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return unique


def _stages(sizes: Sequence[tuple[int, int]], first: int) -> list[int]:
    """Stage numbers that count up where the number of channels or of elements changes."""
    stages = [first] if sizes else []
    for before, after in itertools.pairwise(sizes):
        stages.append(stages[-1] + (before != after))
    return stages
