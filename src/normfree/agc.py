"""Adaptive gradient clipping: the gradient of a unit may be at most a fixed part of the unit's own size.

Source: Brock et al. 2021, "High-performance large-scale image recognition without normalization", section 4.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Exclude = Literal["classifier"] | None | Iterable[Tensor | nn.Module]
"""What is never clipped: the classifier, nothing, or these parameters and the parameters of these modules."""

_SMALLEST_NORM = 1e-6
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


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
    _Clipper(_units(parameters_or_model, exclude), clipping, eps).clip()


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
        units = _units(own if model is None else model, exclude)
        if model is not None:
            known = {id(parameter) for parameter in own}
            units = [unit for unit in units if id(unit.parameter) in known]
            if not units:
                raise ValueError("optimizer: it has none of the model's parameters that are to be clipped")
        self._clipper = _Clipper(units, clipping, eps)
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._clipper.clip()

    def remove(self) -> None:
        """Takes the hook off the optimiser."""
        self._handle.remove()


@dataclass(frozen=True)
class _Units:
    """A parameter, and how its units lie in it.

    Args:
        parameter: of at least two axes, or a vector or scalar, which is one unit.
        transposed_groups: groups of a transposed convolution, whose output units are not along the first axis; 0 for
            every other parameter.
    """

    parameter: Tensor
    transposed_groups: int = 0

    def as_rows(self, tensor: Tensor) -> Tensor:
        """One row for each unit."""
        if not self.transposed_groups:
            return tensor.flatten(1)
        grouped = tensor.unflatten(0, (self.transposed_groups, -1)).flatten(3)  # (groups, in, out, taps)
        return grouped.transpose(1, 2).flatten(0, 1).flatten(1)

    def from_rows(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`as_rows`, with the parameter's shape."""
        shape = self.parameter.shape
        if not self.transposed_groups:
            return rows.view(shape)
        groups, outputs = self.transposed_groups, shape[1]
        return rows.view(groups, outputs, shape[0] // groups, -1).transpose(1, 2).reshape(shape)


def _units(source: nn.Module | Iterable[Tensor] | Tensor, exclude: Exclude) -> list[_Units]:
    if isinstance(exclude, str) and exclude != "classifier":
        raise ValueError(f"exclude: expected 'classifier', None, or parameters and modules, got {exclude!r}")
    if isinstance(source, nn.Module):
        left_out = _excluded(classifier_of(source) if isinstance(exclude, str) else exclude or ())
        groups = {id(m.weight): m.groups for m in source.modules() if isinstance(m, _TRANSPOSED)}
        parameters: list[Tensor] = list(source.parameters())
    else:
        left_out = _excluded(() if isinstance(exclude, str) else exclude or ())
        groups = {}
        parameters = [source] if isinstance(source, Tensor) else list(source)
    for parameter in parameters:
        if not isinstance(parameter, Tensor):
            raise TypeError(f"parameters_or_model: expected a model or parameters, got {type(parameter).__name__}")
    return [_Units(p, groups.get(id(p), 0)) for p in parameters if id(p) not in left_out]


def _excluded(items: Iterable[Tensor | nn.Module]) -> set[int]:
    parameters: set[int] = set()
    for item in items:
        parameters |= {id(item)} if isinstance(item, Tensor) else {id(parameter) for parameter in item.parameters()}
    return parameters


def classifier_of(model: nn.Module) -> list[nn.Module]:
    """The layers that ``model.get_classifier()`` names, or else the model's last linear layer; none if it has none."""
    named: Callable[[], Any] | None = getattr(model, "get_classifier", None)
    if named is not None:
        classifier = named()
        return list(classifier) if isinstance(classifier, (list, tuple)) else [classifier]
    linear: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return linear[-1:]


class _Clipper:
    """Clips one fixed list of units, all parameters of equal fan-in, device and precision at a time."""

    def __init__(self, units: Iterable[_Units], clipping: float, eps: float):
        for name, value in (("clipping", clipping), ("eps", eps)):
            if not value > 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        self.clipping, self.eps = clipping, eps
        matrices: dict[tuple[Any, ...], list[_Units]] = defaultdict(list)
        vectors: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
        for unit in units:
            parameter = unit.parameter
            kind = (parameter.device, parameter.dtype)
            if parameter.ndim < 2:
                vectors[kind].append(parameter)
            elif parameter.numel():
                matrices[(*kind, unit.as_rows(parameter).shape[1])].append(unit)
        self._matrices, self._vectors = list(matrices.values()), list(vectors.values())

    @torch.no_grad()
    def clip(self) -> None:
        for units in self._matrices:
            self._clip_matrices([unit for unit in units if unit.parameter.grad is not None])
        for vectors in self._vectors:
            self._clip_vectors([vector for vector in vectors if vector.grad is not None])

    def _clip_matrices(self, units: list[_Units]) -> None:
        if not units:
            return
        gradients: list[Tensor] = [unit.parameter.grad for unit in units]  # type: ignore[misc]
        rows = [unit.as_rows(gradient) for unit, gradient in zip(units, gradients, strict=True)]
        together = torch.cat(rows)
        weights = torch.cat([unit.as_rows(unit.parameter) for unit in units])
        dtype = _norm_dtype(together)
        norm = torch.linalg.vector_norm(together, dim=1, dtype=dtype)
        weight_norm = torch.linalg.vector_norm(weights, dim=1, dtype=dtype)
        together.mul_(self._factor(norm, weight_norm).unsqueeze(1))
        clipped = together.split([len(part) for part in rows])
        torch._foreach_copy_(gradients, [unit.from_rows(part) for unit, part in zip(units, clipped, strict=True)])

    def _clip_vectors(self, vectors: list[Tensor]) -> None:
        if not vectors:
            return
        gradients: list[Tensor] = [vector.grad for vector in vectors]  # type: ignore[misc]
        dtype = _norm_dtype(gradients[0])
        norm = torch.stack(torch._foreach_norm(gradients, dtype=dtype))
        weight_norm = torch.stack(torch._foreach_norm(vectors, dtype=dtype))
        factors = self._factor(norm, weight_norm).to(gradients[0].dtype)
        torch._foreach_mul_(gradients, list(factors.unbind()))

    def _factor(self, norm: Tensor, weight_norm: Tensor) -> Tensor:
        largest = self.clipping * weight_norm.clamp(min=self.eps)
        return torch.where(norm > largest, largest / norm.clamp(min=_SMALLEST_NORM), 1.0)


def _norm_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
