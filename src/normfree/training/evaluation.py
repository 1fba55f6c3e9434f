"""What a trained network is worth: accuracy, loss, calibration, classes one by one, and speed."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._torchvision import import_torchvision


@dataclass(frozen=True)
class ClassResult:
    """One class: its name, how many examples it has, and how many of them were found (top-1)."""

    name: str
    examples: int
    correct: int

    @property
    def accuracy(self) -> float:
        """In per cent; NaN for a class without examples."""
        return 100.0 * self.correct / self.examples if self.examples else float("nan")


@dataclass(frozen=True)
class EvaluationResult:
    """An evaluation. Accuracies and calibration error in per cent.

    Attributes:
        examples: how many were evaluated.
        loss: mean cross-entropy, without label smoothing.
        top1, top5: accuracy; top5 is among all classes where there are fewer than five.
        calibration_error: expected calibration error, 15 bins of equal width (Guo et al. 2017).
        classes: every class.
        images_per_second: over the whole evaluation, reading included.
        skipped: names of examples that could not be read, with reasons.
    """

    examples: int
    loss: float
    top1: float
    top5: float
    calibration_error: float
    classes: tuple[ClassResult, ...]
    images_per_second: float
    skipped: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain types, with each class's accuracy."""
        classes = [{**asdict(result), "accuracy": result.accuracy} for result in self.classes]
        return {**asdict(self), "classes": classes, "skipped": list(self.skipped)}

    def __str__(self) -> str:
        text = (
            f"top-1 {self.top1:.2f} %, top-5 {self.top5:.2f} %, loss {self.loss:.4f}, "
            f"calibration error {self.calibration_error:.2f} %, {self.examples} examples, "
            f"{self.images_per_second:.0f} images/s"
        )
        return text + (f", {len(self.skipped)} not readable" if self.skipped else "")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    prepare: Callable[[Any], Tensor],
    classes: Sequence[str],
    device: torch.device | str = "cpu",
    precision: str = "float32",
) -> EvaluationResult:
    """Runs a model in evaluation mode over examples; in a distributed run, every process over its own, then all.

    Args:
        model: (N, C, H, W) to logits (N, K) with K at least the number of classes. Its modules' modes are as before
            afterwards.
        batches: objects with ``images``, ``targets`` and ``skipped``, such as those of ``EvaluationBatches``.
        prepare: makes of a batch what the model takes: (N, C, H, W) on ``device``.
        classes: names, in the order of the targets.
        precision: ``"float32"`` or ``"bfloat16"`` (autocast).

    Raises:
        ValueError: no example, or logits that do not fit the classes.
    """
    import_torchvision()  # torchmetrics imports it, too
    from torchmetrics import MeanMetric, MetricCollection, SumMetric
    from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassStatScores

    device = torch.device(device)
    count = len(classes)
    metrics = MetricCollection(
        {
            "top1": MulticlassAccuracy(count, average="micro"),
            "top5": MulticlassAccuracy(count, top_k=min(5, count), average="micro"),
            "calibration_error": MulticlassCalibrationError(count, n_bins=15),
            "scores": MulticlassStatScores(count, average=None),
        },
        compute_groups=False,
    ).to(device)
    mean_loss, seen = MeanMetric().to(device), SumMetric().to(device)
    seen.update(0)
    modes = {module: module.training for module in model.modules()}
    skipped, start = [], time.perf_counter()
    model.eval()
    try:
        for batch in batches:
            skipped += list(batch.skipped)
            if not len(batch.images):
                continue
            seen.update(len(batch.images))
            targets = batch.targets.to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                logits = model(prepare(batch))
            if logits.ndim != 2 or logits.shape[1] < count:
                raise ValueError(f"model: expected logits (N, {count}) for {count} classes, got {tuple(logits.shape)}")
            logits = logits[:, :count].float()
            metrics.update(logits.softmax(dim=1), targets)
            mean_loss.update(nn.functional.cross_entropy(logits, targets), weight=len(targets))
    finally:
        model.train(modes[model])  # layers let go of what they keep in evaluation
        for module, mode in modes.items():
            module.training = mode
    if not int(seen.compute()):
        raise ValueError("evaluation: there is no example that could be read")
    with warnings.catch_warnings():  # a process whose own share is empty
        warnings.filterwarnings("ignore", "The ``compute`` method of metric")
        computed, loss = metrics.compute(), float(mean_loss.compute())
    scores = computed["scores"].reshape(-1, 5)  # true and false positives, true and false negatives, support
    examples = int(scores[:, 4].sum())
    return EvaluationResult(
        examples=examples,
        loss=loss,
        top1=100.0 * float(computed["top1"]),
        top5=100.0 * float(computed["top5"]),
        calibration_error=100.0 * float(computed["calibration_error"]),
        classes=tuple(
            ClassResult(name, int(score[4]), int(score[0])) for name, score in zip(classes, scores, strict=True)
        ),
        images_per_second=examples / (time.perf_counter() - start),
        skipped=tuple(skipped),
    )
