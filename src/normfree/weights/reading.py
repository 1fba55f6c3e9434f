"""Checkpoint files as plain tensors and arrays. Nothing that a file asks to be executed is executed."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

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
        asked = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"checkpoint: {path} asks for {asked[1]}, which is no tensor and is never executed"
            if asked
            else f"checkpoint: {path} is corrupt, or holds pickled objects other than tensors, which are never executed"
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

    A pickle is read with nothing at hand but what stands for NumPy's arrays.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: truncated, corrupt, or holding objects other than arrays.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no such file: {path}")
    try:
        if not _is_zip(path):
            with path.open("rb") as file:
                return _with_arrays(_ArrayUnpickler(file).load())
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


class _Inert:
    """Stands for something of NumPy in a pickle. All that a pickle can do to it goes through its own methods.

    NumPy's own constructors are not safe in a pickle's hands: with a data type of objects, or one whose state has been
    tampered with, they take bytes for pointers.
    """

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise CheckpointError("the pickle gives a state to an object that has none")


class _Dtype(_Inert):
    """``numpy.dtype`` of numbers."""

    __slots__ = ("value",)

    def __init__(self, text: str, align: Any = None, copy: Any = None):
        self.value = np.dtype(text) if isinstance(text, str) else np.dtype("O")
        if self.value.kind not in "fiub":
            raise CheckpointError(f"the pickle holds an array of {text!r}, which is no plain array of numbers")

    def __setstate__(self, state: Any) -> None:
        self.value = self.value.newbyteorder(state[1])


class _Array(_Inert):
    """``numpy.ndarray``, as its class, as ``_reconstruct`` makes it, and as its state fills it."""

    __slots__ = ("value",)

    def __init__(self, *arguments: Any):
        self.value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, data = state
        self._fill(data, dtype, shape, "F" if is_fortran else "C")

    def _fill(self, data: Any, dtype: Any, shape: Any, order: Literal["C", "F"]) -> None:
        if not isinstance(dtype, _Dtype) or not isinstance(data, (bytes, bytearray)):
            raise CheckpointError("the pickle holds an array without plain numbers")
        self.value = np.frombuffer(data, dtype.value).reshape(shape, order=order)


class _BufferArray(_Array):
    """``_frombuffer``: an array in a pickle of protocol 5."""

    __slots__ = ()

    def __init__(self, data: Any, dtype: Any, shape: Any, order: Literal["C", "F"]):
        self._fill(data, dtype, shape, order)


class _Scalar(_Array):
    """``scalar``: one number."""

    __slots__ = ()

    def __init__(self, dtype: Any, data: Any):
        self._fill(data, dtype, (), "C")


class _DillArray(_Array):
    """``_create_array``: an array in a pickle of dill."""

    __slots__ = ()

    def __init__(self, function: Any, arguments: Any, state: Any, attributes: Any = None):
        self.__setstate__(state)


class _Encoded(_Inert, bytes):
    """``_codecs.encode``: bytes in a pickle of protocol 2."""

    def __new__(cls, text: str, encoding: str) -> _Encoded:
        return bytes.__new__(cls, text.encode("latin-1"))


class _ArrayUnpickler(pickle.Unpickler):
    """Knows dictionaries and what stands for NumPy's arrays of numbers, and nothing else."""

    _KNOWN: dict[tuple[str, str], type] = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _Encoded,
        ("collections", "OrderedDict"): dict,
        **{
            (f"numpy.{core}.{module}", name): stand_in
            for core in ("core", "_core")
            for module, name, stand_in in (
                ("multiarray", "_reconstruct", _Array),
                ("multiarray", "scalar", _Scalar),
                ("numeric", "_frombuffer", _BufferArray),
            )
        },
        **{(module, "_create_array"): _DillArray for module in ("dill._dill", "dill.dill")},
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._KNOWN:
            return self._KNOWN[module, name]
        raise CheckpointError(f"the pickle asks for {module}.{name}, which is no plain array and is never executed")


def _with_arrays(content: Any) -> dict[Any, Any]:
    """Nested dictionaries of arrays, from dictionaries of what stands for them."""
    if not isinstance(content, dict):
        raise CheckpointError(f"expected a pickled dictionary of arrays, got {type(content).__name__}")
    tree: dict[Any, Any] = {}
    for key, value in content.items():
        if not all(isinstance(part, str) for part in (key if isinstance(key, tuple) else (key,))):
            raise CheckpointError(f"expected names of modules and parameters, got a key of {type(key).__name__}")
        if isinstance(value, _Array):
            value = value.value
        elif isinstance(value, dict):
            value = _with_arrays(value)
        else:
            value = None
        if value is None:
            raise CheckpointError(f"{key}: expected a plain array or a dictionary of them")
        tree[key] = value
    return tree


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"  # a truncated one, too, which zipfile.is_zipfile takes for none


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
