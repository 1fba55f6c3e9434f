"""What a run's network is fed with: microbatches for training, batches for evaluation, a few images to look at."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .augmentation import evaluation_transform, training_transform
from .data import Batch, EvaluationBatches, ImageData, TrainingBatches, workers_for
from .distributed import BatchPlan, Process
from .image_config import ImageConfig
from .mixing import BatchFinisher
from .recipe import Recipe

_SIGNAL_IMAGES, _CALIBRATION_IMAGES = 32, 128


class Feed:
    """A run's images, as this process's network takes them.

    Args:
        recipe: of the run.
        data: for training and validation.
        images: sizes and normalisation.
        plan: how the examples of an update are shared out.
        process: this one.

    Attributes:
        updates_per_epoch: full batches that the data has.

    Raises:
        ValueError: data that does not go with the batch sizes, or of unknown length.
    """

    def __init__(self, recipe: Recipe, data: ImageData, images: ImageConfig, plan: BatchPlan, process: Process):
        self.recipe, self.data, self.images, self.plan, self.process = recipe, data, images, plan, process
        self._layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self._mixed = BatchFinisher(recipe.augmentation, images, len(data.classes), recipe.seed)
        self._unmixed = BatchFinisher(None, images, len(data.classes))
        self._training = TrainingBatches(
            data.train,
            training_transform(recipe.augmentation, images),
            batch_size=recipe.batch_size,
            microbatch_size=plan.microbatch_size,
            seed=recipe.seed,
            rank=process.rank,
            world_size=process.world_size,
            workers=self._workers(data.train),
            pin_memory=process.device.type == "cuda",
        )
        if self._training.updates_per_epoch is None:
            raise ValueError(f"data: nobody knows how many examples {recipe.data.path} has; set data.limit to it")
        self.updates_per_epoch: int = self._training.updates_per_epoch

    @contextlib.contextmanager
    def updates(self, epoch: int, first: int) -> Iterator[Iterator[list[Batch]]]:
        """The microbatches of each update of an epoch, from one update on."""
        stream = self._training.epoch(epoch, first)
        try:
            yield iter(lambda: list(islice(stream, self.plan.accumulation)), [])
        finally:
            close = getattr(stream, "close", None)  # of a generator; lets go of what was read ahead
            if close is not None:
                close()

    def training(self, batch: Batch, epoch: int) -> tuple[Tensor, Tensor]:
        """(N, C, H, W) and targets, mixed as the recipe says, on the device."""
        images, targets = self._mixed(batch, epoch, self.process.device)
        return images.contiguous(memory_format=self._layout), targets

    def evaluation_batches(self) -> EvaluationBatches:
        """This process's share of the validation examples."""
        return self._unaugmented(
            self.data.validation,
            self.recipe.evaluation.batch_size or max(64, self.plan.microbatch_size),
            rank=self.process.rank,
            world_size=self.process.world_size,
            workers=self._workers(self.data.validation),
        )

    def evaluation(self, batch: Batch) -> Tensor:
        """(N, C, H, W) on the device."""
        images, _ = self._unmixed(batch, device=self.process.device)
        return images.contiguous(memory_format=self._layout)

    def signal_images(self) -> Tensor:
        """The first validation images."""
        return self.evaluation(next(iter(self._unaugmented(self.data.validation, _SIGNAL_IMAGES))))

    def calibration_images(self) -> Tensor:
        """The first training images, on the CPU and the same on every process."""
        return self._unmixed(next(iter(self._unaugmented(self.data.train, _CALIBRATION_IMAGES))))[0]

    def close(self) -> None:
        """Ends the workers."""
        self._training.close()

    def _unaugmented(self, examples: Any, batch_size: int, **share: Any) -> EvaluationBatches:
        return EvaluationBatches(examples, evaluation_transform(self.images), batch_size=batch_size, **share)

    def _workers(self, examples: Any) -> int:
        return workers_for(self.recipe.data.workers, examples, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
