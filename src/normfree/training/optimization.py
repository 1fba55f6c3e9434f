"""What a recipe makes of a model's parameters: groups, learning rate over time, clipping, average."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..agc import AdaptiveGradientClipping, classifier_of
from .recipe import OptimizerSection, Recipe


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """SGD, with adaptive clipping before every step where the recipe wants it.

    Raises:
        ValueError: the model has no parameter to train.
    """
    section = recipe.optimizer
    groups = parameter_groups(model, section)
    device = next(model.parameters()).device.type
    peak = recipe.peak_learning_rate
    optimizer = torch.optim.SGD(
        [{**group, "lr": peak * group["rate"], "initial_lr": peak * group["rate"]} for group in groups],
        lr=peak,
        momentum=section.momentum,
        nesterov=section.nesterov,
        fused=device in ("cpu", "cuda"),
    )
    if recipe.clipping is not None:
        AdaptiveGradientClipping(optimizer, model, recipe.clipping)
    return optimizer


def make_schedule(
    optimizer: torch.optim.Optimizer, section: OptimizerSection, updates: int, updates_per_epoch: float, update: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """Sets the optimiser's rates for ``update``, and those of the next one with each ``step()``."""
    factor = learning_rate_factor(section, updates, updates_per_epoch)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor, last_epoch=update - 1)


def parameter_groups(model: nn.Module, section: OptimizerSection) -> list[dict[str, Any]]:
    """Weights, which decay; the classifier's; gains, biases and other vectors; and scalars, each with their own rate.

    A parameter counts as a weight if more than one of its axes is longer than 1.

    Raises:
        ValueError: no parameter requires a gradient.
    """
    weights: list[Tensor] = []
    vectors: list[Tensor] = []
    scalars: list[Tensor] = []
    classifiers: list[Tensor] = []
    last = {id(parameter) for module in classifier_of(model) for parameter in module.parameters()}
    for parameter in model.parameters():
        if parameter.requires_grad:
            long_axes = sum(size > 1 for size in parameter.shape)
            matrices = classifiers if id(parameter) in last else weights
            (matrices if long_axes > 1 else scalars if parameter.numel() == 1 else vectors).append(parameter)
    decay = section.weight_decay
    other_decay = decay if section.decay_scalars else 0.0
    groups = [
        {"params": weights, "weight_decay": decay, "rate": 1.0},
        {"params": classifiers, "weight_decay": decay, "rate": section.classifier_learning_rate},
        {"params": vectors, "weight_decay": other_decay, "rate": section.vector_learning_rate},
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
    """An exponential moving average of parameters and buffers; whole numbers are copied.

    The average begins with the first update. From then on its decay is min(decay, (1 + n) / (10 + n)) at update n, so
    that it forgets where it began.
    """

    @torch.no_grad()
    def update(averages: list[Tensor], values: list[Tensor], n: Tensor) -> None:
        if not averages[0].is_floating_point():
            torch._foreach_copy_(averages, values)
            return
        weight = (9.0 / (10.0 + n)).clamp(min=1.0 - decay).to(averages[0].dtype)  # stays on its device: nobody waits
        steps = torch._foreach_sub(values, averages)
        torch._foreach_mul_(steps, weight)
        torch._foreach_add_(averages, steps)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)  # type: ignore[arg-type]


def clip_gradient_norm(model: nn.Module, limit: float | None) -> None:
    """Scales the whole gradient down to a norm of ``limit`` if it is larger."""
    if limit is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
