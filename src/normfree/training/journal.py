"""What a run writes down and says while it goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, Self

from torch import nn

from ..signal import SignalPropagation
from .distributed import BatchPlan, Process
from .evaluation import EvaluationResult
from .feed import Feed
from .logs import Say, TableLog, TensorBoardLog, Watcher
from .recipe import Recipe
from .run_folder import RunFolder

_LOG_COLUMNS = ("update", "epoch", "loss", "learning_rate", "images_per_second", "data_wait")
_EVALUATION_COLUMNS = ("update", "epoch", "top1", "top5", "loss", "calibration_error", "examples", "skipped")


class Journal:
    """The tables, the TensorBoard log and the bar or lines of a run. Only the first process keeps one.

    Args:
        recipe, folder: of the run.
        process: this one; on any but the first, nothing is written or said.
        update: how many updates have been made; what is written of later ones, before a restart, is dropped.
        updates: in the whole run.
        say: as for :func:`normfree.training.train`.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, process: Process, update: int, updates: int, say: Say | None):
        self._watcher = Watcher(updates, update, say if process.is_first else _nothing)
        self._is_kept, self._state, self._skipped = process.is_first, "", 0
        if self._is_kept:
            self._log = TableLog(folder.path / "log.csv", _LOG_COLUMNS, update)
            self._evaluations = TableLog(folder.path / "evaluations.csv", _EVALUATION_COLUMNS, update)
            path = folder.path / "tensorboard" if recipe.log.tensorboard else None
            self._tensorboard = TensorBoardLog(path, update)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._watcher)
            if self._is_kept:
                stack.callback(self._tensorboard.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def line(self, text: str) -> None:
        """A line that stays."""
        self._watcher.line(text)

    def updated(self, update: int) -> None:
        """After an update that is not logged."""
        self._watcher.update(update, self._state, is_logged=False)

    def logged(self, row: Mapping[str, Any], skipped: int) -> None:
        """After an update that is: its row, and how many examples could not be read so far."""
        self._state = f"epoch {row['epoch']:.2f}  loss {row['loss']:.4f}  {row['images_per_second']:.0f} images/s"
        if self._is_kept:
            self._log.add(row)
            self._tensorboard.scalars("train", row, row["update"])
        self._watcher.update(row["update"], self._state, is_logged=True)
        if skipped > self._skipped:
            self.line(f"{skipped} examples could not be read so far; others took their places")
            self._skipped = skipped

    def evaluated(self, result: EvaluationResult, update: int, epoch: float) -> None:
        """After an evaluation."""
        if self._is_kept:
            row = {**result.to_dict(), "update": update, "epoch": epoch, "skipped": len(result.skipped)}
            self._evaluations.add(row)
            self._tensorboard.scalars("validation", {key: row[key] for key in _EVALUATION_COLUMNS[2:6]}, update)
        self.line(f"epoch {epoch:.2f}: {result}")

    def signal(self, update: int, signal: SignalPropagation) -> None:
        """After a Signal Propagation Plot was measured; its files are the monitor's business."""
        if self._is_kept and self._tensorboard.is_wanted:
            from matplotlib.figure import Figure

            figure = Figure(figsize=(13.0, 4.3), layout="constrained")
            signal.plot(figure.subplots(1, 3))
            self._tensorboard.figure("signal", figure, update)


def introduction(recipe: Recipe, model: nn.Module, feed: Feed, plan: BatchPlan, updates: int) -> list[str]:
    """What is trained on what, and how its batches and rates come about: lines to begin with."""
    data, images, section = feed.data, feed.images, recipe.optimizer
    assert data.train is not None
    assert data.validation is not None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        f"{recipe.model.name}, {parameters / 1e6:.2f} M parameters, on {feed.process.device}; {len(data.train)} "
        f"training and {len(data.validation)} validation examples of {len(data.classes)} classes, {images.size} px",
        *data.notes,
        *images.notes,
        f"{plan}; {updates} updates ({recipe.epochs:g} epochs)",
    ]
    if section.learning_rate_batch is not None:
        lines.append(
            f"learning rate {recipe.peak_learning_rate:g} = {section.learning_rate:g} × "
            f"{recipe.batch_size} / {section.learning_rate_batch}"
        )
    if section.adaptive_clipping_batch is not None and recipe.clipping is not None:
        lines.append(
            f"adaptive clipping {recipe.clipping:.4g} = {section.adaptive_clipping:g} × "
            f"{section.adaptive_clipping_batch} / {recipe.batch_size}"
        )
    return lines


def _nothing(line: str) -> None:
    pass
