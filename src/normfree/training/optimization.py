"""What a recipe makes of a model's parameters: groups, learning rate over time, clipping, average."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..agc import AdaptiveGradientClipping
from .recipe import OptimizerSection, Recipe


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """SGD, with adaptive clipping before every step where the recipe wants it.

    Raises:
        ValueError: the model has no parameter to train.
    """
    section = recipe.optimizer
    groups = parameter_groups(model, section)
    device = next(model.parameters()).device.type
    optimizer = torch.optim.SGD(
        [{**group, "lr": recipe.peak_learning_rate * group["rate"]} for group in groups],
        lr=recipe.peak_learning_rate,
        momentum=section.momentum,
        nesterov=section.nesterov,
        fused=device in ("cpu", "cuda"),
    )
    if section.adaptive_clipping is not None:
        AdaptiveGradientClipping(optimizer, model, section.adaptive_clipping)
    return optimizer


def parameter_groups(model: nn.Module, section: OptimizerSection) -> list[dict[str, Any]]:
    """Weights, which decay; gains, biases and other vectors, which do not; and scalars, with a rate of their own.

    A parameter counts as a weight if more than one of its axes is longer than 1.

    Raises:
        ValueError: no parameter requires a gradient.
    """
    weights: list[Tensor] = []
    vectors: list[Tensor] = []
    scalars: list[Tensor] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            long_axes = sum(size > 1 for size in parameter.shape)
            (weights if long_axes > 1 else scalars if parameter.numel() == 1 else vectors).append(parameter)
    decay = section.weight_decay
    other_decay = decay if section.decay_scalars else 0.0
    groups = [
        {"params": weights, "weight_decay": decay, "rate": 1.0},
        {"params": vectors, "weight_decay": other_decay, "rate": 1.0},
        {"params": scalars, "weight_decay": other_decay, "rate": section.scalar_learning_rate},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("model: none of its parameters requires a gradient, there is nothing to train")
    return groups


def learning_rate_factor(section: OptimizerSection, updates: int, updates_per_epoch: float) -> Callable[[int], float]:
    """The factor on the peak learning rate at each update, 0 to ``updates`` − 1: linear warm-up, then the schedule.

    The first update of a warm-up of k has 1/k of the peak. ``updates`` is the whole length of the run.
    """
    warmup = round(section.warmup_epochs * updates_per_epoch)
    floor = section.final_learning_rate / section.learning_rate

    def factor(update: int) -> float:
        if update < warmup:
            return (update + 1) / warmup
        if section.schedule == "constant":
            return 1.0
        progress = min(1.0, (update - warmup) / max(1, updates - warmup))
        shape = 0.5 * (1.0 + math.cos(math.pi * progress)) if section.schedule == "cosine" else 1.0 - progress
        return floor + (1.0 - floor) * shape

    return factor


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of parameters and buffers.

    The decay grows to ``decay`` as (1 + n) / (10 + n) over the first n updates, so that the average forgets where it
    started.
    """

    @torch.no_grad()
    def update(averages: Sequence[Tensor], values: Sequence[Tensor], count: Tensor | int) -> None:
        n = float(count)
        weight = 1.0 - min(decay, (1.0 + n) / (10.0 + n))
        for average, value in zip(averages, values, strict=True):
            if average.is_floating_point():
                average.lerp_(value.to(average.dtype), weight)
            else:
                average.copy_(value)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)  # type: ignore[arg-type]


def clip_gradient_norm(model: nn.Module, limit: float | None) -> None:
    """Scales the whole gradient down to a norm of ``limit`` if it is larger."""
    if limit is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
