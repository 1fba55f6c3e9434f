"""FixUp ResNets (Zhang et al. 2019): scalar biases, one scalar multiplier per branch, and small initial weights."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from ..activation import Activation, activation_module
from ..layers import ScaledConv2d, StochasticDepth
from .network import BlockPlan, Head, Padding, ResidualNetwork, Shortcut, Stem, build_stem, conv_padding
from .network import shortcut_projection as projection
from .registry import ModelEntry
from .resnet_layout import DEPTHS, assemble, bottleneck_width, stem_width

_conv = partial(ScaledConv2d, bias=False)


class ScalarBias(nn.Module):
    """Adds one learnable scalar, 0 at the start, to every element."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class FixUpBlock(nn.Module):
    """activation(branch(x + b) + shortcut(x + b)): (N, C_in, H, W) to (N, C_out, ⌈H / s⌉, ⌈W / s⌉).

    The multiplier of the branch is in the weight of its last convolution.
    """

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
        self.bias1a, self.bias1b = ScalarBias(), ScalarBias()
        self.bias2a, self.bias2b = ScalarBias(), ScalarBias()
        self.bias3a, self.bias3b = ScalarBias(), ScalarBias()
        self.scale = nn.Parameter(torch.ones(()))
        self.conv_shortcut = projection(_conv, plan, shortcut)
        self.conv0 = _conv(plan.in_channels, mid, 1)
        self.activation1 = activation_module(activation, inplace=True)
        self.conv1 = _conv(mid, mid, 3, stride=plan.stride, padding=conv_padding(3, padding))
        self.activation2 = activation_module(activation, inplace=True)
        self.conv2 = _conv(mid, plan.out_channels, 1)
        self.stochastic_depth = StochasticDepth(plan.stochastic_depth_rate(stochastic_depth_rate))
        self.activation = activation_module(activation, inplace=True)
        self._init_weights(plan)

    def _init_weights(self, plan: BlockPlan) -> None:
        for conv in (self.conv0, self.conv1):
            taps = conv.out_channels * math.prod(conv.kernel_size)
            nn.init.normal_(conv.weight, std=math.sqrt(2.0 / taps) * plan.total**-0.25)
        nn.init.zeros_(self.conv2.weight)
        if self.conv_shortcut is not None:
            for module in self.conv_shortcut.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.normal_(module.weight, std=math.sqrt(2.0 / plan.out_channels))

    def branch(self, x: Tensor) -> Tensor:
        x = self.activation1(self.bias1b(self.conv0(x)))
        x = self.activation2(self.bias2b(self.conv1(self.bias2a(x))))
        return self.bias3b(self.conv2(self.bias3a(x), output_scale=self.scale))

    def forward(self, x: Tensor) -> Tensor:
        biased = self.bias1a(x)
        shortcut = biased if self.conv_shortcut is None else self.conv_shortcut(biased)
        return self.activation(self.stochastic_depth(shortcut, self.branch, biased))


def fixup_resnet(
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
    """FixUp ResNet: post-activation, no convolution has a bias, the last one of every branch starts at 0."""

    def make_block(plan: BlockPlan) -> FixUpBlock:
        return FixUpBlock(plan, activation, stochastic_depth_rate, padding, shortcut)

    def make_head(features: int) -> Head:
        return Head(nn.Identity(), features, num_classes, drop_rate, weight_std=0.0, scalar_bias=ScalarBias())

    after_conv = [("bias1", ScalarBias()), ("activation", activation_module(activation, inplace=True))]
    stem_layers = build_stem(_conv, in_channels, stem_width(width), stem, padding, after_conv)
    return assemble(depth, width, stem_layers, make_block, make_head)


MODELS = {
    f"fixup_resnet{depth}": ModelEntry(
        partial(fixup_resnet, depth), f"FixUp ResNet-{depth}", batchnorm_twin=f"resnetv1_{depth}"
    )
    for depth in DEPTHS
}
