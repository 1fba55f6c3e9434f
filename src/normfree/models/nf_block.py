"""The normaliser-free residual block (Brock et al. 2021, section 3), shared by every normaliser-free family."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..activation import Activation, activation_module
from ..layers import SqueezeExcite, StochasticDepth
from .network import BlockPlan, Convolution, Padding, Shortcut, conv_padding, shortcut_projection


class NFBlock(nn.Module):
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
        groups: of the 3×3 convolution.
        se_ratio: squeeze-and-excitation at the end of the branch with this ratio; 0 for none.
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
        se_ratio: float = 0.0,
        stochastic_depth_rate: float = 0.0,
        padding: Padding = "symmetric",
        shortcut: Shortcut = "strided",
    ):
        super().__init__()
        spatial = conv_padding(3, padding)
        self.alpha = alpha
        self.beta = beta
        self.activation = activation_module(activation)  # its input is the skip path, too: never in place
        self.conv_shortcut = shortcut_projection(conv, plan, shortcut, scale=1.0 / beta)
        self.conv0 = conv(plan.in_channels, mid_channels, 1, scale=1.0 / beta)
        self.activation1 = activation_module(activation, inplace=True)
        self.conv1 = conv(mid_channels, mid_channels, 3, stride=plan.stride, padding=spatial, groups=groups)
        self.activation2 = activation_module(activation, inplace=True)
        self.conv2 = conv(mid_channels, plan.out_channels, 1)
        self.squeeze_excite = SqueezeExcite(plan.out_channels, se_ratio) if se_ratio else None
        self.skip_gain = nn.Parameter(torch.tensor(float(skip_gain)))
        self.stochastic_depth = StochasticDepth(plan.stochastic_depth_rate(stochastic_depth_rate))

    def branch(self, x: Tensor) -> Tensor:
        """The residual branch, α and the skip gain included."""
        scale = self.skip_gain * self.alpha
        x = self.activation1(self.conv0(x))
        x = self.activation2(self.conv1(x))
        if self.squeeze_excite is None:
            return self.conv2(x, output_scale=scale)
        return self.squeeze_excite(self.conv2(x), output_scale=scale)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activation(x)
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(activated)
        return self.stochastic_depth(shortcut, self.branch, activated)
