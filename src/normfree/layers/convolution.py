"""Convolutions whose weight carries every scalar, plain and with Scaled Weight Standardization."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activation import Activation
from ..gain import GainSource
from ..padding import as_pad_argument, same_padding
from ..standardize import DEFAULT_EPS, EpsMode, Scale
from .scaled_weight import ScaledWeight
from .standardized_weight import StandardizedWeight

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ScaledConvNd(ScaledWeight):
    """Calls a torch convolution with the effective weight, and knows SAME padding at every stride."""

    padding: Any
    padding_mode: Any
    in_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def _init_convolution(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        padding: int | str | Sequence[int],
        *args: Any,
    ) -> None:
        # torch refuses padding="same" with a stride; here it then means what it means in TensorFlow
        init = cast(Callable[..., None], super().__init__)
        init(in_channels, out_channels, kernel_size, stride, 0 if padding == "same" else padding, *args)
        if padding == "same":
            self.padding = "same"

    def forward(self, input: Tensor, output_scale: Scale | None = None) -> Tensor:
        """(N, C_in, *size) to (N, C_out, *size'), as the torch layer; times ``output_scale`` if one is given."""
        weight, bias = self.effective_weight(output_scale), self.effective_bias(output_scale)
        with self._applying(input, weight, output_scale):
            return self._conv_forward(input, weight, bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding != "same":
            return super()._conv_forward(input, weight, bias)  # type: ignore[misc]
        dims = len(self.kernel_size)
        pads = same_padding(input.shape[-dims:], self.kernel_size, self.stride, self.dilation)
        padding: Sequence[int] = (0,) * dims
        if self.padding_mode == "zeros" and all(before == after for before, after in pads):
            padding = [before for before, _ in pads]  # the convolution pads faster than a copy does
        else:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = F.pad(input, as_pad_argument(pads), mode=mode)
        return _CONVOLUTIONS[dims](input, weight, bias, self.stride, padding, self.dilation, self.groups)


class ScaledConv2d(ScaledConvNd, nn.Conv2d):
    """A plain 2-D convolution whose weight carries scalars: He initialisation, bias 0, no standardization.

    Args:
        scale: what stands in front of it.
        reads: what the weights are initialised for, ``"relu"`` (variance 2 / fan-in) or ``"linear"`` (1 / fan-in), an
            input of unit variance.
        (the others): as ``nn.Conv2d``; ``padding="same"`` also with a stride.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | str | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        scale: float = 1.0,
        reads: Literal["relu", "linear"] = "relu",
    ):
        self._reads = reads
        self._init_convolution(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self.weight_scale = scale

    def reset_parameters(self) -> None:
        """Weights from N(0, 2 / fan-in) or N(0, 1 / fan-in), bias 0."""
        nn.init.kaiming_normal_(self.weight, nonlinearity=self._reads)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def declared_weight(self) -> tuple[float, bool]:
        """Expected sum of squares of a row of the effective weight, as initialised; rows do not sum to zero."""
        return (2.0 if self._reads == "relu" else 1.0) * self.weight_scale**2, False


class _WSConvNd(StandardizedWeight, ScaledConvNd):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation = "relu",
        gain_source: GainSource = "exact",
        scale: float = 1.0,
        eps: float = DEFAULT_EPS,
        eps_mode: EpsMode = "floor",
        learnable_gain: bool = True,
    ):
        self._init_convolution(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._init_standardization(out_channels, activation, gain_source, scale, eps, learnable_gain)
        self.eps_mode = eps_mode

    def _places(self, input: Tensor) -> int:
        return input.numel() // (self.in_channels * math.prod(self.stride))


_WSCONV_DOC = """A {dims}-D convolution with Scaled Weight Standardization (Brock et al. 2021, section 4.2).

    Takes the arguments of ``nn.Conv{dims}d`` and is one. The fan-in of an output channel is every weight that it has:
    the channels of its group times the kernel taps. Weights start from N(0, 1 / fan-in), gains at 1, the bias at 0.

    In evaluation without gradients the standardized weight is kept until a parameter changes. Writes that torch does
    not count, through ``.data``, NumPy or DLPack, are seen after the next ``eval()`` or ``train()``.

    Args:
        padding: as in torch; ``"same"`` also with a stride, then as TensorFlow pads.
        activation: the activation whose output this layer reads; the weight carries its γ. None for a layer that
            reads no activation, such as a stem.
        gain_source: ``"exact"`` or ``"published"`` γ, see :func:`normfree.gain`.
        scale: a further scalar in front of the layer.
        eps: lower bound on fan-in · variance of an output channel's weights.
        eps_mode: ``"added"`` adds ``eps`` to the variance instead, as timm does.
        learnable_gain: one learnable factor per output channel; False leaves it out.

    Shape:
        (N, in_channels, *size) or (in_channels, *size) to (N, out_channels, *size') or (out_channels, *size').

    Raises:
        ValueError: as the torch layer, and as :func:`normfree.gain` for the activation.
    """


class WSConv1d(_WSConvNd, nn.Conv1d):
    __doc__ = _WSCONV_DOC.format(dims=1)


class WSConv2d(_WSConvNd, nn.Conv2d):
    __doc__ = _WSCONV_DOC.format(dims=2)


class WSConv3d(_WSConvNd, nn.Conv3d):
    __doc__ = _WSCONV_DOC.format(dims=3)
