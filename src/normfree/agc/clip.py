"""Clipping once, and before every step of an optimiser."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .clipper import Clipper
from .units import Exclude, units_of


def adaptive_gradient_clip_(
    parameters_or_model: nn.Module | Iterable[Tensor] | Tensor,
    clipping: float = 0.01,
    eps: float = 1e-3,
    exclude: Exclude = "classifier",
) -> None:
    """Scales down, in place, each unit's gradient G whose norm exceeds clipping · max(‖W‖, eps).

    A unit is one output channel or feature with all of its weights: a row of a linear layer or a convolution, grouped
    or not, and a slice along the output axis of a transposed convolution. A vector (gains, biases) or a scalar is one
    unit. Norms are taken in float32, or in float64 for such parameters. Gradients that are None are passed over.

    Args:
        parameters_or_model: a model, or parameters. Parameters alone do not tell which belong to transposed
            convolutions or to a classifier: all of them are then clipped, with output units along the first axis.
        clipping: λ, the largest ratio of the two norms; 0.01 in the paper at batch 4096, larger for smaller batches.
        eps: norm that a unit at least counts as, so that weights at zero can leave it.
        exclude: ``"classifier"``, the layer that ``model.get_classifier()`` names or else the model's last linear
            layer; None for nothing; or parameters and modules. Ignored where it says ``"classifier"`` and only
            parameters are given.

    Raises:
        ValueError: ``clipping`` or ``eps`` is not positive, or ``exclude`` is none of these.
        TypeError: neither a model nor parameters.
    """
    Clipper(units_of(parameters_or_model, exclude), clipping, eps).clip()


class AdaptiveGradientClipping:
    """Clips adaptively before every step of an optimiser, until :meth:`remove`.

    ``optimizer.step()`` then works on clipped gradients; nothing else about it changes. With ``torch.amp.GradScaler``,
    call ``scaler.unscale_(optimizer)`` before ``scaler.step(optimizer)`` where the optimiser is fused. Optimisers that
    compute gradients inside ``step`` (LBFGS) are not clipped.

    Args:
        optimizer: any ``torch.optim.Optimizer``; only its parameters are clipped.
        model: the model that has the parameters, which tells units and classifier; None to take every parameter of
            the optimiser, with output units along the first axis.
        clipping, eps, exclude: as :func:`adaptive_gradient_clip_`.

    Raises:
        ValueError: as :func:`adaptive_gradient_clip_`; or the optimiser and the model share no parameter.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module | None = None,
        clipping: float = 0.01,
        eps: float = 1e-3,
        exclude: Exclude = "classifier",
    ):
        self.optimizer = optimizer
        own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        units = units_of(own if model is None else model, exclude)
        if model is not None:
            known = {id(parameter) for parameter in own}
            units = [unit for unit in units if id(unit.parameter) in known]
            if not units:
                raise ValueError("optimizer: it has none of the model's parameters that are to be clipped")
        self._clipper = Clipper(units, clipping, eps)
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._clipper.clip()

    def remove(self) -> None:
        """Takes the hook off the optimiser."""
        self._handle.remove()
