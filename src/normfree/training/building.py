"""The network of a recipe: made, filled, calibrated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.standardized_weight import StandardizedWeight as _StandardizedWeight
from ..models import list_models
from ..sources import load_model
from ..surgery import calibrate
from ..weights import CheckpointError
from ..weights.native import fill
from ..weights.reading import read_state_dict
from .checkpoint import evaluated_weights, load_checkpoint
from .recipe import ModelSection, Recipe
from .run_folder import RunFolder


def build_model(section: ModelSection, num_classes: int, channels: int, is_filled: bool = True) -> nn.Module:
    """The network with a classifier for ``num_classes``, filled with ``section.weights`` if there are any.

    Models of ours, timm and torchvision get the number of classes (and of channels, where it is not 3) as an option;
    a callable gets the recipe's options as they are. Weights for other classes leave the new classifier alone.
    ``is_filled=False`` leaves ``section.weights`` out, for a model that gets its weights elsewhere.

    Raises:
        ValueError: a model that does not exist, options that it does not have, or weights that do not fit it.
    """
    options = dict(section.options)
    if section.name in list_models():
        options = {"num_classes": num_classes, **({"in_channels": channels} if channels != 3 else {}), **options}
    elif section.name.startswith("timm:"):
        options = {"num_classes": num_classes, **({"in_chans": channels} if channels != 3 else {}), **options}
    elif section.name.startswith("torchvision:"):
        options = {"num_classes": num_classes, **options}
    model = load_model(section.name, **options)
    if is_filled and section.weights is not None:
        _fill(model, Path(section.weights))
    if section.recompute:
        set_recompute: Callable[[bool], None] | None = getattr(model, "set_grad_checkpointing", None)
        if set_recompute is None:
            raise ValueError(f"model.recompute: {section.name} has no set_grad_checkpointing")
        set_recompute(True)
    return model


def has_standardized_weights(model: nn.Module) -> bool:
    """Whether sharing standardization would do anything."""
    return any(isinstance(module, _StandardizedWeight) for module in model.modules())


def calibrated_model(
    model: nn.Module, recipe: Recipe, shape: tuple[int, int, int], images: Callable[[], Tensor]
) -> Any:
    """The model as the recipe's ``calibrate`` wants it: its gains set by theory, on data, or not at all.

    Args:
        shape: (channels, height, width) of a training example.
        images: gives a batch of prepared images, for ``data``.
    """
    if recipe.calibrate == "none":
        return model
    if recipe.calibrate == "theory":
        return calibrate(model, input_shape=shape, method="theory")
    with torch.random.fork_rng():
        return calibrate(model, images(), method="data")


def _fill(model: nn.Module, path: Path) -> None:
    """From a run, or from a file of tensors; a classifier for other classes is left alone."""
    run = RunFolder(path)
    if path.is_dir() and not run.weights.is_file():  # it has not come to its end
        tensors = evaluated_weights(load_checkpoint(run.last))
    else:
        tensors = read_state_dict(run.weights if path.is_dir() else path)
    try:
        fill(model, tensors, "load")
    except CheckpointError as error:
        try:
            fill(model, tensors, "keep")
        except CheckpointError:
            lines = [line.strip() for line in str(error).splitlines()]
            raise CheckpointError(f"model.weights: {path}: {' '.join(lines[:2])}") from None
