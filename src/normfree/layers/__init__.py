"""Layers whose weight carries every scalar: Scaled Weight Standardization in 1-D, 2-D and 3-D, and gating.

Those with a weight are drop-in replacements for their ``torch.nn`` namesakes, of which they are subclasses.
"""

from .branch import ScaledBranch
from .channel_attention import EfficientChannelAttention, SqueezeExcite
from .convolution import ScaledConv2d, WSConv1d, WSConv2d, WSConv3d
from .linear import WSLinear
from .stochastic_depth import StochasticDepth
from .transposed import WSConvTranspose1d, WSConvTranspose2d, WSConvTranspose3d

__all__ = [
    "EfficientChannelAttention",
    "ScaledBranch",
    "ScaledConv2d",
    "SqueezeExcite",
    "StochasticDepth",
    "WSConv1d",
    "WSConv2d",
    "WSConv3d",
    "WSConvTranspose1d",
    "WSConvTranspose2d",
    "WSConvTranspose3d",
    "WSLinear",
]
