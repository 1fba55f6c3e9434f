"""Labelled images, and batches of them in an order that the seed alone decides."""

from ...decoding import UnreadableImage
from .batches import Batch, EvaluationBatches, Skipped, TrainingBatches, workers_for
from .errors import DataError
from .examples import Examples
from .images import ImageData, open_data
from .opened import VALIDATION

__all__ = [
    "VALIDATION",
    "Batch",
    "DataError",
    "EvaluationBatches",
    "Examples",
    "ImageData",
    "Skipped",
    "TrainingBatches",
    "UnreadableImage",
    "open_data",
    "workers_for",
]
