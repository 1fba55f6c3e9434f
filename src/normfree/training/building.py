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
from ..surgery import calibrate, center
from ..weights import CheckpointError
from ..weights.native import fill
from ..weights.reading import read_state_dict
from .checkpoint import evaluated_weights, load_checkpoint
from .recipe import ModelSection, Recipe
from .run_folder import RunFolder


def build_model(section: ModelSection, num_classes: int, channels: int) -> nn.Module:
    """The network of a recipe, with fresh weights and a classifier for ``num_classes``.

    Models of ours, timm and torchvision get the number of classes (and of channels, where it is not 3) as an option;
    a callable gets the recipe's options as they are.

    Raises:
        ValueError: a model that does not exist, or options that it does not have.
    """
    options = dict(section.options)
    if section.name in list_models():
        options = {"num_classes": num_classes, **({"in_channels": channels} if channels != 3 else {}), **options}
    elif section.name.startswith("timm:"):
        options = {"num_classes": num_classes, **({"in_chans": channels} if channels != 3 else {}), **options}
    elif section.name.startswith("torchvision:"):
        options = {"num_classes": num_classes, **options}
    model = load_model(section.name, **options)
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
    """The model as the recipe's ``calibrate`` wants it: gains by theory or on data, biases on data, or as it is.

    Args:
        shape: (channels, height, width) of a training example.
        images: gives a batch of prepared images, for ``data`` and ``center``.
    """
    if recipe.calibrate == "none":
        return model
    if recipe.calibrate == "theory":
        return calibrate(model, input_shape=shape, method="theory")
    with torch.random.fork_rng():
        if recipe.calibrate == "center":
            try:
                return center(model, images())
            except ValueError as error:
                raise ValueError(
                    f"calibrate: center needs layers of normfree; calibrate=none is for others ({error})"
                ) from error
        return calibrate(model, images(), method="data")


def fill_from(model: nn.Module, weights: str) -> list[str]:
    """Gives a network the weights of a run or of a file; its classifier is left alone if theirs does not fit.

    Args:
        model: the network to fill.
        weights: folder of a run, finished or not; or a file of tensors (``.safetensors``, or what ``torch.save``
            made). Of a run, those that it evaluates.

    Returns:
        Sentences that say what was not taken, and why.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: weights that do not fit the network, or a file that cannot be read.
    """
    tensors = _tensors_from(Path(weights))
    try:
        fill(model, tensors, "load")
    except CheckpointError as error:
        reason = _first_problem(error)
        try:
            fill(model, tensors, "keep")
        except CheckpointError as other:
            raise CheckpointError(f"model.weights: {weights} does not fit the model: {_first_problem(other)}") from None
        return [f"weights of {weights}; the classifier begins anew ({reason})"]
    return [f"weights of {weights}"]


def _tensors_from(path: Path) -> dict[str, Tensor]:
    run = RunFolder(path)
    if not path.is_dir():
        return read_state_dict(path)
    if run.weights.is_file():
        return read_state_dict(run.weights)
    is_raw = run.read_recipe().evaluation.weights == "raw"  # it has not come to its end
    return evaluated_weights(load_checkpoint(run.last), is_raw)


def _first_problem(error: CheckpointError) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return lines[min(1, len(lines) - 1)]
