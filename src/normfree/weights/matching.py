"""Named tensors into a model: every check before the first change, and the configuration that goes with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..models import create_model
from ..models.network import ResidualNetwork

Classifier = Literal["load", "keep"]
"""``"load"`` the checkpoint's classifier, or ``"keep"`` the model's own: for other classes."""

_SHOWN = 5


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that does not fit the model. The model is as it was."""


@dataclass(frozen=True)
class Slot:
    """Where one tensor of a checkpoint goes.

    Args:
        source: its name in the checkpoint.
        target: the parameter or buffer of the model.
        convert: from the checkpoint's layout of the axes to the model's.
        is_classifier: belongs to the classifier.
    """

    source: str
    target: Tensor
    convert: Callable[[Tensor], Tensor] = lambda tensor: tensor
    is_classifier: bool = False


def classifier_tensors(model: nn.Module) -> set[int]:
    """The ``id`` of every tensor of the classifier: what ``get_classifier`` names, else the last linear layer."""
    named: Callable[[], Any] | None = getattr(model, "get_classifier", None)
    if named is not None:
        parts = named()
        layers = list(parts) if isinstance(parts, (list, tuple)) else [parts]
    else:
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    return {id(tensor) for layer in layers if isinstance(layer, nn.Module) for tensor in layer.parameters()}


def match(
    slots: Iterable[Slot], checkpoint: Mapping[str, Tensor], classifier: Classifier, hint: str = ""
) -> list[Tensor]:
    """The converted tensors of a checkpoint, one for each slot, all of them checked.

    With ``classifier="keep"`` the slots of the classifier get their own present value.

    Args:
        slots: where every tensor goes.
        checkpoint: tensors by name; a name without a slot is an error.
        classifier: whether the classifier is loaded.
        hint: one more sentence for the error.

    Raises:
        CheckpointError: missing or further tensors, wrong shapes, numbers that are not finite.
    """
    if classifier not in ("load", "keep"):
        raise ValueError(f"classifier: expected 'load' or 'keep', got {classifier!r}")
    slots = list(slots)
    values: list[Tensor] = []
    problems: list[str] = []
    only_classifier = True
    for slot in slots:
        expected = tuple(slot.target.shape)
        if slot.is_classifier and classifier == "keep":
            values.append(slot.target)
        elif slot.source not in checkpoint:
            problems.append(f"{slot.source}: missing, expected shape {expected}")
            only_classifier &= slot.is_classifier
        else:
            value, problem = _converted(slot, checkpoint[slot.source])
            values.append(value)
            if problem:
                problems.append(f"{slot.source}: {problem}")
                only_classifier &= slot.is_classifier
    known = {slot.source for slot in slots}
    for name, tensor in checkpoint.items():
        if name not in known:
            problems.append(f"{name}: the model has no such tensor, got shape {tuple(tensor.shape)}")
            only_classifier = False
    if problems:
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        advice = "\nclassifier='keep' loads all but the classifier." if only_classifier else ""
        raise CheckpointError(
            "checkpoint: it does not fit the model:\n  " + "\n  ".join(problems[:_SHOWN]) + more + advice + hint
        )
    return values


def _converted(slot: Slot, tensor: Tensor) -> tuple[Tensor, str]:
    expected = slot.target
    if tensor.is_floating_point() != expected.is_floating_point():
        return tensor, f"expected {expected.dtype}, got {tensor.dtype}"
    try:
        value = slot.convert(tensor)
    except RuntimeError:  # another number of axes
        return tensor, f"expected {expected.ndim} axes, got shape {tuple(tensor.shape)}"
    if value.shape != expected.shape:
        came = tuple(value.shape) if value.ndim == tensor.ndim else tuple(tensor.shape)
        return value, f"expected shape {tuple(expected.shape)}, got {came}"
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        return value, f"{int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} numbers are NaN or infinite"
    return value, ""


def assign(slots: Iterable[Slot], values: Iterable[Tensor]) -> None:
    """Copies each value into its slot's tensor."""
    with torch.no_grad():
        for slot, value in zip(slots, values, strict=True):
            if value is not slot.target:
                slot.target.copy_(value)


def reconfigured(model: ResidualNetwork, options: Mapping[str, Any]) -> ResidualNetwork:
    """A model as :func:`normfree.create_model` makes it with some options changed, around the same parameters.

    Args:
        model: made by ``create_model``.
        options: ones that leave every parameter as it is.

    Returns:
        ``model`` itself if it has these options, else another one that shares its parameters.
    """
    present = model.info.options
    changed = {name: value for name, value in options.items() if name in present and present[name] != value}
    if not changed:
        return model
    with torch.device("meta"):
        other = create_model(model.info.name, **{**present, "num_classes": model.num_classes, **changed})
    tensors = {_bare(name): tensor for name, tensor in model.named_parameters()}
    for name, _ in list(other.named_parameters()):
        path, _, leaf = name.rpartition(".")
        other.get_submodule(path).register_parameter(leaf, tensors[_bare(name)])  # type: ignore[arg-type]
    other.info.data = model.info.data
    return other.train(model.training)


def become(model: ResidualNetwork, other: ResidualNetwork) -> None:
    """Gives ``model`` the parts and the description of ``other``."""
    if other is not model:
        model.stem, model.stages, model.final_conv, model.head = other.stem, other.stages, other.final_conv, other.head
        model.info = other.info


def require_created(model: nn.Module) -> ResidualNetwork:
    """The model, if ``create_model`` made it.

    Raises:
        TypeError: it did not.
    """
    if not isinstance(model, ResidualNetwork) or not model.info.name:
        raise TypeError(f"model: expected one made by normfree.create_model, got {type(model).__name__}")
    return model


def _bare(name: str) -> str:
    """A parameter's name without the place of a shortcut convolution behind its pooling."""
    return name.replace("conv_shortcut.1.", "conv_shortcut.")
