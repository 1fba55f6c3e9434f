"""Models on a Hugging Face hub, through huggingface_hub's mixin, which is imported when it is first needed."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from ..models.network import ResidualNetwork
from .matching import require_created
from .native import load_weights, model_config, save_weights

WEIGHTS_NAME = "model.safetensors"
REPOSITORY_TAGS = ["normfree", "image-classification"]


def save_pretrained(model: nn.Module, folder: str | Path, **options: Any) -> None:
    """Writes ``model.safetensors``, ``config.json`` and a model card into a folder.

    Args:
        model: made by :func:`normfree.create_model`.
        folder: created if it does not exist.
        options: of ``huggingface_hub.PyTorchModelHubMixin.save_pretrained``.

    Raises:
        TypeError: not a model of ``create_model``.
        ValueError: as :func:`normfree.save_weights`.
    """
    _wrapped(model).save_pretrained(folder, **options)


def push_to_hub(model: nn.Module, repo_id: str, **options: Any) -> str:
    """Uploads a model to a hub.

    Args:
        model: made by :func:`normfree.create_model`.
        repo_id: ``"user/name"``; the repository is created if it does not exist.
        options: of ``huggingface_hub.PyTorchModelHubMixin.push_to_hub``: ``private``, ``token``, ``branch`` and others.

    Returns:
        The address of the commit.

    Raises:
        TypeError: not a model of ``create_model``.
        ValueError: as :func:`normfree.save_weights`.
    """
    return _wrapped(model).push_to_hub(repo_id, **options)


def from_pretrained(source: str | Path, **options: Any) -> ResidualNetwork:
    """The model in a folder of :func:`save_pretrained` or in a hub's repository, ready for inference.

    Args:
        source: a folder, or ``"user/name"``.
        options: of ``huggingface_hub.PyTorchModelHubMixin.from_pretrained``: ``revision``, ``token``, ``cache_dir``
            and others.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: as :func:`normfree.load_weights`.
        FileNotFoundError: the folder has no weights.
    """
    return _hub_class().from_pretrained(source, **options).network


def _wrapped(model: nn.Module) -> Any:
    model = require_created(model)
    wrapped = _hub_class()(model)
    wrapped._hub_mixin_config = model_config(model)
    return wrapped


@lru_cache(maxsize=1)
def _hub_class() -> Any:
    from huggingface_hub import PyTorchModelHubMixin, hf_hub_download

    class HubModel(nn.Module, PyTorchModelHubMixin, library_name="normfree", tags=list(REPOSITORY_TAGS)):
        """Carries a network through the mixin's methods; the files are our own."""

        def __init__(self, network: ResidualNetwork):
            super().__init__()
            self.network = network

        def _save_pretrained(self, save_directory: Path) -> None:
            save_weights(self.network, save_directory / WEIGHTS_NAME)

        @classmethod
        def _from_pretrained(cls, *, model_id: str, **options: Any) -> HubModel:
            if Path(model_id).is_dir():
                path = Path(model_id) / WEIGHTS_NAME
            else:
                path = Path(hf_hub_download(repo_id=model_id, filename=WEIGHTS_NAME, **options))
            return cls(load_weights(path))

    return HubModel
