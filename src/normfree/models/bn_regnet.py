"""BN-RegNets B0 to B8: the NF-RegNets' topology with BatchNorm, and no α, β or skip gain."""

from __future__ import annotations

from functools import partial

from ..activation import Activation, activation_module
from .bn_parts import bn_conv, norm_activation
from .network import BlockPlan, Head, Padding, ResidualNetwork, Shortcut, Stem
from .registry import ModelEntry
from .regnet_layout import GROUP_SIZE, VARIANTS, ChannelMultiple, RegNetLayout, assemble_regnet, regnet_stem
from .resnetv2 import PreActivationBlock


def bn_regnet(
    variant: str,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    width: float = 1.0,
    channel_multiple: ChannelMultiple = 1,
    activation: Activation = "silu",
    drop_rate: float = 0.0,
    stochastic_depth_rate: float = 0.0,
    padding: Padding = "symmetric",
    shortcut: Shortcut = "avgpool",
    stem: Stem = "imagenet",
) -> ResidualNetwork:
    """BN-RegNet, pre-activation in the order BN, activation, convolution; the classifier starts at zero."""
    layout = RegNetLayout(VARIANTS[variant], width, channel_multiple)

    def make_block(plan: BlockPlan) -> PreActivationBlock:
        mid = layout.mid_channels(plan)
        return PreActivationBlock(
            plan,
            mid,
            activation,
            groups=mid // GROUP_SIZE,
            channel_attention=partial(layout.squeeze_excite, scale=1.0),
            attention_position="middle",
            stochastic_depth_rate=stochastic_depth_rate,
            padding=padding,
            shortcut=shortcut,
        )

    def make_head(features: int) -> Head:
        before_pool = norm_activation(features, activation_module(activation, inplace=True))
        return Head(before_pool, features, num_classes, drop_rate, weight_std=0.0)

    stem_layers = regnet_stem(bn_conv, in_channels, layout, stem, padding)
    return assemble_regnet(layout, stem_layers, make_block, bn_conv, make_head)


MODELS = {
    f"bn_regnet_{name}": ModelEntry(
        partial(bn_regnet, name, drop_rate=variant.drop_rate), f"BN-RegNet-{name.upper()}", data=variant.data
    )
    for name, variant in VARIANTS.items()
}
