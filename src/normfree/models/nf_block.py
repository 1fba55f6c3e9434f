"""The normaliser-free residual block (Brock et al. 2021, section 3), shared by every normaliser-free family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ..activation import Activation, activation_module
from ..gain import GainSource, gain
from ..layers import EfficientChannelAttention, ScaledBranch, SqueezeExcite, StochasticDepth, WSConv2d
from ..standardize import DEFAULT_EPS, EpsMode
from .network import AttentionPosition, BlockPlan, Convolution, Padding, Shortcut, conv_padding, shortcut_projection

GammaPlacement = Literal["activation", "weight"]
"""Which convolutions carry γ: those behind an activation (and the pooled features are multiplied by it), or all."""

_ADDED_EPS = 1e-5


@dataclass(frozen=True)
class NFConvolutions:
    """The two convolutions of a normaliser-free network, and the factor on its pooled features."""

    raw: Convolution
    """Reads a signal of variance 1: the image, or the skip path."""
    activated: Convolution
    """Reads the output of an activation."""
    pooled_scale: float


def nf_convolutions(
    activation: Activation, gain_source: GainSource, eps_mode: EpsMode, gamma_placement: GammaPlacement
) -> NFConvolutions:
    """Standardized convolutions for one activation. ``eps`` is 1e-4, or 1e-5 where it is added to the variance."""
    eps = DEFAULT_EPS if eps_mode == "floor" else _ADDED_EPS
    conv = partial(WSConv2d, gain_source=gain_source, eps=eps, eps_mode=eps_mode)
    activated = partial(conv, activation=activation)
    if gamma_placement == "weight":
        return NFConvolutions(activated, activated, 1.0)
    return NFConvolutions(partial(conv, activation=None), activated, gain(activation, gain_source))


def nf_channel_attention(se_ratio: float, eca: bool) -> Callable[[int], nn.Module] | None:
    """What makes the channel attention that two options describe; None where they ask for none.

    Raises:
        ValueError: both kinds are asked for.
    """
    if se_ratio and eca:
        raise ValueError("eca: efficient channel attention stands in place of squeeze-and-excitation; set se_ratio=0")
    if eca:
        return EfficientChannelAttention
    return partial(SqueezeExcite, ratio=se_ratio) if se_ratio else None


class NFBlock(ScaledBranch):
    """shortcut(x) + α · s · branch(activation(x) / β), with every scalar in a weight.

    1/β is in the weights of the two convolutions that read the activated input, γ in the weight of each convolution
    behind an activation, α and the learnable skip gain s in the last layer of the branch.

    Args:
        plan: the block's place in the network.
        conv: makes a convolution; called with ``nn.Conv2d``'s arguments and ``scale``.
        mid_channels: channels inside the branch.
        activation: name, module or callable.
        alpha: α, the scale of the branch.
        beta: β, the expected standard deviation of the input.
        skip_gain: start value of s.
        groups: of the 3×3 convolutions.
        extra_conv: a second 3×3 convolution, without stride (NFNet).
        channel_attention: makes the channel attention for a number of channels; None for none.
        attention_position: ``"end"`` of the branch, or in its ``"middle"``, behind the 3×3 convolution (NF-RegNet).
        stochastic_depth_rate: of the whole network; the block's own follows from its place.
        padding, shortcut: styles, see :func:`normfree.create_model`.

    Shape:
        (N, in_channels, H, W) to (N, out_channels, ⌈H / stride⌉, ⌈W / stride⌉).
    """

    def __init__(
        self,
        plan: BlockPlan,
        conv: Convolution,
        mid_channels: int,
        activation: Activation,
        alpha: float,
        beta: float,
        skip_gain: float,
        groups: int = 1,
        extra_conv: bool = False,
        channel_attention: Callable[[int], nn.Module] | None = None,
        attention_position: AttentionPosition = "end",
        stochastic_depth_rate: float = 0.0,
        padding: Padding = "symmetric",
        shortcut: Shortcut = "strided",
    ):
        super().__init__()
        spatial = partial(conv, mid_channels, mid_channels, 3, padding=conv_padding(3, padding), groups=groups)
        self.alpha = alpha
        self.beta = beta
        self.attention_position = attention_position
        self.activation = activation_module(activation)  # its input is the skip path, too: never in place
        self.conv_shortcut = shortcut_projection(conv, plan, shortcut, scale=1.0 / beta)
        self.conv0 = conv(plan.in_channels, mid_channels, 1, scale=1.0 / beta)
        self.activation1 = activation_module(activation, inplace=True)
        self.conv1 = spatial(stride=plan.stride)
        self.activation1b = activation_module(activation, inplace=True) if extra_conv else None
        self.conv1b = spatial() if extra_conv else None
        self.activation2 = activation_module(activation, inplace=True)
        self.conv2 = conv(mid_channels, plan.out_channels, 1)
        self.channel_attention: nn.Module | None = None
        if channel_attention is not None:
            gated = plan.out_channels if attention_position == "end" else mid_channels
            self.channel_attention = channel_attention(gated)
        self.skip_gain: nn.Parameter | None = nn.Parameter(torch.tensor(float(skip_gain)))
        self.stochastic_depth = StochasticDepth(plan.stochastic_depth_rate(stochastic_depth_rate))

    def branch(self, x: Tensor) -> Tensor:
        """The residual branch, α and the skip gain included."""
        scale = self.output_scale()
        scaled = {} if scale is None else {"output_scale": scale}
        x = self.conv1(self.activation1(self.conv0(x)))
        if self.conv1b is not None and self.activation1b is not None:
            x = self.conv1b(self.activation1b(x))
        if self.channel_attention is None:
            return self.conv2(self.activation2(x), **scaled)
        if self.attention_position == "middle":
            return self.conv2(self.activation2(self.channel_attention(x)), **scaled)
        return self.channel_attention(self.conv2(self.activation2(x)), **scaled)

    def last_layer(self) -> nn.Module:
        at_end = self.channel_attention is not None and self.attention_position == "end"
        return cast(nn.Module, self.channel_attention) if at_end else self.conv2

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activation(x)
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(activated)
        return self.stochastic_depth(shortcut, self.branch, activated)
