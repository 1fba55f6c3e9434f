"""The state of a run on disk: written whole or not at all, and enough to go on as if nothing had happened."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files import atomic_path

LAST, BEST = "last.pt", "best.pt"
_FORMAT = 1


class ResumeError(ValueError):
    """A run that cannot be gone on with; one line says why."""


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Writes a state of tensors, numbers, strings, lists and dictionaries beside ``path``, then renames.

    Raises:
        OSError: it cannot be written, as on a full disk; what was there before is untouched.
    """
    with atomic_path(path) as temporary:
        try:
            with temporary.open("wb") as file:
                torch.save({"format": _FORMAT, **state}, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter when the disk is full
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise OSError(f"cannot write {path}: {reason}; what was there before is untouched") from error


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a state; no code in the file is run.

    Raises:
        ResumeError: there is none, it is damaged, or a later version wrote it.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise ResumeError(f"there is no checkpoint {path}") from None
    except Exception as error:  # torch raises many kinds for a damaged file
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ResumeError(f"{path} is no readable checkpoint: {first}") from None
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ResumeError(f"{path} is no checkpoint that this version of normfree can read")
    return state


def evaluated_weights(state: Mapping[str, Any], is_raw: bool = False) -> dict[str, Tensor]:
    """The network in a checkpoint: the average if there is one and ``is_raw`` does not say otherwise."""
    average = state.get("average")
    if average is None or is_raw:
        return dict(state["model"])
    return {key.removeprefix("module."): value for key, value in average.items() if key.startswith("module.")}


def random_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's generators. Training itself seeds anew for every microbatch."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    version, words, spare = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss],
        "python": [version, list(words), spare],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Undoes whatever happened to the generators since :func:`random_state`."""
    torch.set_rng_state(state["torch"].cpu())
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    version, words, spare = state["python"]
    random.setstate((version, tuple(words), spare))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
