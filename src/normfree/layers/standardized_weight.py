"""Layers that standardize their weight."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..activation import Activation
from ..gain import GainSource, gain
from ..standardize import EpsMode, Scale, standardize_weight
from ..standardize.ordinary import ORDINARY, looked_into
from ..standardize.together import Request, may_launch, standardize_together
from .keeping import KeepsWhatItComputes
from .recomputed import Recomputed
from .scaled_weight import ScaledWeight

Standardization = Callable[[Tensor, Tensor | None, Scale], Tensor]
"""Of a raw weight, a gain and a scale."""

_LARGE = 1 << 18  # elements of a weight that is worth freeing: for less, looking at what is saved takes too long
_MANY_PLACES = 512  # to which it is applied: standardizing again then adds a few per cent to an operation


class StandardizedWeight(KeepsWhatItComputes, ScaledWeight):
    """A layer that applies its weight standardized, with one learnable gain per output channel.

    In evaluation without gradients the standardized weight is kept until a parameter changes; edits that torch does
    not count (through ``.data`` or NumPy) are seen after the next ``eval()`` or ``train()``.
    """

    gain: nn.Parameter | None
    eps: float
    eps_mode: EpsMode = "floor"
    activation_name: str
    _recomputes: bool | Literal["auto"] = "auto"

    def _applying(self, input: Tensor, weight: Tensor, output_scale: Scale | None) -> AbstractContextManager[Any]:
        """For the operation that applies the effective weight to an input."""
        if self._shared is not None or not weight.requires_grad or looked_into():
            return nullcontext()
        again = self._recomputes is True or (self._recomputes == "auto" and self._costs_little_again(input, weight))
        if not again or not self._may_recompute():
            self._hold(weight)
            return nullcontext()
        self.__dict__["_held"] = None
        raw = (self.weight, self.gain, self._whole_scale(output_scale))
        return Recomputed(self._standardization(), raw, weight, type(self).__name__)

    def _may_recompute(self) -> bool:
        """Whether the weight can be made again from tensors that stay, and nothing else decides on what is saved."""
        saving = torch._C._autograd
        own = ("effective_weight", "_scaled_weight")  # a subclass may add to the weight there, or quantize it
        return (
            all(getattr(type(self), name) is getattr(StandardizedWeight, name) for name in own)
            and not any(name in self.__dict__ for name in own)
            and "parametrizations" not in cast(nn.Module, self)._modules  # their tensors are other ones with every look
            and all(tensor is None or type(tensor) in ORDINARY for tensor in (self.weight, self.gain))
            and saving._top_saved_tensors_default_hooks(True) is None  # as checkpointing has
            and saving._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
        )

    def _costs_little_again(self, input: Tensor, weight: Tensor) -> bool:
        """Whether standardizing again would take a small part of the operation's time, and free much memory."""
        return (
            weight.numel() >= _LARGE
            and weight.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")  # it saves its own copy of the weight, in lower precision
            and self._places(input) >= _MANY_PLACES
        )

    def _places(self, input: Tensor) -> int:
        """How many positions of an input, over all examples, each element of the weight is multiplied with."""
        raise NotImplementedError

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
        return self._computed(sources, constant, lambda: compute(output_scale))

    def _scaled_weight(self, scale: Scale) -> Tensor:
        return self._standardization()(self.weight, self.gain, scale)

    def _standardization(self) -> Standardization:
        """As this layer does it, without the layer."""
        return partial(_standardized, eps=self.eps, eps_mode=self.eps_mode)

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


def _standardized(weight: Tensor, gain: Tensor | None, scale: Scale, eps: float, eps_mode: EpsMode) -> Tensor:
    if may_launch(weight, gain, scale):
        return standardize_together([Request(weight, gain, scale, eps, eps_mode)])[0]
    return standardize_weight(weight, gain, scale, eps, eps_mode)
