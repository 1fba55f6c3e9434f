"""Layers that standardize their weight."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..activation import Activation
from ..gain import GainSource, gain
from ..standardize import EpsMode, Scale, standardize_weight
from ..standardize.ordinary import looked_into
from ..standardize.together import Request, may_launch, standardize_together
from .keeping import KeepsWhatItComputes
from .scaled_weight import ScaledWeight


class StandardizedWeight(KeepsWhatItComputes, ScaledWeight):
    """A layer that applies its weight standardized, with one learnable gain per output channel.

    In evaluation without gradients the standardized weight is kept until a parameter changes; edits that torch does
    not count (through ``.data`` or NumPy) are seen after the next ``eval()`` or ``train()``.
    """

    gain: nn.Parameter | None
    eps: float
    eps_mode: EpsMode = "floor"
    activation_name: str
    _recomputes: Callable[..., AbstractContextManager[Any]] | None = None

    def _applying(self, weight: Tensor, output_scale: Scale | None) -> AbstractContextManager[Any]:
        """For the operation that applies the effective weight."""
        if (
            self._recomputes is None
            or self._shared is not None
            or not weight.requires_grad
            or looked_into()
            or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # checkpointing does it already
        ):
            return nullcontext()
        return self._recomputes(self, weight, output_scale)

    def _init_standardization(
        self, out: int, activation: Activation, gain_source: GainSource, scale: float, eps: float, learnable_gain: bool
    ) -> None:
        self.weight_scale = gain(activation, gain_source) * scale
        self.activation_name = activation if isinstance(activation, str) else repr(activation)
        self.eps = eps
        self.gain = None
        if learnable_gain:
            self.gain = nn.Parameter(torch.ones(out, device=self.weight.device, dtype=self.weight.dtype))
        if self._smallest_fan_in() == 1:
            warnings.warn(
                f"{type(self).__name__}: an output unit has a fan-in of 1, and a single standardized weight is 0; "
                "use a plain layer here",
                stacklevel=4,
            )

    def effective_weight(self, output_scale: Scale | None = None) -> Tensor:
        """The weight that the layer applies, every scalar included: the shape of ``weight``."""
        if self._shared is not None:
            shared = self._shared.get(self, output_scale)
            if shared is not None:
                return shared
        sources = (self.weight,) if self.gain is None else (self.weight, self.gain)
        constant: float | None = None
        if isinstance(output_scale, Tensor):
            sources = (*sources, output_scale)
        elif output_scale is not None:
            constant = float(output_scale)
        compute = super().effective_weight
        value = self._computed(sources, constant, lambda: compute(output_scale))
        return self._hold(value) if self._recomputes is None else value

    def _scaled_weight(self, scale: Scale) -> Tensor:
        if may_launch(self.weight, self.gain, scale):
            return standardize_together([Request(self.weight, self.gain, scale, self.eps, self.eps_mode)])[0]
        return standardize_weight(self.weight, self.gain, scale, self.eps, self.eps_mode)

    def declared_weight(self) -> tuple[float, bool]:
        """Mean over outputs of the sum of squares of a row of the effective weight, and that rows sum to zero."""
        square = 1.0 if self.gain is None or self.gain.is_meta else float(self.gain.detach().double().square().mean())
        return square * self.weight_scale**2, True

    def _fan_in(self) -> int:
        return self.weight[0].numel()

    def _smallest_fan_in(self) -> int:
        return self._fan_in()

    def reset_parameters(self) -> None:
        """Weights from N(0, 1 / fan-in), gains 1, bias 0."""
        nn.init.normal_(self.weight, std=1.0 / math.sqrt(self._fan_in()))
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if getattr(self, "gain", None) is not None:  # the torch constructor calls this before there is a gain
            nn.init.ones_(cast(nn.Parameter, self.gain))

    def extra_repr(self) -> str:
        learnable = "" if self.gain is not None else ", learnable_gain=False"
        return f"{super().extra_repr()}, activation={self.activation_name}{learnable}"  # type: ignore[misc]
