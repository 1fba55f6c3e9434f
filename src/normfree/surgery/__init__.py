"""A model in, a model out."""

from .fold import fold

__all__ = ["fold"]
