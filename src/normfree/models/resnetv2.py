"""ResNetV2 with BatchNorm (He et al. 2016), in the usual order BN-ReLU-Conv and in ReLU-BN-Conv."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import Tensor, nn

from ..activation import Activation, activation_module
from ..layers import SqueezeExcite, StochasticDepth
from .bn_parts import bn_conv, norm_activation
from .network import (
    AttentionPosition,
    BlockPlan,
    Head,
    Padding,
    ResidualNetwork,
    Shortcut,
    Stem,
    build_stem,
    conv_padding,
)
from .network import shortcut_projection as projection
from .registry import ModelEntry
from .resnet_layout import DEPTHS, SE_KINDS, assemble, bottleneck_width, stem_width

Order = Literal["bn_relu", "relu_bn"]


class PreActivationBlock(nn.Module):
    """shortcut(x) + branch(normalised and activated x): (N, C_in, H, W) to (N, C_out, ⌈H / s⌉, ⌈W / s⌉).

    The shortcut of a transition block reads the normalised, activated signal.

    Args:
        plan: the block's place in the network.
        mid_channels: channels inside the branch.
        activation: name, module or callable.
        norm_first: BatchNorm in front of the activation rather than behind it.
        groups: of the 3×3 convolution.
        channel_attention, attention_position: as in :class:`normfree.models.nf_block.NFBlock`.
        stochastic_depth_rate: of the whole network; the block's own follows from its place.
        padding, shortcut: styles, see :func:`normfree.create_model`.
    """

    def __init__(
        self,
        plan: BlockPlan,
        mid_channels: int,
        activation: Activation,
        norm_first: bool = True,
        groups: int = 1,
        channel_attention: Callable[[int], nn.Module] | None = None,
        attention_position: AttentionPosition = "end",
        stochastic_depth_rate: float = 0.0,
        padding: Padding = "symmetric",
        shortcut: Shortcut = "strided",
    ):
        super().__init__()
        mid = mid_channels
        self.attention_position = attention_position
        # He's rule for what the convolutions read: a ReLU's output in one order, BatchNorm's in the other
        conv = partial(bn_conv, reads="relu" if norm_first else "linear")
        # where the activation comes first it reads the skip path, which must not be overwritten
        self.norm0 = norm_activation(plan.in_channels, activation_module(activation, inplace=norm_first), norm_first)
        self.conv_shortcut = projection(conv, plan, shortcut)
        self.conv0 = conv(plan.in_channels, mid, 1)
        self.norm1 = norm_activation(mid, activation_module(activation, inplace=True), norm_first)
        self.conv1 = conv(mid, mid, 3, stride=plan.stride, padding=conv_padding(3, padding), groups=groups)
        self.norm2 = norm_activation(mid, activation_module(activation, inplace=True), norm_first)
        self.conv2 = conv(mid, plan.out_channels, 1)
        self.channel_attention: nn.Module = nn.Identity()
        if channel_attention is not None:
            self.channel_attention = channel_attention(plan.out_channels if attention_position == "end" else mid)
        self.stochastic_depth = StochasticDepth(
            plan.stochastic_depth_rate(stochastic_depth_rate), batch_independent=False
        )

    def branch(self, x: Tensor) -> Tensor:
        x = self.conv1(self.norm1(self.conv0(x)))
        if self.attention_position == "middle":
            return self.conv2(self.norm2(self.channel_attention(x)))
        return self.channel_attention(self.conv2(self.norm2(x)))

    def forward(self, x: Tensor) -> Tensor:
        activated = self.norm0(x)
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(activated)
        return self.stochastic_depth(shortcut, self.branch, activated)


def resnetv2(
    depth: int,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    width: float = 1.0,
    activation: Activation = "relu",
    order: Order = "bn_relu",
    drop_rate: float = 0.0,
    stochastic_depth_rate: float = 0.0,
    padding: Padding = "symmetric",
    shortcut: Shortcut = "strided",
    stem: Stem = "imagenet",
    se_ratio: float = 0.0,
) -> ResidualNetwork:
    """ResNetV2; ``order="relu_bn"`` puts BatchNorm behind the activation."""
    norm_first = order == "bn_relu"
    attention = partial(SqueezeExcite, ratio=se_ratio, scale=1.0) if se_ratio else None

    def make_block(plan: BlockPlan) -> PreActivationBlock:
        return PreActivationBlock(
            plan,
            bottleneck_width(plan),
            activation,
            norm_first,
            channel_attention=attention,
            stochastic_depth_rate=stochastic_depth_rate,
            padding=padding,
            shortcut=shortcut,
        )

    def make_head(features: int) -> Head:
        last = norm_activation(features, activation_module(activation, inplace=norm_first), norm_first)
        return Head(last, features, num_classes, drop_rate)

    stem_layers = build_stem(bn_conv, in_channels, stem_width(width), stem, padding)
    return assemble(depth, width, stem_layers, make_block, make_head)


_ORDERS: tuple[tuple[Order, str, str], ...] = (
    ("bn_relu", "", "BN-ReLU-Conv"),
    ("relu_bn", "_relu_bn", "ReLU-BN-Conv"),
)
MODELS = {
    f"{kind}resnetv2_{depth}{suffix}": ModelEntry(
        partial(resnetv2, depth, order=order, se_ratio=se_ratio), f"{kind.upper()}ResNetV2-{depth}, {order_text}"
    )
    for kind, se_ratio in SE_KINDS.items()
    for order, suffix, order_text in _ORDERS
    for depth in DEPTHS
}
