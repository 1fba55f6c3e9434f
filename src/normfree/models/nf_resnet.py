"""NF-ResNets: pre-activation bottleneck ResNets with Scaled Weight Standardization (Brock et al. 2021)."""

from __future__ import annotations

from functools import partial
from typing import Literal

from ..activation import Activation, activation_module
from ..gain import GainSource, gain
from ..layers import ScaledConv2d, WSConv2d
from .network import BlockPlan, Convolution, Head, Padding, ResidualNetwork, Shortcut, Stem, build_stem, expected_stds
from .nf_block import NFBlock
from .registry import ModelEntry
from .resnet_layout import DEPTHS, SE_KINDS, assemble, bottleneck_width, stage_plans, stem_width

Weights = Literal["standardized", "he"]


def nf_resnet(
    depth: int,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    width: float = 1.0,
    activation: Activation = "relu",
    alpha: float = 0.2,
    skip_gain: float = 1.0,
    drop_rate: float = 0.0,
    stochastic_depth_rate: float = 0.0,
    gain_source: GainSource = "exact",
    padding: Padding = "symmetric",
    shortcut: Shortcut = "strided",
    stem: Stem = "imagenet",
    se_ratio: float = 0.0,
    weights: Weights = "standardized",
) -> ResidualNetwork:
    """NF-ResNet. ``weights="he"`` replaces standardized weights by plain He-initialised ones, the paper's foil."""
    standardized = weights == "standardized"
    gamma = gain(activation, gain_source) if standardized else 1.0
    stem_conv: Convolution = partial(WSConv2d, activation=None) if standardized else ScaledConv2d
    conv: Convolution = ScaledConv2d
    if standardized:
        conv = partial(WSConv2d, activation=activation, gain_source=gain_source)
    plans = [plan for stage in stage_plans(depth, width) for plan in stage]
    betas = list(expected_stds(plans, alpha))

    def make_block(plan: BlockPlan) -> NFBlock:
        return NFBlock(
            plan,
            conv,
            bottleneck_width(plan),
            activation,
            alpha,
            betas[plan.index],
            skip_gain,
            se_ratio=se_ratio,
            stochastic_depth_rate=stochastic_depth_rate,
            padding=padding,
            shortcut=shortcut,
        )

    def make_head(features: int) -> Head:
        return Head(activation_module(activation), features, num_classes, drop_rate, pooled_scale=gamma)

    stem_layers = build_stem(stem_conv, in_channels, stem_width(width), stem, padding)
    return assemble(depth, width, stem_layers, make_block, make_head)


MODELS = {
    f"nf_{kind}resnet{depth}": ModelEntry(
        partial(nf_resnet, depth, se_ratio=se_ratio),
        f"NF-{kind.upper()}ResNet-{depth}",
        batchnorm_twin=f"{kind}resnetv2_{depth}",
    )
    for kind, se_ratio in SE_KINDS.items()
    for depth in DEPTHS
}
