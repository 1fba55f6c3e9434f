"""Adaptive gradient clipping: the gradient of a unit may be at most a fixed part of the unit's own size.

Source: Brock et al. 2021, "High-performance large-scale image recognition without normalization", section 4.
"""

from .clip import AdaptiveGradientClipping, adaptive_gradient_clip_
from .units import classifier_of

__all__ = ["AdaptiveGradientClipping", "adaptive_gradient_clip_", "classifier_of"]
