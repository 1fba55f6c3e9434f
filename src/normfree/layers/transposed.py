"""Transposed convolutions with Scaled Weight Standardization."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activation import Activation
from ..gain import GainSource
from ..standardize import DEFAULT_EPS, Scale, standardize_transposed_weight
from .standardized_weight import Standardization, StandardizedWeight

_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


class WSConvTransposeNd(StandardizedWeight):
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Any
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Sequence[int] = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation = "relu",
        gain_source: GainSource = "exact",
        scale: float = 1.0,
        eps: float = DEFAULT_EPS,
        learnable_gain: bool = True,
    ):
        if isinstance(padding, str) and padding != "same":
            raise ValueError(f"padding: expected numbers or 'same', got {padding!r}")
        if padding == "same" and any(self._tuple(output_padding)):
            raise ValueError("output_padding: padding='same' fixes the output size, so it must be 0")
        init = cast(Callable[..., None], super().__init__)
        init(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            0 if padding == "same" else padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            device,
            dtype,
        )
        if padding == "same":
            self.padding = "same"
        self._init_standardization(out_channels, activation, gain_source, scale, eps, learnable_gain)

    @staticmethod
    def _tuple(value: int | Sequence[int]) -> tuple[int, ...]:
        return (value,) if isinstance(value, int) else tuple(value)

    def _standardization(self) -> Standardization:
        return partial(
            standardize_transposed_weight,
            eps=self.eps,
            groups=self.groups,
            stride=self.stride,
            dilation=self.dilation,
        )

    def _fan_in(self) -> int:
        taps = math.prod(self.kernel_size) / math.prod(self.stride)
        return max(1, round(self.in_channels // self.groups * taps))

    def _smallest_fan_in(self) -> int:
        # with a common divisor of stride and dilation, only every so many-th phase has taps, and more of them
        steps = [s // math.gcd(s, d) for s, d in zip(self.stride, self.dilation, strict=True)]
        fewest = [max(1, taps // step) for taps, step in zip(self.kernel_size, steps, strict=True)]
        return self.in_channels // self.groups * math.prod(fewest)

    def forward(self, input: Tensor, output_size: list[int] | None = None, output_scale: Scale | None = None) -> Tensor:
        """(N, C_in, *size) to (N, C_out, *size'), as the torch layer; times ``output_scale`` if one is given."""
        weight, bias = self.effective_weight(output_scale), self.effective_bias(output_scale)
        with self._applying(input, weight, output_scale):
            return self._apply_transposed(input, weight, bias, output_size)

    def _places(self, input: Tensor) -> int:
        return input.numel() // self.in_channels

    def _apply_transposed(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None
    ) -> Tensor:
        dims = len(self.kernel_size)
        transposed = _TRANSPOSED[dims]
        if self.padding != "same":
            output_padding = self._output_padding(  # type: ignore[attr-defined]
                input, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation
            )
            return transposed(
                input, weight, bias, self.stride, self.padding, output_padding, self.groups, self.dilation
            )
        if output_size is not None:
            raise ValueError("output_size: padding='same' fixes the output size at input size times stride")
        before, missing = self._same_padding()
        output = transposed(input, weight, bias, self.stride, before, missing, self.groups, self.dilation)
        for axis, step in zip(range(-dims, 0), self.stride, strict=True):
            output = output.narrow(axis, 0, input.shape[axis] * step)
        return output

    def _same_padding(self) -> tuple[list[int], list[int]]:
        """What is cut off in front, and added behind: the mirror image of a SAME convolution on the output's size."""
        reach = [spread * (taps - 1) + 1 for taps, spread in zip(self.kernel_size, self.dilation, strict=True)]
        surplus = [extent - step for extent, step in zip(reach, self.stride, strict=True)]
        return [max(extra, 0) // 2 for extra in surplus], [max(-extra, 0) for extra in surplus]


_WSCONV_TRANSPOSE_DOC = """A transposed {dims}-D convolution with Scaled Weight Standardization.

    Takes the arguments of ``nn.ConvTranspose{dims}d`` and is one. The fan-in of an output element is the input
    channels of its group times the kernel taps that reach it, which with a stride are only those of its phase; see
    :func:`normfree.standardize.standardize_transposed_weight`. Evaluation keeps weights as in :class:`WSConv{dims}d`.

    Args:
        padding: numbers as in torch, or ``"same"`` for an output of exactly input size times stride.
        activation, gain_source, scale, eps, learnable_gain: as :class:`WSConv{dims}d`.

    Shape:
        (N, in_channels, *size) to (N, out_channels, *size').

    Raises:
        ValueError: as the torch layer, and as :func:`normfree.gain` for the activation.
    """


class WSConvTranspose1d(WSConvTransposeNd, nn.ConvTranspose1d):
    __doc__ = _WSCONV_TRANSPOSE_DOC.format(dims=1)


class WSConvTranspose2d(WSConvTransposeNd, nn.ConvTranspose2d):
    __doc__ = _WSCONV_TRANSPOSE_DOC.format(dims=2)


class WSConvTranspose3d(WSConvTransposeNd, nn.ConvTranspose3d):
    __doc__ = _WSCONV_TRANSPOSE_DOC.format(dims=3)
