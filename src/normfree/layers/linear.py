"""The linear layer with Scaled Weight Standardization."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activation import Activation
from ..gain import GainSource
from ..standardize import DEFAULT_EPS, Scale
from .standardized_weight import StandardizedWeight


class WSLinear(StandardizedWeight, nn.Linear):
    """A linear layer with Scaled Weight Standardization; the fan-in is ``in_features``.

    Takes the arguments of ``nn.Linear`` and is one.

    In evaluation without gradients the standardized weight is kept until a parameter changes. Writes that torch does
    not count, through ``.data``, NumPy or DLPack, are seen after the next ``eval()`` or ``train()``.

    Args:
        activation, gain_source, scale, eps, learnable_gain: as :class:`WSConv2d`.

    Shape:
        (*, in_features) to (*, out_features).

    Raises:
        ValueError: as :func:`normfree.gain` for the activation.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation = "relu",
        gain_source: GainSource = "exact",
        scale: float = 1.0,
        eps: float = DEFAULT_EPS,
        learnable_gain: bool = True,
    ):
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._init_standardization(out_features, activation, gain_source, scale, eps, learnable_gain)

    def forward(self, input: Tensor, output_scale: Scale | None = None) -> Tensor:
        """(*, in_features) to (*, out_features); times ``output_scale`` if one is given."""
        weight, bias = self.effective_weight(output_scale), self.effective_bias(output_scale)
        with self._applying(input, weight, output_scale):
            return F.linear(input, weight, bias)

    def _places(self, input: Tensor) -> int:
        return input.numel() // self.in_features
