"""Scaled Weight Standardization of weight tensors; the layers that use it are in :mod:`normfree.layers`."""

from .formula import DEFAULT_EPS, EpsMode, Scale, standardize_weight
from .transposed import standardize_transposed_weight

__all__ = ["DEFAULT_EPS", "EpsMode", "Scale", "standardize_transposed_weight", "standardize_weight"]
