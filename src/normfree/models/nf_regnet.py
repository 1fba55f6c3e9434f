"""NF-RegNets B0 to B8: grouped convolutions, gated in the middle of the branch (Brock et al. 2021, appendix)."""

from __future__ import annotations

from functools import partial

from ..activation import Activation, activation_module
from ..gain import GainSource
from ..standardize import EpsMode
from .network import BlockPlan, Head, Padding, ResidualNetwork, Shortcut, Stem, expected_stds
from .nf_block import GammaPlacement, NFBlock, nf_convolutions
from .registry import ModelEntry
from .regnet_layout import GROUP_SIZE, VARIANTS, ChannelMultiple, RegNetLayout, assemble_regnet, regnet_stem


def nf_regnet(
    variant: str,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    width: float = 1.0,
    channel_multiple: ChannelMultiple = 1,
    activation: Activation = "silu",
    alpha: float = 0.2,
    skip_gain: float = 1.0,
    drop_rate: float = 0.0,
    stochastic_depth_rate: float = 0.0,
    gain_source: GainSource = "exact",
    gamma_placement: GammaPlacement = "activation",
    eps_mode: EpsMode = "floor",
    padding: Padding = "symmetric",
    shortcut: Shortcut = "avgpool",
    stem: Stem = "imagenet",
) -> ResidualNetwork:
    """NF-RegNet; the classifier starts at zero. ``channel_multiple=8`` gives timm's widths."""
    layout = RegNetLayout(VARIANTS[variant], width, channel_multiple)
    convs = nf_convolutions(activation, gain_source, eps_mode, gamma_placement)
    betas = list(expected_stds(layout.plans, alpha))

    def make_block(plan: BlockPlan) -> NFBlock:
        mid = layout.mid_channels(plan)
        return NFBlock(
            plan,
            convs.activated,
            mid,
            activation,
            alpha,
            betas[plan.index],
            skip_gain,
            groups=mid // GROUP_SIZE,
            channel_attention=partial(layout.squeeze_excite, scale=2.0),
            attention_position="middle",
            stochastic_depth_rate=stochastic_depth_rate,
            padding=padding,
            shortcut=shortcut,
        )

    def make_head(features: int) -> Head:
        before_pool = activation_module(activation)
        return Head(before_pool, features, num_classes, drop_rate, convs.pooled_scale, weight_std=0.0)

    stem_layers = regnet_stem(convs.raw, in_channels, layout, stem, padding)
    return assemble_regnet(layout, stem_layers, make_block, convs.raw, make_head)


MODELS = {
    f"nf_regnet_{name}": ModelEntry(
        partial(nf_regnet, name, drop_rate=variant.drop_rate),
        f"NF-RegNet-{name.upper()}",
        batchnorm_twin=f"bn_regnet_{name}",
        data=variant.data,
    )
    for name, variant in VARIANTS.items()
}
