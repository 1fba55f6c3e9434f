"""ResNetV1 with BatchNorm (He et al. 2015): post-activation, stride in the 3×3 convolution."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from ..activation import Activation, activation_module
from ..layers import StochasticDepth
from .bn_parts import bn_conv, norm_activation
from .network import BlockPlan, Head, Padding, ResidualNetwork, Shortcut, Stem, build_stem, conv_padding
from .network import shortcut_projection as projection
from .registry import ModelEntry
from .resnet_layout import DEPTHS, assemble, bottleneck_width, stem_width


class PostActivationBlock(nn.Module):
    """activation(shortcut(x) + branch(x)): (N, C_in, H, W) to (N, C_out, ⌈H / s⌉, ⌈W / s⌉)."""

    def __init__(
        self,
        plan: BlockPlan,
        activation: Activation,
        stochastic_depth_rate: float,
        padding: Padding,
        shortcut: Shortcut,
    ):
        super().__init__()
        mid = bottleneck_width(plan)
        projected = projection(bn_conv, plan, shortcut)
        self.shortcut: nn.Module = nn.Identity()
        if projected is not None:
            self.shortcut = nn.Sequential(projected, nn.BatchNorm2d(plan.out_channels))
        self.conv0 = bn_conv(plan.in_channels, mid, 1)
        self.norm0 = norm_activation(mid, activation_module(activation, inplace=True))
        self.conv1 = bn_conv(mid, mid, 3, stride=plan.stride, padding=conv_padding(3, padding))
        self.norm1 = norm_activation(mid, activation_module(activation, inplace=True))
        self.conv2 = bn_conv(mid, plan.out_channels, 1)
        self.norm2 = nn.BatchNorm2d(plan.out_channels)
        self.stochastic_depth = StochasticDepth(
            plan.stochastic_depth_rate(stochastic_depth_rate), batch_independent=False
        )
        self.activation = activation_module(activation, inplace=True)

    def branch(self, x: Tensor) -> Tensor:
        x = self.norm0(self.conv0(x))
        x = self.norm1(self.conv1(x))
        return self.norm2(self.conv2(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.stochastic_depth(self.shortcut(x), self.branch, x))


def resnetv1(
    depth: int,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    width: float = 1.0,
    activation: Activation = "relu",
    drop_rate: float = 0.0,
    stochastic_depth_rate: float = 0.0,
    padding: Padding = "symmetric",
    shortcut: Shortcut = "strided",
    stem: Stem = "imagenet",
) -> ResidualNetwork:
    """ResNetV1, with the parameters of torchvision's."""

    def make_block(plan: BlockPlan) -> PostActivationBlock:
        return PostActivationBlock(plan, activation, stochastic_depth_rate, padding, shortcut)

    def make_head(features: int) -> Head:
        return Head(nn.Identity(), features, num_classes, drop_rate)

    norm = norm_activation(stem_width(width), activation_module(activation, inplace=True))
    stem_layers = build_stem(bn_conv, in_channels, stem_width(width), stem, padding, after_conv=[("norm", norm)])
    return assemble(depth, width, stem_layers, make_block, make_head)


MODELS = {f"resnetv1_{depth}": ModelEntry(partial(resnetv1, depth), f"ResNetV1-{depth}") for depth in DEPTHS}
