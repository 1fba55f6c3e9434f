"""SkipInit ResNets (De and Smith 2020): plain convolutions, and a learnable scalar on each branch that starts at 0."""

from __future__ import annotations

from functools import partial

from ..activation import Activation, activation_module
from ..layers import ScaledConv2d
from .network import BlockPlan, Head, Padding, ResidualNetwork, Shortcut, Stem, build_stem
from .nf_block import NFBlock
from .registry import ModelEntry
from .resnet_layout import DEPTHS, assemble, bottleneck_width, stem_width


def skipinit_resnet(
    depth: int,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    width: float = 1.0,
    activation: Activation = "relu",
    skip_gain: float = 0.0,
    drop_rate: float = 0.0,
    stochastic_depth_rate: float = 0.0,
    padding: Padding = "symmetric",
    shortcut: Shortcut = "strided",
    stem: Stem = "imagenet",
) -> ResidualNetwork:
    """SkipInit ResNet: the NF-ResNet's topology without weight standardization, β or α."""

    def make_block(plan: BlockPlan) -> NFBlock:
        return NFBlock(
            plan,
            ScaledConv2d,
            bottleneck_width(plan),
            activation,
            alpha=1.0,
            beta=1.0,
            skip_gain=skip_gain,
            stochastic_depth_rate=stochastic_depth_rate,
            padding=padding,
            shortcut=shortcut,
        )

    def make_head(features: int) -> Head:
        return Head(activation_module(activation), features, num_classes, drop_rate)

    stem_layers = build_stem(partial(ScaledConv2d, bias=False), in_channels, stem_width(width), stem, padding)
    return assemble(depth, width, stem_layers, make_block, make_head)


MODELS = {
    f"skipinit_resnet{depth}": ModelEntry(
        partial(skipinit_resnet, depth), f"SkipInit ResNet-{depth}", batchnorm_twin=f"resnetv2_{depth}"
    )
    for depth in DEPTHS
}
