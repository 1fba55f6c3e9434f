"""Depths and widths of the ResNets: the same for every family of them."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .network import BlockPlan, Head, ResidualNetwork, plan_stages, scaled_channels

DEPTHS: dict[int, tuple[int, int, int, int]] = {
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
    288: (24, 24, 24, 24),
    600: (50, 50, 50, 50),
}
"""Blocks per stage; the key is the usual name, 3 convolutions a block + 2."""

STEM_WIDTH = 64
WIDTHS = (256, 512, 1024, 2048)
STRIDES = (1, 2, 2, 2)
BOTTLENECK_RATIO = 0.25
SE_KINDS = {"": 0.0, "se": 0.25}
"""Prefix of a name, and the squeeze-and-excitation ratio that it stands for."""


def stem_width(width: float) -> int:
    """Channels after the stem of a network ``width`` times as wide as the table."""
    return scaled_channels(STEM_WIDTH, width)


def stage_plans(depth: int, width: float) -> list[list[BlockPlan]]:
    """The blocks of ResNet-``depth``, stage by stage."""
    return plan_stages(
        stem_width(width), [scaled_channels(channels, width) for channels in WIDTHS], DEPTHS[depth], STRIDES
    )


def bottleneck_width(plan: BlockPlan) -> int:
    """Channels inside a block."""
    return max(1, int(plan.out_channels * BOTTLENECK_RATIO))


def assemble(
    depth: int,
    width: float,
    stem: nn.Sequential,
    make_block: Callable[[BlockPlan], nn.Module],
    make_head: Callable[[int], Head],
) -> ResidualNetwork:
    """ResNet-``depth`` from its parts; ``make_head`` gets the number of features, blocks are made in order."""
    stages = stage_plans(depth, width)
    features = stages[-1][-1].out_channels
    blocks = [[make_block(plan) for plan in stage] for stage in stages]
    return ResidualNetwork(stem, blocks, make_head(features), features)
