"""Layers whose weight carries scalars.

Two scalars can travel in a weight:

* what stands *in front of* the layer, fixed when it is built: γ of the activation whose output it reads, and
  ``scale`` (a residual branch's 1/β, say);
* what stands *behind* it, given when it is called: ``output_scale`` (a residual branch's α and skip gain), a number
  or a tensor with one element, which multiplies the bias as well.

``layer(x, output_scale=c)`` therefore equals ``c * layer(x)`` without touching an activation map. The keyword is
also what lets :func:`normfree.spp` report a residual branch before α and the skip gain.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from ..standardize import Scale


class ScaledWeight:
    """A layer that applies ``weight`` times scalars. Mixed into a torch layer, in front of it."""

    weight: Any
    bias: Any
    weight_scale: float

    def _applying(self, input: Tensor, weight: Tensor, output_scale: Scale | None) -> AbstractContextManager[Any]:
        return nullcontext()

    def effective_weight(self, output_scale: Scale | None = None) -> Tensor:
        """The weight that the layer applies, every scalar included: the shape of ``weight``."""
        return self._scaled_weight(self._whole_scale(output_scale))

    def effective_bias(self, output_scale: Scale | None = None) -> Tensor | None:
        """The bias that the layer adds: (out,), or None."""
        if self.bias is None or output_scale is None:
            return self.bias
        return self.bias * output_scale

    def _whole_scale(self, output_scale: Scale | None) -> Scale:
        return self.weight_scale if output_scale is None else output_scale * self.weight_scale

    def _scaled_weight(self, scale: Scale) -> Tensor:
        return self.weight if isinstance(scale, float) and scale == 1.0 else self.weight * scale
