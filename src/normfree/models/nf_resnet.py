"""NF-ResNets: pre-activation bottleneck ResNets with Scaled Weight Standardization (Brock et al. 2021)."""

from __future__ import annotations

from functools import partial
from typing import Literal

from ..activation import Activation, activation_module
from ..gain import GainSource
from ..layers import ScaledConv2d
from ..standardize import EpsMode
from .network import BlockPlan, Head, Padding, ResidualNetwork, Shortcut, Stem, build_stem, expected_stds
from .nf_block import GammaPlacement, NFBlock, NFConvolutions, nf_channel_attention, nf_convolutions
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
    gamma_placement: GammaPlacement = "activation",
    eps_mode: EpsMode = "floor",
    padding: Padding = "symmetric",
    shortcut: Shortcut = "strided",
    stem: Stem = "imagenet",
    se_ratio: float = 0.0,
    eca: bool = False,
    weights: Weights = "standardized",
) -> ResidualNetwork:
    """NF-ResNet. ``weights="he"`` replaces standardized weights by plain He-initialised ones, the paper's foil."""
    convs = NFConvolutions(ScaledConv2d, ScaledConv2d, 1.0)
    if weights == "standardized":
        convs = nf_convolutions(activation, gain_source, eps_mode, gamma_placement)
    attention = nf_channel_attention(se_ratio, eca)
    plans = [plan for stage in stage_plans(depth, width) for plan in stage]
    betas = list(expected_stds(plans, alpha))

    def make_block(plan: BlockPlan) -> NFBlock:
        return NFBlock(
            plan,
            convs.activated,
            bottleneck_width(plan),
            activation,
            alpha,
            betas[plan.index],
            skip_gain,
            channel_attention=attention,
            stochastic_depth_rate=stochastic_depth_rate,
            padding=padding,
            shortcut=shortcut,
        )

    def make_head(features: int) -> Head:
        return Head(activation_module(activation), features, num_classes, drop_rate, convs.pooled_scale)

    stem_layers = build_stem(convs.raw, in_channels, stem_width(width), stem, padding)
    return assemble(depth, width, stem_layers, make_block, make_head)


MODELS = {
    f"nf_{kind}resnet{depth}": ModelEntry(
        partial(nf_resnet, depth, se_ratio=se_ratio),
        f"NF-{kind.upper()}ResNet-{depth}",
        batchnorm_twin=f"{kind}resnetv2_{depth}",
    )
    for kind, se_ratio in SE_KINDS.items()
    for depth in DEPTHS
} | {
    f"nf_ecaresnet{depth}": ModelEntry(partial(nf_resnet, depth, eca=True), f"NF-ECAResNet-{depth}") for depth in DEPTHS
}
