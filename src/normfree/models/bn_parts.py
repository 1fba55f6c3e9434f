"""What the BatchNorm families share: their convolution, and BatchNorm beside an activation."""

from __future__ import annotations

from functools import partial

from torch import nn

from ..layers import ScaledConv2d

bn_conv = partial(ScaledConv2d, bias=False)
"""A plain convolution without bias, He initialisation: BatchNorm has the bias."""


def norm_activation(channels: int, activation: nn.Module, norm_first: bool = True) -> nn.Sequential:
    """BatchNorm and activation in one of the two orders: (N, channels, H, W) to the same."""
    norm = nn.BatchNorm2d(channels)
    order = (("norm", norm), ("activation", activation)) if norm_first else (("activation", activation), ("norm", norm))
    layers = nn.Sequential()
    for name, layer in order:
        layers.add_module(name, layer)
    return layers
