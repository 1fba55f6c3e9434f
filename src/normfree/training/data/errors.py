"""What can be wrong with data."""

from __future__ import annotations


class DataError(ValueError):
    """Data that cannot be trained on or measured with; the message names the place and the remedy."""
