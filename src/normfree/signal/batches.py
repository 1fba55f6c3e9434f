"""The batches that a model is measured with: from whatever they come as to what its forward takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

Batch = Any
"""A tensor; a tuple or list, whose first element is the input; or a mapping of keyword arguments."""


def batches_of(inputs: Any) -> Iterator[Batch]:
    """One batch, or an iterable of them, as an iterator.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(inputs, (Tensor, Mapping)):
        return iter([inputs])
    if isinstance(inputs, str) or not isinstance(inputs, Iterable):
        raise TypeError(f"inputs: expected a tensor, a mapping or an iterable of batches, got {type(inputs).__name__}")
    return iter(inputs)


def to_model(batch: Batch, model: nn.Module) -> Batch:
    """The batch on the model's device, and its floating-point tensors in the model's precision."""
    reference = next((p for p in model.parameters() if p.is_floating_point()), None)

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            if reference is None:
                return value
            return value.to(reference.device, reference.dtype if value.is_floating_point() else value.dtype)
        if isinstance(value, Mapping):
            return {key: move(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return tuple(move(item) for item in value)
        return value

    return move(batch)


def with_gradient(batch: Batch) -> Batch:
    """The batch as leaves that require a gradient, so that a frozen model has one, too."""
    if isinstance(batch, Tensor):
        return batch.detach().clone().requires_grad_() if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {key: with_gradient(value) for key, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(with_gradient(value) for value in batch)
    return batch


def call(model: nn.Module, batch: Batch) -> Any:
    """The model's output for a batch."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)
