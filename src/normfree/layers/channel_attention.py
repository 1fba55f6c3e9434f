"""Channel attention whose tiny gate carries every scalar."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..standardize import Scale


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation (Hu et al. 2018) whose tiny gate carries every scalar.

    The gate is mean over space, linear, ReLU, linear, sigmoid; in normaliser-free networks it is doubled to undo the
    sigmoid's halving (Brock et al. 2021, appendix).

    Args:
        channels: of the input and the output.
        ratio: hidden width = max(1, int(channels · ratio)).
        scale: factor on the gate.
        hidden: the hidden width itself, in place of the ratio.

    Shape:
        (N, channels, *size) to the same.
    """

    def __init__(self, channels: int, ratio: float = 0.25, scale: float = 2.0, hidden: int | None = None):
        super().__init__()
        if not ratio > 0:
            raise ValueError(f"ratio: expected a positive number, got {ratio}")
        hidden = max(1, int(channels * ratio)) if hidden is None else hidden
        self.scale = scale
        self.reduce = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, channels)
        for linear in (self.reduce, self.expand):
            std = 1.0 / math.sqrt(linear.in_features)
            nn.init.trunc_normal_(linear.weight, std=std, a=-2.0 * std, b=2.0 * std)
            nn.init.zeros_(linear.bias)

    def forward(self, input: Tensor, output_scale: Scale | None = None) -> Tensor:
        spatial = tuple(range(2, input.ndim))
        pooled = input.mean(dim=spatial) if spatial else input  # torch takes no axis for all of them
        gate = torch.sigmoid(self.expand(F.relu(self.reduce(pooled))))
        scale = self.scale if output_scale is None else output_scale * self.scale
        return input * (gate * scale).reshape(gate.shape + (1,) * len(spatial))


class EfficientChannelAttention(nn.Module):
    """Efficient channel attention (Wang et al. 2020) whose tiny gate carries every scalar.

    The gate is mean over space, a 1-D convolution along the channels, sigmoid; in normaliser-free networks it is
    doubled, as that of :class:`SqueezeExcite`.

    Args:
        channels: of the input and the output; the kernel has about (log2(channels) + 1) / 2 taps, odd, at least 3.
        scale: factor on the gate.

    Shape:
        (N, channels, *size) to the same.
    """

    def __init__(self, channels: int, scale: float = 2.0):
        super().__init__()
        taps = int((math.log2(channels) + 1.0) / 2.0)
        kernel_size = max(taps if taps % 2 else taps + 1, 3)
        self.scale = scale
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, input: Tensor, output_scale: Scale | None = None) -> Tensor:
        spatial = tuple(range(2, input.ndim))
        pooled = input.mean(dim=spatial) if spatial else input  # torch takes no axis for all of them
        gate = torch.sigmoid(self.conv(pooled.unsqueeze(1)).squeeze(1))
        scale = self.scale if output_scale is None else output_scale * self.scale
        return input * (gate * scale).reshape(gate.shape + (1,) * len(spatial))
