"""NFNets (Brock et al. 2021, "High-performance large-scale image recognition without normalization").

F0 to F7 as published, and timm's lighter L0 to L3, whose published weights are in wide use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from ..activation import Activation, activation_module
from ..gain import GainSource
from ..standardize import EpsMode
from .data import DataConfig, original_data_config
from .network import (
    BlockPlan,
    Head,
    Padding,
    ResidualNetwork,
    Shortcut,
    Stem,
    conv_padding,
    expected_stds,
    plan_stages,
    scaled_channels,
)
from .nf_block import GammaPlacement, NFBlock, NFConvolutions, nf_channel_attention, nf_convolutions
from .registry import ModelEntry

STRIDES = (1, 2, 2, 2)
STEM_STRIDES = (2, 1, 1, 2)


@dataclass(frozen=True)
class NFNetVariant:
    """What tells one NFNet from another: channels and blocks per stage, and the proportions inside a block."""

    depths: tuple[int, ...]
    widths: tuple[int, ...] = (256, 512, 1536, 1536)
    group_size: int = 128
    bottleneck_ratio: float = 0.5
    final_multiplier: float = 2.0

    def mid_channels(self, plan: BlockPlan) -> tuple[int, int]:
        """Channels inside a block, whole groups of them where there are enough, and the number of groups."""
        channels = max(1, int(plan.out_channels * self.bottleneck_ratio))
        groups = channels // self.group_size
        return (groups * self.group_size, groups) if groups else (channels, 1)


def nfnet(
    variant: NFNetVariant,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    width: float = 1.0,
    stem_width: int = 128,
    activation: Activation = "gelu_tanh",
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
    se_ratio: float = 0.5,
    eca: bool = False,
) -> ResidualNetwork:
    """NFNet. ``width`` leaves the stem alone, as the original does; ``stem_width`` is the channels behind it."""
    convs = nf_convolutions(activation, gain_source, eps_mode, gamma_placement)
    stages = plan_stages(
        stem_width, [scaled_channels(channels, width) for channels in variant.widths], variant.depths, STRIDES
    )
    plans = [plan for stage in stages for plan in stage]
    betas = list(expected_stds(plans, alpha))
    attention = nf_channel_attention(se_ratio, eca)

    def make_block(plan: BlockPlan) -> NFBlock:
        mid, groups = variant.mid_channels(plan)
        return NFBlock(
            plan,
            convs.activated,
            mid,
            activation,
            alpha,
            betas[plan.index],
            skip_gain,
            groups=groups,
            extra_conv=True,
            channel_attention=attention,
            stochastic_depth_rate=stochastic_depth_rate,
            padding=padding,
            shortcut=shortcut,
        )

    blocks = [[make_block(plan) for plan in stage] for stage in stages]
    features = int(plans[-1].out_channels * variant.final_multiplier)
    final_conv = convs.raw(plans[-1].out_channels, features, 1)
    head = Head(activation_module(activation), features, num_classes, drop_rate, convs.pooled_scale)
    stem_layers = _stem(convs, in_channels, stem_width, activation, stem, padding)
    return ResidualNetwork(stem_layers, blocks, head, features, final_conv)


def _stem(
    convs: NFConvolutions, in_channels: int, width: int, activation: Activation, stem: Stem, padding: Padding
) -> nn.Sequential:
    """Four 3×3 convolutions with activations between them, to 1/8, 1/4, 1/2 and all of ``width`` channels."""
    layers = nn.Sequential()
    for index, stride in enumerate(STEM_STRIDES):
        conv = convs.activated if index else convs.raw
        if index:
            layers.add_module(f"activation{index}", activation_module(activation))
        channels = width >> (len(STEM_STRIDES) - 1 - index)
        stride = 1 if stem == "small" else stride
        layers.add_module(
            f"conv{index}", conv(in_channels, channels, 3, stride=stride, padding=conv_padding(3, padding))
        )
        in_channels = channels
    return layers


def _repeated(times: int, **options: float) -> NFNetVariant:
    return replace(NFNetVariant(tuple(times * depth for depth in (1, 2, 6, 3))), **options)  # type: ignore[arg-type]


_F_SIZES = ((192, 256), (224, 320), (256, 352), (320, 416), (384, 512), (416, 544), (448, 576), (480, 608))
_F_DROP_RATES = (0.2, 0.3, 0.4, 0.4, 0.5, 0.5, 0.5, 0.5)
_L_SIZES = ((224, 288), (256, 320), (320, 384), (352, 448))
_L_FINAL_MULTIPLIERS = (1.5, 2.0, 2.0, 2.0)


def _light(level: int) -> NFNetVariant:
    final_multiplier = _L_FINAL_MULTIPLIERS[level]
    return _repeated(level + 1, group_size=64, bottleneck_ratio=0.25, final_multiplier=final_multiplier)


def _light_data(level: int) -> DataConfig:
    return DataConfig(*_L_SIZES[level], crop_fraction=1.0)


MODELS = {
    f"nfnet_f{level}": ModelEntry(
        partial(nfnet, _repeated(level + 1), drop_rate=drop_rate),
        f"NFNet-F{level}",
        data=original_data_config(*sizes),
    )
    for level, (sizes, drop_rate) in enumerate(zip(_F_SIZES, _F_DROP_RATES, strict=True))
}
MODELS["nfnet_l0"] = ModelEntry(
    partial(nfnet, _light(0), activation="silu", se_ratio=0.25), "NFNet-L0", data=_light_data(0)
)
MODELS |= {
    f"eca_nfnet_l{level}": ModelEntry(
        partial(nfnet, _light(level), activation="silu", se_ratio=0.0, eca=True),
        f"ECA-NFNet-L{level}",
        data=_light_data(level),
    )
    for level in range(4)
}
MODELS["test_nfnet"] = ModelEntry(
    partial(
        nfnet,
        NFNetVariant((1, 1, 1, 1), (32, 64, 96, 128), group_size=8, bottleneck_ratio=0.25, final_multiplier=1.5),
        activation="silu",
        se_ratio=0.25,
    ),
    "timm's test NFNet, small enough for tests",
    data=DataConfig(160, 160, crop_fraction=0.95, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
)
