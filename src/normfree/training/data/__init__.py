"""Labelled images, and batches of them in an order that the seed alone decides."""

from .batches import Batch, EvaluationBatches, Skipped, TrainingBatches, workers_for
from .errors import DataError, UnreadableImage
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
