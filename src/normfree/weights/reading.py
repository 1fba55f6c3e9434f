"""Checkpoint files as plain tensors and arrays. Nothing that a file asks to be executed is executed."""

from __future__ import annotations

import codecs
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .matching import CheckpointError

_WRAPPERS = ("state_dict", "model", "model_state_dict")


def read_state_dict(source: Mapping[str, Any] | str | Path) -> dict[str, Tensor]:
    """A state dict, or the one in a ``.safetensors`` file or a file of ``torch.save``; wrappers are taken off.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: truncated, corrupt, or holding objects other than tensors.
    """
    content: Any = source if isinstance(source, Mapping) else _read_tensors(Path(source))
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"checkpoint: expected named tensors, got {type(content).__name__}")
    strange = [f"{name!r} ({type(value).__name__})" for name, value in content.items() if not torch.is_tensor(value)]
    if strange:
        raise CheckpointError(f"checkpoint: expected tensors only, got {', '.join(strange[:3])}")
    return {name.removeprefix("module."): value for name, value in content.items()}


def _read_tensors(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no such file: {path}")
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint: {path} is corrupt, or holds pickled objects other than tensors, which are never executed: "
            f"{_first_line(error)}"
        ) from error
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(f"checkpoint: {path} is truncated or corrupt: {_first_line(error)}") from error


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: truncated or corrupt.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint: {path} is truncated or corrupt: {_first_line(error)}") from error


def read_arrays(path: Path) -> Mapping[Any, Any]:
    """The arrays of an ``.npz`` file, or of a pickled dictionary of arrays, as some ``*_haiku.npz`` are.

    A pickle is read with nothing but the constructors of NumPy arrays at hand.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: truncated, corrupt, or holding objects other than arrays.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no such file: {path}")
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                return _ArrayUnpickler(file).load()
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint: {path}: {error}") from error
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise CheckpointError(f"checkpoint: {path} is truncated or corrupt: {_first_line(error)}") from error
        raise CheckpointError(
            f"checkpoint: {path} holds pickled objects other than plain arrays, which are never executed"
        ) from error
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
        raise CheckpointError(f"checkpoint: {path} is truncated or corrupt: {_first_line(error)}") from error


def _create_array(
    function: Callable[..., np.ndarray], args: tuple[Any, ...], state: Any, attributes: Any = None
) -> np.ndarray:
    array = function(*args)
    array.__setstate__(state)
    return array


def _empty_array(kind: type, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.ndarray(shape, dtype)


def _scalar(dtype: np.dtype, data: bytes) -> Any:
    return np.frombuffer(data, dtype)[0]


def _encode(text: str, encoding: str) -> bytes:
    return codecs.latin_1_encode(text)[0]


class _ArrayUnpickler(pickle.Unpickler):
    """Knows how to build dictionaries and NumPy arrays of numbers, and nothing else."""

    _KNOWN: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _encode,
        ("collections", "OrderedDict"): OrderedDict,
        **{
            (f"numpy.{core}.multiarray", name): function
            for core in ("core", "_core")
            for name, function in (("_reconstruct", _empty_array), ("scalar", _scalar))
        },
        **{(module, "_create_array"): _create_array for module in ("dill._dill", "dill.dill")},
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._KNOWN:
            return self._KNOWN[module, name]
        raise CheckpointError(f"the pickle asks for {module}.{name}, which is no plain array and is never executed")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
