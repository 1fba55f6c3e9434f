"""Widths, depths and sizes of RegNet B0 to B8: the same with and without BatchNorm (Brock et al. 2021, appendix)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..layers import SqueezeExcite
from .data import DataConfig, original_data_config
from .network import (
    BlockPlan,
    Convolution,
    Head,
    Padding,
    ResidualNetwork,
    Stem,
    conv_padding,
    plan_stages,
    scaled_channels,
)

ChannelMultiple = Literal[1, 8]
"""1: the exact widths; 8: every width rounded to a multiple of 8, as timm does."""

GROUP_SIZE = 8
WIDTH = 0.75
EXPANSION = 2.25
SE_RATIO = 0.5
STRIDES = (2, 2, 2, 2)


@dataclass(frozen=True)
class RegNetVariant:
    """One column of the table: widths before the factor 0.75, blocks per stage, sizes in pixels, dropout."""

    widths: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    train_size: int
    test_size: int
    drop_rate: float

    @property
    def data(self) -> DataConfig:
        return original_data_config(self.train_size, self.test_size)


VARIANTS = {
    "b0": RegNetVariant((48, 104, 208, 440), (1, 3, 6, 6), 192, 224, 0.2),
    "b1": RegNetVariant((48, 104, 208, 440), (2, 4, 7, 7), 224, 256, 0.2),
    "b2": RegNetVariant((56, 112, 232, 488), (2, 4, 8, 8), 240, 272, 0.3),
    "b3": RegNetVariant((56, 128, 248, 528), (2, 5, 9, 9), 288, 320, 0.3),
    "b4": RegNetVariant((64, 144, 288, 616), (2, 6, 11, 11), 320, 384, 0.4),
    "b5": RegNetVariant((80, 168, 336, 704), (3, 7, 14, 14), 384, 456, 0.4),
    "b6": RegNetVariant((88, 184, 376, 792), (3, 8, 16, 16), 448, 528, 0.5),
    "b7": RegNetVariant((96, 208, 416, 880), (4, 10, 19, 19), 512, 600, 0.5),
    "b8": RegNetVariant((104, 232, 456, 968), (4, 11, 22, 22), 600, 672, 0.5),
}


@dataclass(frozen=True)
class RegNetLayout:
    """A variant at one width: every channel count that it needs."""

    variant: RegNetVariant
    width: float = 1.0
    channel_multiple: ChannelMultiple = 1

    @property
    def stages(self) -> list[list[BlockPlan]]:
        widths = [self._round(width) for width in self._exact_widths]
        return plan_stages(self.stem_channels, widths, self.variant.depths, STRIDES)

    @property
    def plans(self) -> list[BlockPlan]:
        return [plan for stage in self.stages for plan in stage]

    @property
    def stem_channels(self) -> int:
        return self._round(self._exact_widths[0])

    @property
    def final_channels(self) -> int:
        """Channels of the last 1×1 convolution, in EfficientNet-B0's proportion to the last stage."""
        return max(1, self._round(1280 * self._exact_widths[-1] / 440))

    def mid_channels(self, plan: BlockPlan) -> int:
        """Channels inside a block: a multiple of the group size."""
        expanded = plan.in_channels * (1.0 if plan.index == 0 else EXPANSION)
        if self.channel_multiple == 1:
            return max(GROUP_SIZE, int(expanded) // GROUP_SIZE * GROUP_SIZE)
        return self._round(expanded)

    def squeeze_excite(self, channels: int, scale: float) -> SqueezeExcite:
        hidden = _nearest_multiple(channels * SE_RATIO, 8) if self.channel_multiple == 8 else None
        return SqueezeExcite(channels, SE_RATIO, scale, hidden)

    @property
    def _exact_widths(self) -> list[int]:
        return [scaled_channels(width, WIDTH * self.width) for width in self.variant.widths]

    def _round(self, channels: float) -> int:
        if self.channel_multiple == 1:
            return int(channels)
        rounded = _nearest_multiple(channels, 8)
        return rounded + 8 if rounded < 0.9 * channels else rounded


def _nearest_multiple(value: float, divisor: int) -> int:
    return max(divisor, int(value + divisor / 2) // divisor * divisor)


def regnet_stem(
    conv: Convolution, in_channels: int, layout: RegNetLayout, stem: Stem, padding: Padding
) -> nn.Sequential:
    """A 3×3 convolution, with stride 2 unless the images are small."""
    layers = nn.Sequential()
    stride = 1 if stem == "small" else 2
    layers.add_module(
        "conv", conv(in_channels, layout.stem_channels, 3, stride=stride, padding=conv_padding(3, padding))
    )
    return layers


def assemble_regnet(
    layout: RegNetLayout,
    stem: nn.Sequential,
    make_block: Callable[[BlockPlan], nn.Module],
    conv: Convolution,
    make_head: Callable[[int], Head],
) -> ResidualNetwork:
    """A RegNet from its parts; ``conv`` makes the last 1×1 convolution."""
    blocks = [[make_block(plan) for plan in stage] for stage in layout.stages]
    features = layout.final_channels
    final_conv = conv(layout.plans[-1].out_channels, features, 1)
    return ResidualNetwork(stem, blocks, make_head(features), features, final_conv)
