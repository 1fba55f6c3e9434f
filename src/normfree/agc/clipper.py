"""Norms of units, and gradients scaled by them, in as few passes over memory or launches as the device allows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .units import Units

_SMALLEST_NORM = 1e-6


class Clipper:
    """Clips one fixed list of units.

    On a CPU one parameter after another, in place: what counts there is how often memory is read and written.
    Elsewhere, where the number of launches counts, all parameters of equal fan-in, device and precision at a time.
    """

    def __init__(self, units: Iterable[Units], clipping: float, eps: float):
        for name, value in (("clipping", clipping), ("eps", eps)):
            if not value > 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        self.clipping, self.eps = clipping, eps
        self._units = list(units)

    @torch.no_grad()
    def clip(self) -> None:
        singly: dict[torch.dtype, list[Units]] = defaultdict(list)
        matrices: dict[tuple[Any, ...], list[Units]] = defaultdict(list)
        vectors: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
        for units in self._units:
            parameter = units.parameter
            if parameter.grad is None or not parameter.numel():
                continue
            kind = (parameter.device, parameter.dtype)
            if _is_clipped_singly(parameter):
                singly[_norm_dtype(parameter)].append(units)
            elif parameter.ndim < 2:
                vectors[kind].append(parameter)
            else:
                matrices[(*kind, units.fan_in)].append(units)
        for dtype, group in singly.items():
            self._clip_singly(group, dtype)
        for group in matrices.values():
            self._clip_matrices(group)
        for parameters in vectors.values():
            self._clip_vectors(parameters)

    def _clip_singly(self, units: list[Units], dtype: torch.dtype) -> None:
        gradients = [unit.apart(unit.parameter.grad) for unit in units]  # type: ignore[arg-type]
        weights = [unit.apart(unit.parameter) for unit in units]
        norms = [_norm(view, axes, dtype) for view, axes in gradients]
        factor = self._factor(_flat(norms), _flat([_norm(view, axes, dtype) for view, axes in weights]))
        for (gradient, _), norm, part in zip(gradients, norms, factor.split([n.numel() for n in norms]), strict=True):
            if bool((part < 1.0).any()):
                gradient.mul_(part.view_as(norm))

    def _clip_matrices(self, units: list[Units]) -> None:
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
        gradients: list[Tensor] = [vector.grad for vector in vectors]  # type: ignore[misc]
        dtype = _norm_dtype(gradients[0])
        norm = torch.stack(torch._foreach_norm(gradients, dtype=dtype))
        weight_norm = torch.stack(torch._foreach_norm(vectors, dtype=dtype))
        factors = self._factor(norm, weight_norm).to(gradients[0].dtype)
        torch._foreach_mul_(gradients, list(factors.unbind()))

    def _factor(self, norm: Tensor, weight_norm: Tensor) -> Tensor:
        largest = self.clipping * weight_norm.clamp(min=self.eps)
        return torch.where(norm > largest, largest / norm.clamp(min=_SMALLEST_NORM), 1.0)


def _is_clipped_singly(parameter: Tensor) -> bool:
    return parameter.device.type == "cpu"


def _norm(view: Tensor, axes: list[int], dtype: torch.dtype) -> Tensor:
    """Of every unit, with an axis of length 1 for each of ``axes``."""
    return torch.linalg.vector_norm(view, dim=axes, keepdim=True, dtype=dtype) if axes else view.abs().to(dtype)


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _norm_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
