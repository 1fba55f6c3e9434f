"""The same network without its normalisation layers."""

from __future__ import annotations

import copy

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_NORMS: tuple[type[nn.Module], ...] = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)
_NAMES = ("FrozenBatchNorm2d", "LayerNorm2d", "RmsNorm", "EvoNorm2dS0", "FilterResponseNormTlu2d")


def without_norms(model: nn.Module) -> nn.Module:
    """A copy in which every normalisation layer is the identity; an activation inside one is kept.

    Args:
        model: any module; left as it is.

    Returns:
        The copy, its other weights as they were.

    Raises:
        ValueError: the model has no normalisation layer.
    """
    stripped = copy.deepcopy(model)
    found = 0
    for parent in list(stripped.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _NORMS) or type(child).__name__ in _NAMES:
                setattr(parent, name, _activation_of(child))
                found += 1
    if not found:
        raise ValueError(f"model: {type(model).__name__} has no normalisation layer to take out")
    return stripped


def _activation_of(norm: nn.Module) -> nn.Module:
    activation = getattr(norm, "act", None)
    return activation if isinstance(activation, nn.Module) else nn.Identity()
