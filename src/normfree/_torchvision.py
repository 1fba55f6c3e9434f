"""torchvision and timm, importable also beside a torch that torchvision's compiled operators do not fit.

The registry's torchvision wheel cannot load its compiled operators beside a CPU-only torch, and then fails at import
because the schemas that they would have defined are missing. Two empty schemas are enough for all of its Python
parts, and for timm, which imports it.
"""

from __future__ import annotations

import importlib
import sys
from functools import lru_cache
from types import ModuleType

import torch

_MISSING_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def import_torchvision() -> ModuleType:
    """The module ``torchvision``.

    Raises:
        ImportError: it is not installed, or fails for a reason of its own.
    """
    return _import("torchvision")


def import_timm() -> ModuleType:
    """The module ``timm``.

    Raises:
        ImportError: it is not installed, or fails for a reason of its own.
    """
    return _import("timm")


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if not any(f"operator torchvision::{op} does not exist" in str(error) for op in _MISSING_SCHEMAS):
            raise
    except ModuleNotFoundError as error:
        if error.name not in ("timm", "torchvision"):
            raise
        raise ImportError(f"{error.name} is needed here and not installed: pip install {error.name}") from error
    _forget("torchvision", name)
    _define_missing_schemas()
    return importlib.import_module(name)


def _forget(*packages: str) -> None:
    """Drops half-imported modules, so that a second import starts from nothing."""
    for module in list(sys.modules):
        if module.split(".")[0] in packages:
            del sys.modules[module]


@lru_cache(maxsize=1)
def _define_missing_schemas() -> torch.library.Library:
    # the library must outlive this call: its schemas go when it goes
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _MISSING_SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    return library
