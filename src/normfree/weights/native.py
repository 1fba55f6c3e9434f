"""Our own files: safetensors, with what ``create_model`` needs to make the model again in the metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast, overload

import torch
from torch import Tensor, nn

from .._version import __version__
from ..files import atomic_path
from ..models import create_model
from ..models.data import DataConfig
from ..models.network import ModelInfo, ResidualNetwork
from .matching import CheckpointError, Classifier, Slot, assign, classifier_tensors, match
from .reading import read_safetensors

_METADATA_KEY = "normfree"


def save_weights(model: nn.Module, path: str | Path) -> Path:
    """Writes every parameter and buffer of a model, without loss, and its configuration if it has one.

    Args:
        model: any module; the configuration is that of models made by :func:`normfree.create_model`.
        path: the ``.safetensors`` file; it is replaced in one step if it exists.

    Returns:
        ``path``.

    Raises:
        ValueError: the model's activation, or another option, has no name that could be written down.
        OSError: the file cannot be written.
    """
    from safetensors.torch import save_file

    path = Path(path)
    info = getattr(model, "info", None)
    metadata = {"format": "pt"}
    if isinstance(info, ModelInfo) and info.name:
        metadata[_METADATA_KEY] = json.dumps({"version": __version__, **model_config(cast(ResidualNetwork, model))})
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata)
    return path


@overload
def load_weights(model: str | Path, /) -> ResidualNetwork: ...
@overload
def load_weights(model: nn.Module, path: str | Path, /, *, classifier: Classifier = "load") -> nn.Module: ...
def load_weights(
    model: nn.Module | str | Path, path: str | Path | None = None, /, *, classifier: Classifier = "load"
) -> nn.Module:
    """Reads a file of :func:`save_weights`.

    ``load_weights(path)`` makes the model, ``load_weights(model, path)`` fills one.

    Args:
        model: the model to fill; or the path, for a new model with the options of the file.
        path: the file.
        classifier: ``"keep"`` leaves the model's own classifier alone, for other classes.

    Returns:
        The model: a new one in evaluation mode and with the precision of the file, or the one that was given.

    Raises:
        CheckpointError: the file does not fit the model (which tensor, what came, what was expected), has NaN in it,
            is damaged, or has no configuration to make a model with. The model is as it was.
        FileNotFoundError: no such file.
    """
    if isinstance(model, nn.Module):
        if path is None:
            raise TypeError("path: load_weights(model, path) needs the file's path")
        fill(model, read_safetensors(Path(path))[0], classifier)
        return model
    tensors, metadata = read_safetensors(Path(model))
    if _METADATA_KEY not in metadata:
        raise CheckpointError(
            f"checkpoint: {model} has no configuration in it, so the model must be given: load_weights(model, path)"
        )
    return _model_from_config(metadata[_METADATA_KEY], tensors)


def model_config(model: ResidualNetwork) -> dict[str, Any]:
    """Name, options and data configuration of a model, as JSON knows them.

    Raises:
        ValueError: an option that JSON does not know, such as an activation that is a module.
    """
    for option, value in model.info.options.items():
        if not (value is None or isinstance(value, (bool, int, float, str))):
            raise ValueError(f"{option}: only a name or a number can be saved, this model has {value!r}")
    options = {**model.info.options, "num_classes": model.num_classes}
    return {"name": model.info.name, "options": options, "data": asdict(model.info.data)}


def _model_from_config(text: str, tensors: Mapping[str, Tensor]) -> ResidualNetwork:
    """The model of a configuration with these tensors, in their precision and in evaluation mode."""
    try:
        config = json.loads(text)
        with torch.device("meta"):
            model = create_model(config["name"], **config["options"])
        data: dict[str, Any] = dict(config["data"])
        model.info.data = DataConfig(**{**data, "mean": tuple(data["mean"]), "std": tuple(data["std"])})
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint: this version cannot make its model: {error}") from error
    _check(model, tensors, "load")
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def fill(model: nn.Module, tensors: Mapping[str, Tensor], classifier: Classifier) -> None:
    """Gives any module the tensors that bear the names of its own.

    Raises:
        CheckpointError: they do not fit; the model is as it was.
    """
    assign(*_check(model, tensors, classifier))


def _check(model: nn.Module, tensors: Mapping[str, Tensor], classifier: Classifier) -> tuple[list[Slot], list[Tensor]]:
    of_classifier = classifier_tensors(model)
    state = model.state_dict(keep_vars=True)
    slots = [Slot(name, tensor, is_classifier=id(tensor) in of_classifier) for name, tensor in state.items()]
    return slots, match(slots, tensors, classifier)
