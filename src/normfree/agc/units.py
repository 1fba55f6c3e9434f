"""What is clipped: a model's parameters, and how the units lie in each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

Exclude = Literal["classifier"] | None | Iterable[Tensor | nn.Module]
"""What is never clipped: the classifier, nothing, or these parameters and the parameters of these modules."""

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Units:
    """A parameter, and how its units lie in it.

    Args:
        parameter: of at least two axes, or a vector or scalar, which is one unit.
        transposed_groups: groups of a transposed convolution, whose output units are not along the first axis; 0 for
            every other parameter.
    """

    parameter: Tensor
    transposed_groups: int = 0

    @property
    def fan_in(self) -> int:
        """Elements of one unit, of a parameter with at least two axes."""
        outputs = self.transposed_groups * self.parameter.shape[1] if self.transposed_groups else len(self.parameter)
        return self.parameter.numel() // outputs

    def apart(self, tensor: Tensor) -> tuple[Tensor, list[int]]:
        """A view of ``tensor``, of the parameter's shape, and the axes along which a unit extends in it."""
        if tensor.ndim < 2:
            return tensor, list(range(tensor.ndim))
        if not self.transposed_groups:
            return tensor, list(range(1, tensor.ndim))
        view = tensor.unflatten(0, (self.transposed_groups, -1))  # (groups, in, out, *taps)
        return view, [axis for axis in range(view.ndim) if axis not in (0, 2)]

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


def units_of(source: nn.Module | Iterable[Tensor] | Tensor, exclude: Exclude) -> list[Units]:
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
    different = {id(parameter): parameter for parameter in parameters}
    return [Units(parameter, groups.get(key, 0)) for key, parameter in different.items() if key not in left_out]


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
