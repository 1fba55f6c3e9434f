"""TensorFlow-style SAME padding: the output has ceil(size / stride) elements, the extra pixel is at the far side."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def same_padding(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[tuple[int, int]]:
    """(before, after) in elements for every spatial axis."""
    pads = []
    for length, taps, step, spread in zip(size, kernel, stride, dilation, strict=True):
        total = max((-(-length // step) - 1) * step + spread * (taps - 1) + 1 - length, 0)
        pads.append((total // 2, total - total // 2))
    return pads


def as_pad_argument(pads: Sequence[tuple[int, int]]) -> list[int]:
    """The order of ``torch.nn.functional.pad``: last axis first, before and after in turn."""
    return [width for pair in reversed(pads) for width in pair]


class MaxPool2dSame(nn.Module):
    """Max pooling with SAME padding (padded with minus infinity): (N, C, H, W) to (N, C, ⌈H/s⌉, ⌈W/s⌉)."""

    def __init__(self, kernel_size: int, stride: int):
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride

    def forward(self, input: Tensor) -> Tensor:
        kernel, stride = (self.kernel_size,) * 2, (self.stride,) * 2
        pads = same_padding(input.shape[-2:], kernel, stride, (1, 1))
        return F.max_pool2d(F.pad(input, as_pad_argument(pads), value=float("-inf")), kernel, stride)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding=same"
